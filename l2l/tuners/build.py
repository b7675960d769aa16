"""From the name of an architecture to its network."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from l2l.tuners.base import TunerNetwork


def build_network(architecture: str, args: dict[str, Any]) -> TunerNetwork:
    """The network of a module of ``l2l.tuners``. Only names inside this package are ever imported.

    Raises:
        ValueError: no such architecture.
    """
    if not architecture.isidentifier():
        raise ValueError(f"tuner architecture {architecture!r} is not a module name of l2l.tuners")
    try:
        network = import_module(f"l2l.tuners.{architecture}").NETWORK
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"unknown tuner architecture {architecture!r}: l2l.tuners has no such network") from error
    return network(**args)
