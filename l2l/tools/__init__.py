"""Tools around a run: estimates before it, benchmarks, a look at the machine, learning rates from probes."""
