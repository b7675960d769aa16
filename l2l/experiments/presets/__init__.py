"""Commands made of the experiment engine: compare, meta-evaluate, quickstart, tuners test."""
