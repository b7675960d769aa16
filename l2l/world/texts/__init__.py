"""Families of texts. Each module has scenes, which tasks use too, and ``document``: one pretraining text."""
