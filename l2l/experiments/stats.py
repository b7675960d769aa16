"""Statistics of an experiment: pure functions of its runs.

Bootstrap intervals over cells and seeds, average ranks and wins, smoothed loss curves and the passes to a target loss, the
choice of a step size, and the rules by which docs/protocol.md judges tuners. A run that diverged has infinite losses.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, inf, isnan, nan
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
RANK_RESAMPLES = 2000
COVERAGE = 0.95
SEEDS = 3  # seeds that the protocol asks for; a table over fewer says so
CHANCE_MARGIN = 0.02  # an accuracy is above chance if it exceeds the share of the largest class by more than this
CEILING = 0.98  # where MeZO and the tuner both lie above this accuracy, there is nothing left to gain
WINDOW_SHARE = 0.1  # share of a run's passes over which losses of steps are averaged

Point: TypeAlias = Mapping[str, Any]
"""A choice of step size: ``lr``, or ``lr: auto`` with ``step_fraction``; and a control's alternative options."""
Curve: TypeAlias = Sequence[tuple[float, float]]  # points (forward passes spent, loss of the step that ended there), in order
Statistic: TypeAlias = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # [resamples, cells, seeds, columns] -> [resamples]
Losses: TypeAlias = NDArray[np.float64]  # [cells, seeds, methods] of final training loss


class Cell(NamedTuple):
    """A model under a tuning scheme on a task: where contenders are compared."""

    setting: str
    scheme: str
    task: str


@dataclass(frozen=True)
class Run:
    """The result of one run. One that diverged or was refused keeps the infinite losses of the defaults."""

    cell: Cell
    model: str
    contender: str
    role: str
    method: str
    tuner: str | None
    seed: int
    tuning: bool  # whether it served the choice of the step size; such runs are in no table
    point: Point
    passes: int = 0  # forward passes spent, probes and searches included
    steps: int = 0
    seconds: float = 0.0  # of training; evaluations are not counted
    initial_loss: float = inf
    train_loss: float = inf  # on the train sample, with the weights of the last step, as the next three
    dev_loss: float = inf
    test_loss: float = inf
    accuracy: float = 0.0  # on the test rows (token F1 for tasks that generate)
    best_dev_loss: float = inf  # the lowest of all evaluations
    best_accuracy: float = 0.0  # on the test rows, with the weights of lowest dev loss
    peak_bytes: int | None = None  # most memory in use by its process while it trained
    diverged: bool = False
    refused: str = ""  # why it did not run at all
    folder: str = ""
    curve: Curve = field(default=(), repr=False)  # loss of each step; read for runs of the table only

    @property
    def status(self) -> str:
        """``ok``, ``diverged`` or ``refused``."""
        return "refused" if self.refused else "diverged" if self.diverged else "ok"


