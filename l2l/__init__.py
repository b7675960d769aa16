"""l2l: fine-tune language models with forward passes only, using an optimizer that was learned."""

from l2l.meta.run import meta_train
from l2l.models.load import load_model, load_tokenizer
from l2l.optim import DiZO, MeZO, ZOFineTuner, ZOOptimizer
from l2l.train.trainer import FineTuneResult, fine_tune
from l2l.tuners.api import Tuner

__version__ = "0.1.0"
__all__ = [
    "DiZO",
    "FineTuneResult",
    "MeZO",
    "Tuner",
    "ZOFineTuner",
    "ZOOptimizer",
    "fine_tune",
    "load_model",
    "load_tokenizer",
    "meta_train",
]
