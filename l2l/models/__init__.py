"""Loading models and tokenizers, tiny random models, and log-probabilities at chosen positions."""

from l2l.models.batching import Grouping
from l2l.models.heads import Part, compile_decoder, generator, token_logprobs, uncompiled
from l2l.models.kinds import Head, auto_class, kind_of_config

__all__ = [
    "Grouping",
    "Head",
    "Part",
    "auto_class",
    "compile_decoder",
    "generator",
    "kind_of_config",
    "token_logprobs",
    "uncompiled",
]
