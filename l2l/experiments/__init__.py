"""Experiments: contenders x models x tasks x schemes x seeds at equal passes or seconds, by one engine."""
