"""The small world: generated text on which ``l2l/tiny`` is pretrained, and the tasks phrased in it."""

POOL = (
    "world_sentiment",
    "world_topic",
    "world_entailment",
    "world_category",
    "world_question",
    "world_feeling",
    "world_job",
)
"""Tasks of the meta-training pool."""

VALIDATION = ("world_season", "world_where")
"""Tasks of meta-validation, never in the pool."""

HELD_OUT = ("world_stars", "world_cause", "world_trait", "world_opposite")
"""Tasks that no tuner sees in meta-training: what a tuner is judged on."""