@dataclass(frozen=True)
class RunTable:
    """The runs of a table, tuning runs left out, by cell and contender."""

    cells: Sequence[Cell]
    labels: Sequence[str]  # contenders, in the order in which they were named
    runs: Mapping[tuple[Cell, str], Sequence[Run]]
    """In the order of the seeds. A contender of which one seed was refused has none in that cell."""

    @staticmethod
    def of(runs: Sequence[Run], cells: Sequence[Cell], labels: Sequence[str]) -> "RunTable":
        """The table of the runs that are no tuning runs, by cell and contender, seeds ascending."""
        found: dict[tuple[Cell, str], list[Run]] = {}
        for run in sorted(runs, key=lambda run: run.seed):
            if not run.tuning:
                found.setdefault((run.cell, run.contender), []).append(run)
        return RunTable(cells, labels, {at: own for at, own in found.items() if not any(run.refused for run in own)})

    def values(self, label: str, quantity: str, cells: Sequence[Cell] | None = None) -> NDArray[np.float64]:
        """[cells, seeds] of a quantity of a contender, over all cells or those given; ValueError where seeds are missing."""
        cells = self.cells if cells is None else cells
        found = [[float(getattr(run, quantity)) for run in self.runs.get((cell, label), ())] for cell in cells]
        if len({len(row) for row in found}) != 1 or not found[0]:
            raise ValueError(f"contender {label!r} has {[len(row) for row in found]} runs on the cells {list(cells)}")
        return np.array(found)

    def columns(self, labels: Sequence[str], quantity: str = "train_loss", cells: Any = None) -> NDArray[np.float64]:
        """[cells, seeds, contenders] of a quantity."""
        return np.stack([self.values(label, quantity, cells) for label in labels], -1)

    @property
    def everywhere(self) -> list[str]:
        """Contenders that ran in every cell: those that are ranked."""
        return [label for label in self.labels if all((cell, label) in self.runs for cell in self.cells)]

    @property
    def losses(self) -> Losses:
        """Final training losses of the contenders that ran everywhere."""
        return self.columns(self.everywhere)

    @property
    def ordered(self) -> list[str]:
        """Contenders by average rank; then those that did not run everywhere."""
        first = by_rank(self.everywhere, self.losses) if self.everywhere else []
        return first + [label for label in self.labels if label not in first]

    @property
    def places(self) -> "dict[str, RunTable]":
        """The table of each model and scheme, by their names."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(f"{cell.setting}, {cell.scheme}", []).append(cell)
        return {name: RunTable(cells, self.labels, self.runs) for name, cells in found.items()}

    def all_of(self, label: str) -> list[Run]:
        """The runs of a contender over all cells."""
        return [run for cell in self.cells for run in self.runs.get((cell, label), ())]


def estimate(table: NDArray[np.float64], statistic: Statistic) -> float:
    """The statistic of a table [cells, seeds, columns]."""
    with np.errstate(invalid="ignore"):  # the difference of two runs that both diverged is not a number, and stays so
        return float(statistic(table[None])[0])


def interval(
    table: NDArray[np.float64], statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of [cells, seeds, columns], paired over the columns.

    Cells are drawn with replacement, then seeds within each cell drawn; all columns of a drawn run come along. Where the
    percentiles leave out the estimate itself, the interval is widened to contain it.
    """
    cells, seeds, _ = table.shape
    generator = np.random.default_rng(seed)
    rows = generator.integers(cells, size=(resamples, cells, 1))
    columns = generator.integers(seeds, size=(resamples, cells, seeds))
    with np.errstate(invalid="ignore"):
        found = np.sort(statistic(table[rows, columns]))
    center = estimate(table, statistic)
    # Order statistics, not interpolation: between a finite value and infinity there is nothing to interpolate.
    low, high = found[int((1 - COVERAGE) / 2 * resamples)], found[int((1 + COVERAGE) / 2 * resamples) - 1]
    return float(np.fmin(low, center)), float(np.fmax(high, center))


