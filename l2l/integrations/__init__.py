"""l2l where people already train: transformers' ``Trainer`` and TRL's. Each name is imported when it is asked for.

``ZOArguments``, ``ZOTrainerMixin`` and ``ZOTrainer`` need accelerate (``pip install 'l2l[trainer]'``), ``ZOSFTTrainer`` needs
TRL (``pip install 'l2l[trl]'``). See :mod:`l2l.integrations.trainer`.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2l.integrations.trainer import ZOArguments as ZOArguments
    from l2l.integrations.trainer import ZOTrainer as ZOTrainer
    from l2l.integrations.trainer import ZOTrainerMixin as ZOTrainerMixin
    from l2l.integrations.trl import ZOSFTTrainer as ZOSFTTrainer

__all__ = ["ZOArguments", "ZOSFTTrainer", "ZOTrainer", "ZOTrainerMixin"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, extra = ("trl", "trl") if name == "ZOSFTTrainer" else ("accelerate", "trainer")
    if find_spec(package) is None:
        raise ImportError(f"l2l.integrations.{name} needs {package}, which is not installed: pip install 'l2l[{extra}]'")
    if package == "trl":
        from l2l.integrations import trl

        return getattr(trl, name)
    from l2l.integrations import trainer

    return getattr(trainer, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
