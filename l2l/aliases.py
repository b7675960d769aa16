"""Old names of configuration keys, arguments and values: they keep working, with one line of warning each."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

KEYS = {
    "beta": "step_fraction",
    "beta_grid": "step_fraction_grid",
    "control": "curvature_lr",
    "control_every": "curvature_every",
    "draws": "num_directions",
    "normaliser": "normalizer",
    "save_model": "save",
    "turns": "block_schedule",
    "update": "rule",
    "validation_betas": "validation_step_fractions",
    "walk": "perturb",
}
"""Old key -> key. A method that has a field of the old name (momentum's ``beta``) keeps it."""

VALUES = {
    ("save", True): "both",
    ("save", False): "log",
    ("save", "true"): "both",
    ("save", "false"): "log",
    ("perturb", "exact"): "functional",
    ("objective", "published"): "one_step_loss",
    ("objective", "held_out"): "held_out_loss",
    ("objective", "unrolled"): "unrolled_loss",
    ("objective", "ratio"): "log_progress_rate",
    ("objective", "runs"): "es_full_run",
}
"""(key, old value) -> value."""


def renamed(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """``given`` under the names of today; each old one is warned of.

    Args:
        given: keys and values as a user wrote them.
        known: keys that are understood. A key in it is left alone, a key outside of it is looked up.

    Raises:
        ValueError: a key is given under both of its names.
    """
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = KEYS[key] if key not in known and KEYS.get(key) in known else key
        if name != key:
            if name in given:
                raise ValueError(f"{key!r} is the old name of {name!r}: give one of them")
            warnings.warn(f"{key!r} is now called {name!r}", FutureWarning, stacklevel=3)
        fresh = VALUES.get((name, value), value) if isinstance(value, str | bool) else value
        if fresh is not value and fresh != value:  # a NaN differs from itself
            warnings.warn(f"{name}={value!r} is now called {fresh!r}", FutureWarning, stacklevel=3)
        found[name] = fresh
    return found
