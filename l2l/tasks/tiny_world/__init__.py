"""The tiny world: tasks in generated text of a small vocabulary, on which the embedded model ``l2l/tiny`` was pretrained.

Pretraining itself is ``benchmarks/tiny_world/pretrain.py``.
"""

POOL = ("world_sentiment", "world_topic", "world_entailment", "world_category", "world_question", "world_feeling", "world_job")
"""Tasks of the meta-training pool."""

VALIDATION = ("world_season", "world_where")
"""Tasks of meta-validation, never in the pool."""

HELD_OUT = ("world_stars", "world_cause", "world_trait", "world_opposite")
"""Tasks that no tuner sees in meta-training: what a tuner is judged on."""
