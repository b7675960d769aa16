"""Meta-training: learning a tuner over a pool of tasks."""
