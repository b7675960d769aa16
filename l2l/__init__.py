"""l2l: fine-tune language models with forward passes only, using an optimizer that was learned.

Besides the names imported here, every zeroth-order method is here as a torch optimizer (``l2l.MeZO``, ``l2l.FZOO``, ...): see
:mod:`l2l.optimizers`, which is imported when the first one is asked for. ``dir(l2l)`` lists them.
"""

from typing import Any

from l2l.meta.run import meta_train as meta_train
from l2l.models.load import load_tokenizer as load_tokenizer
from l2l.optim import ZOOptimizer as ZOOptimizer
from l2l.train.replay import load_model as load_model
from l2l.train.trainer import FineTuneResult as FineTuneResult
from l2l.train.trainer import fine_tune as fine_tune
from l2l.tuners.api import Tuner as Tuner

__version__ = "0.1.0"

_IMPORTED = ("FineTuneResult", "Tuner", "ZOOptimizer", "fine_tune", "load_model", "load_tokenizer", "meta_train")


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from l2l.optimizers import optimizer, optimizer_names

    return sorted([*_IMPORTED, *optimizer_names()]) if name == "__all__" else optimizer(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
