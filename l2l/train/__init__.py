"""Fine-tuning: configuration, inputs, the loop, baselines, evaluation, the run log."""
