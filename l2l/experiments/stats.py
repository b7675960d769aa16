"""Intervals by resampling pairs, and seeds within them: what another draw of tasks and seeds might have shown.

Loss curves against forward passes: smoothing, and when a target was reached.

Ranks and wins over the cells of a comparison: pure functions of losses. Infinite: the run diverged, and loses.

The rules by which tuners are judged: pure functions over runs. In words: docs/protocol.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, inf, isnan
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
COVERAGE = 0.95
SEED = 0

Statistic: TypeAlias = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""[resamples, pairs, seeds, columns] -> [resamples]."""


def estimate(table: NDArray[np.float64], statistic: Statistic) -> float:
    """The statistic of the table as it is, [pairs, seeds, columns]."""
    with np.errstate(invalid="ignore"):  # the difference of two runs that both diverged is not a number, and stays so
        return float(statistic(table[None])[0])


def interval(
    table: NDArray[np.float64], statistic: Statistic, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """Percentile interval of a statistic of [pairs, seeds, columns], paired over the columns.

    Pairs are drawn with replacement, then seeds within each pair drawn; all columns (contenders) of a drawn run come
    along. Where the percentiles leave out the estimate itself, the interval is widened to hold it.
    """
    pairs, seeds, _ = table.shape
    generator = np.random.default_rng(seed)
    rows = generator.integers(pairs, size=(resamples, pairs, 1))
    columns = generator.integers(seeds, size=(resamples, pairs, seeds))
    with np.errstate(invalid="ignore"):
        found = np.sort(statistic(table[rows, columns]))
    centre = estimate(table, statistic)
    # Ranks, not interpolation: between a finite value and infinity there is nothing to interpolate.
    low, high = found[int((1 - COVERAGE) / 2 * resamples)], found[int((1 + COVERAGE) / 2 * resamples) - 1]
    return float(np.fmin(low, centre)), float(np.fmax(high, centre))


def win_rate(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of (pair, other) in which column 0 has the lower mean over the seeds; the others are the further columns."""
    means = table.mean(2)
    return (means[..., :1] < means[..., 1:]).mean((1, 2))


def mean_difference(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over pairs and seeds of column 0 less column 1."""
    return (table[..., 0] - table[..., 1]).mean((1, 2))


def median_ratio(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of column 0 over pairs and seeds."""
    return np.median(table[..., 0].reshape(len(table), -1), axis=1)


Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points (forward passes spent, two-point loss of the step that ended there), in order."""


def smoothed(curve: Curve, window: float) -> list[tuple[float, float]]:
    """Running mean of the losses over the last ``window`` passes, from where that many have been spent."""
    recent: deque[tuple[float, float]] = deque()
    means = []
    for passes, loss in curve:
        recent.append((passes, loss))
        while recent[0][0] <= passes - window:
            recent.popleft()
        if passes >= window:
            means.append((passes, fsum(value for _, value in recent) / len(recent)))
    return means


def passes_to(curve: Curve, target: float, window: float) -> float:
    """Forward passes after which the smoothed loss is at or below ``target`` for the first time; infinity if never."""
    return next((passes for passes, loss in smoothed(curve, window) if loss <= target), inf)


def mean_by_x(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean y of each x, in the order of x."""
    values: dict[float, list[float]] = {}
    for x, y in points:
        values.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(values.items())]


RANK_RESAMPLES = 2000

Losses = NDArray[np.float64]
"""[cells, seeds, methods] of final training loss; resampled ones have a further axis in front."""


def rank_of(means: NDArray[np.float64], column: int) -> NDArray[np.float64]:
    """Rank of a column along the last axis: 1 for the lowest; those that tie share the mean of their ranks."""
    own = means[..., column : column + 1]
    return 1 + (means < own).sum(-1) + ((means == own).sum(-1) - 1) / 2


def average_ranks(losses: Losses) -> list[float]:
    """Per method, the mean over cells of its rank by the mean loss over the seeds."""
    means = losses.mean(1)
    return [float(rank_of(means, column).mean()) for column in range(losses.shape[-1])]


def rank_intervals(losses: Losses, resamples: int = RANK_RESAMPLES) -> list[tuple[float, float]]:
    """Per method, the 95 % interval of its average rank over draws of cells, and of seeds within them."""

    def statistic(column: int):
        return lambda table: rank_of(table.mean(2), column).mean(1)

    return [interval(losses, statistic(column), resamples) for column in range(losses.shape[-1])]


def wins(losses: Losses) -> NDArray[np.int64]:
    """[methods, methods]: on how many cells the row's mean loss over the seeds is below the column's; a tie is no win."""
    means = losses.mean(1)
    return (means[:, :, None] < means[:, None, :]).sum(0)


def win_shares(losses: Losses) -> list[list[float]]:
    """:func:`wins` as shares of the cells."""
    return (wins(losses) / len(losses)).tolist()


def by_rank(labels: Sequence[str], losses: Losses) -> list[str]:
    """The labels by average rank, the best first; those that tie stay in order."""
    ranks = average_ranks(losses)
    return [labels[place] for place in sorted(range(len(labels)), key=lambda place: ranks[place])]


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
    return float(point["step_fraction"] if point["lr"] == "auto" else point["lr"])


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
