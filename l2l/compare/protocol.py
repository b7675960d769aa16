"""The rules by which tuners are judged: pure functions over runs. In words: docs/protocol.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isnan
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from l2l.compare.curves import Curve, passes_to, smoothed

Pair: TypeAlias = tuple[str, str]
"""(setting, held-out task): a model on a task."""
Point: TypeAlias = Mapping[str, Any]
"""What was chosen among: ``lr``, or ``lr: auto`` with ``beta``, and a control's further options."""

SEEDS = 3
"""Seeds that the protocol asks for; a table over fewer says so."""
CHANCE_MARGIN = 0.02
"""So far above the share of the largest class an accuracy must lie to be more than chance."""
CEILING = 0.98
"""Where MeZO and the tuner both lie above this accuracy, there is nothing left to gain."""
WINDOW_SHARE = 0.1
"""Share of a run's passes over which the losses of steps are averaged to say when a target was reached."""


@dataclass(frozen=True)
class Run:
    """One run, as the protocol sees it. A run that diverged has infinite losses: it loses to every other."""

    setting: str
    model: str
    task: str
    contender: str
    role: str
    seed: int
    tuning: bool
    """Whether it served the choice of the learning rate; such runs are in no table."""
    point: Point
    passes: int = 0
    """Forward passes spent, probes and searches included."""
    steps: int = 0
    seconds: float = 0.0
    initial_loss: float = inf
    train_loss: float = inf
    """On the train sample, with the weights of the last step."""
    dev_loss: float = inf
    """With the weights of the last step."""
    test_loss: float = inf
    """With the weights of the last step."""
    accuracy: float = 0.0
    """On the test rows, with the weights of the last step (token F1 for tasks that generate)."""
    best_dev_loss: float = inf
    """The lowest that was seen."""
    best_accuracy: float = 0.0
    """On the test rows, with the weights of lowest dev loss."""
    diverged: bool = False
    folder: str = ""
    curve: Curve = field(default=(), repr=False)
    """Two-point loss of each step against passes spent."""

    @property
    def pair(self) -> Pair:
        """The pair it belongs to."""
        return self.setting, self.task


def point_size(point: Point) -> float:
    """The learning rate of a point, or beta where the learning rate is ``auto``."""
    return float(point["beta"] if point["lr"] == "auto" else point["lr"])


def choose(runs: Sequence[Run]) -> Point:
    """The point of lowest dev loss; of points that tie, the one of the lowest learning rate, then the first.

    A loss that is not a number counts as infinite.
    """
    if not runs:
        raise ValueError("there is nothing to choose from: no tuning run")
    return min(runs, key=lambda run: (inf if isnan(run.dev_loss) else run.dev_loss, point_size(run.point))).point


def at_edge(point: Point, grid: Sequence[float]) -> bool:
    """Whether a point lies at the end of a grid of several: a better one may lie beyond."""
    return len(grid) > 1 and point_size(point) in (min(grid), max(grid))


def values(runs: Sequence[Run], contender: str, pairs: Sequence[Pair], quantity: str) -> NDArray[np.float64]:
    """[pairs, seeds] of one quantity of a contender's runs in the table, seeds in order.

    Raises:
        ValueError: the pairs do not have the same number of seeds.
    """
    found = [
        [float(getattr(run, quantity)) for run in sorted(_of(runs, contender, pair), key=lambda run: run.seed)]
        for pair in pairs
    ]
    if len({len(row) for row in found}) != 1 or not found[0]:
        raise ValueError(f"contender {contender!r} has {[len(row) for row in found]} runs on the pairs {list(pairs)}")
    return np.array(found)


def _of(runs: Sequence[Run], contender: str, pair: Pair) -> list[Run]:
    return [run for run in runs if run.contender == contender and run.pair == pair and not run.tuning]


def beats(mine: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the mean final training loss over the seeds (the last axis) is lower; a tie is not a win."""
    return mine.mean(-1) < other.mean(-1)


def pass_ratios(
    runs: Sequence[Run], contender: str, baseline: str, pairs: Sequence[Pair], window_share: float = WINDOW_SHARE
) -> NDArray[np.float64]:
    """[pairs, seeds]: passes to the baseline's final smoothed loss, over the passes that the baseline took to it.

    Runs of equal seed are held against each other. Infinity where a contender never got there; not a number where the
    baseline itself diverged and there is no target.
    """
    table = []
    for pair in pairs:
        theirs = {run.seed: run for run in _of(runs, baseline, pair)}
        mine = sorted(_of(runs, contender, pair), key=lambda run: run.seed)
        table.append([_ratio(run, theirs[run.seed], window_share) for run in mine])
    return np.array(table, dtype=np.float64)


def _ratio(mine: Run, theirs: Run, window_share: float) -> float:
    window = window_share * theirs.passes
    path = smoothed(theirs.curve, window)
    if theirs.diverged or not path:
        return float("nan")
    target = path[-1][1]
    return inf if mine.diverged else passes_to(mine.curve, target, window) / passes_to(theirs.curve, target, window)


def accuracy_counts(mezo: float, tuner: float, majority: float) -> Literal["counted", "chance", "ceiling"]:
    """Whether a pair enters the mean accuracy gain: not at chance, not at the ceiling.

    At chance: MeZO's mean accuracy over the seeds is not more than :data:`CHANCE_MARGIN` above what the best constant
    answer gets, so that a difference to it is mostly noise. A tuner that falls to chance where MeZO does not is counted:
    that is a loss. At the ceiling: both lie above :data:`CEILING`.
    """
    if mezo <= majority + CHANCE_MARGIN:
        return "chance"
    return "ceiling" if min(mezo, tuner) > CEILING else "counted"


def majority_share(golds: Sequence[Sequence[int]]) -> float:
    """Accuracy of the best constant answer: the largest share of rows of which one option is among the right ones."""
    options = {option for gold in golds for option in gold}
    return max((sum(option in gold for gold in golds) / len(golds) for option in options), default=0.0)
