"""Predicted peak memory and time per step, from shapes and a short measurement."""
