"""Loading models and tokenizers, tiny random models, and log-probabilities at chosen positions."""
