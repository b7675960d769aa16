"""What a task is: rows, prompt, options or answer, loss form and metric, in one value.

A task file defines one constant ``TASK``; its file name is its name on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Split: TypeAlias = Literal["train", "validation"]


@dataclass(frozen=True)
class Example:
    """One row, rendered. Prompt and option are joined as they stand: an option brings its own leading space."""

    prompt: str
    options: tuple[str, ...]
    """Candidate continuations. A generation task has one: the answer to learn."""
    gold: tuple[int, ...] = (0,)
    """Indices of the correct options; the first is the one trained on."""
    answers: tuple[str, ...] = ()
    """Reference answers of a generation task; empty where options are scored."""


@dataclass(frozen=True)
class HubData:
    """A data set of the hub, read with ``datasets`` or from ``<data_dir>/<task>/<split>.jsonl``."""

    path: str
    name: str | None = None
    splits: tuple[str, str] = ("train", "validation")
    """Names of the hub's splits that serve as train and validation."""


@dataclass(frozen=True)
class WorldData:
    """Rows that the package generates itself: a pure function of (split, row count, seed)."""

    generate: Callable[[Split, int, int], list[dict[str, Any]]]


@dataclass(frozen=True)
class Task:
    """A task: where its rows come from and how a row becomes text, a loss and a score."""

    name: str
    source: HubData | WorldData
    fields: tuple[str, ...]
    """Columns that a row must have."""
    example: Callable[[Row], Example]
    form: Literal["classification", "lm"] = "classification"
    """``classification``: cross entropy over mean option log-probabilities. ``lm``: cross entropy on the gold tokens."""
    metric: Literal["accuracy", "f1"] = "accuracy"
    """``accuracy`` of the best scored option, or token ``f1`` of a generated answer."""
    version: int = 1
    """Raised when prompt, options or metric change, so that figures stay comparable."""