def win_rate(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of (cell, other) in which column 0 has the lower mean over the seeds; the others are the further columns."""
    means = table.mean(2)
    return (means[..., :1] < means[..., 1:]).mean((1, 2))


def mean_difference(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over cells and seeds of column 0 less column 1."""
    return (table[..., 0] - table[..., 1]).mean((1, 2))


def median_ratio(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of column 0 over cells and seeds."""
    return np.median(table[..., 0].reshape(len(table), -1), axis=1)


def rank_of(means: NDArray[np.float64], column: int) -> NDArray[np.float64]:
    """Rank of a column along the last axis: 1 for the lowest; ties share the mean of their ranks."""
    own = means[..., column : column + 1]
    return 1 + (means < own).sum(-1) + ((means == own).sum(-1) - 1) / 2


def average_ranks(losses: Losses) -> list[float]:
    """Per method, the mean over cells of its rank by the mean loss over the seeds."""
    means = losses.mean(1)
    return [float(rank_of(means, column).mean()) for column in range(losses.shape[-1])]


def ranks_by_label(runs: RunTable) -> dict[str, float]:
    """The average rank of each contender that ran everywhere."""
    return dict(zip(runs.everywhere, average_ranks(runs.losses), strict=True)) if runs.everywhere else {}


def rank_intervals(losses: Losses, resamples: int = RANK_RESAMPLES) -> list[tuple[float, float]]:
    """Per method, the 95 % interval of its average rank over draws of cells, and of seeds within them."""
    statistics = (lambda table, column=column: rank_of(table.mean(2), column).mean(1) for column in range(losses.shape[-1]))
    return [interval(losses, statistic, resamples) for statistic in statistics]


def wins(losses: Losses) -> NDArray[np.int64]:
    """[methods, methods]: on how many cells the row's mean loss over the seeds is below the column's; a tie is no win."""
    means = losses.mean(1)
    return (means[:, :, None] < means[:, None, :]).sum(0)


def win_shares(losses: Losses) -> list[list[float]]:
    """:func:`wins` as shares of the cells."""
    return (wins(losses) / len(losses)).tolist()


def by_rank(labels: Sequence[str], losses: Losses) -> list[str]:
    """The labels by average rank, the best first; ties keep their order."""
    ranks = average_ranks(losses)
    return [labels[place] for place in sorted(range(len(labels)), key=lambda place: ranks[place])]


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


def pass_ratios(table: RunTable, contender: str, baseline: str) -> NDArray[np.float64]:
    """[cells, seeds]: passes to the baseline's final smoothed loss, over the passes that the baseline took to it.

    Compares runs of equal seed. Infinity where it is never reached; not a number where the baseline diverged.
    """

    def ratio(mine: Run, base: Run) -> float:
        window = WINDOW_SHARE * base.passes
        path = smoothed(base.curve, window)
        if base.diverged or not path:
            return nan
        return inf if mine.diverged else passes_to(mine.curve, path[-1][1], window) / passes_to(base.curve, path[-1][1], window)

    pairs = ((table.runs[cell, contender], table.runs[cell, baseline]) for cell in table.cells)
    return np.array([[ratio(*runs) for runs in zip(*own, strict=True)] for own in pairs], dtype=np.float64)


def point_size(point: Point) -> float:
    """The learning rate of a point, or step_fraction where the learning rate is ``auto``."""
    return float(point["step_fraction"] if point["lr"] == "auto" else point["lr"])


def choose(runs: Sequence[Run]) -> Point:
    """The point of lowest dev loss (infinite where it is no number); of ties the lowest learning rate, then the first."""
    if not runs:
        raise ValueError("no tuning run tells of a step size")
    return min(runs, key=lambda run: (inf if isnan(run.dev_loss) else run.dev_loss, point_size(run.point))).point


def at_edge(point: Point, grid: Sequence[float]) -> bool:
    """Whether a point is the first or last of a grid of several: a better one may lie beyond."""
    return len(grid) > 1 and point_size(point) in (min(grid), max(grid))


def accuracy_counts(mezo: float, tuner: float, majority: float) -> Literal["counted", "chance", "ceiling"]:
    """Whether a pair enters the mean accuracy gain: not at chance, not at the ceiling.

    At chance: MeZO's mean accuracy over the seeds is not more than :data:`CHANCE_MARGIN` above that of the best constant
    answer, so that a difference to it is mostly noise. A tuner that falls to chance where MeZO does not is counted: that
    is a loss. At the ceiling: both lie above :data:`CEILING`.
    """
    if mezo <= majority + CHANCE_MARGIN:
        return "chance"
    return "ceiling" if min(mezo, tuner) > CEILING else "counted"


def majority_share(golds: Sequence[Sequence[int]]) -> float:
    """Accuracy of the best constant answer: the largest share of rows that accept one option as right."""
    options = {option for gold in golds for option in gold}
    return max((sum(option in gold for gold in golds) / len(golds) for option in options), default=0.0)
