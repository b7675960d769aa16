"""A verdict for the eye: tables in the terminal, loss curves, and who beats whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l2l.experiments.stats import WINDOW_SHARE, Pair, Point, Run, mean_by_x, point_size, smoothed
from l2l.experiments.verdict import VerdictField
from l2l.report.console import print_table, spread
from l2l.report.files import write_whole
from l2l.report.plots import plot_panels

HEADLINES = {
    "win_rate_over_mezo": "lower training loss than MeZO",
    "win_rate_over_dizo": "lower training loss than DiZO",
    "win_rate_over_controls": "lower training loss than a control",
    "lowest_win_rate_over_a_control": "than the control hardest to beat",
    "median_pass_ratio_to_mezo_loss": "passes to MeZO's loss, over MeZO's",
    "mean_loss_difference_to_mezo": "training loss less MeZO's (nats)",
    "mean_accuracy_gain": "accuracy gain over MeZO (points)",
}


def print_tables(field: VerdictField, points: Mapping[tuple[str, str, str], Point], verdict: Mapping[str, Any]) -> None:
    """A table per setting, and the figures of each tuner with their intervals."""
    for setting in dict.fromkeys(pair[0] for pair in field.pairs):
        print_table(f"{setting}: mean ± standard deviation over seeds", table(field.within(setting), points))
    rows = [{"over all pairs": text} | _headline(verdict["by_tuner"], name) for name, text in HEADLINES.items()]
    print_table("tuners, with 95 % intervals over pairs and seeds", rows)
    for line in verdict["departures"]:
        print(f"not the protocol: {line}")


def table(field: VerdictField, points: Mapping[tuple[str, str, str], Point]) -> list[dict[str, str]]:
    """A row per pair and contender."""
    rows = []
    for pair in field.pairs:
        for label in field.roles:
            point = points[*pair, label]
            rows.append({"task": pair[1], "contender": label, "step size": named(point)} | _figures(field, label, pair))
    return rows


def _figures(field: VerdictField, label: str, pair: Pair) -> dict[str, str]:
    def over_seeds(quantity: str) -> str:
        return spread(field.of(label, quantity, [pair])[0].tolist())

    return {
        "train loss": over_seeds("train_loss"),
        "dev loss": over_seeds("dev_loss"),
        "accuracy": over_seeds("accuracy"),
        "passes": f"{field.of(label, 'passes', [pair]).mean():.0f}",
    }


def named(point: Point) -> str:
    """A point in a word: ``lr 0.0001``, ``beta 0.1``, ``cosine lr 0.0003``."""
    more = [str(value) for name, value in point.items() if name not in ("lr", "step_fraction")]
    return " ".join([*more, "step_fraction" if point["lr"] == "auto" else "lr", f"{point_size(point):g}"])


def _headline(tuners: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, str]:
    return {label: _with_interval(found[name], found["intervals"].get(name)) for label, found in tuners.items()}


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if interval is None else f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


def draw(folder: Path, field: VerdictField, matrix: Sequence[Sequence[float]]) -> None:
    """``losses-<setting>.png``, a panel per task; and ``wins.png``."""
    for setting in dict.fromkeys(pair[0] for pair in field.pairs):
        panels = {pair[1]: curves(field, pair) for pair in field.within(setting).pairs}
        plot_panels(folder / f"losses-{setting}.png", panels, "forward passes", "loss of steps (nats), mean over seeds")
    plot_matrix(folder / "wins.png", list(field.roles), matrix)


def curves(field: VerdictField, pair: Pair) -> dict[str, list[tuple[float, float]]]:
    """Contender -> smoothed loss against forward passes, mean over seeds."""
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in field.roles}
    for run in field.runs:
        if run.pair == pair and not run.tuning and run.contender in found:
            found[run.contender] += _smooth(run)
    return {label: mean_by_x(points) for label, points in found.items()}


def _smooth(run: Run) -> list[tuple[float, float]]:
    return smoothed(run.curve, WINDOW_SHARE * run.passes)


def plot_matrix(target: Path, labels: Sequence[str], matrix: Sequence[Sequence[float]]) -> Path:
    """Heat map: the share of pairs on which the row's contender ends below the column's; written whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 3 + 0.55 * len(labels)
    figure, axis = pyplot.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="RdYlGn")
    axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_title("share of pairs on which the row ends with the lower training loss", fontsize=9)
    for row, shares in enumerate(matrix):
        for column, share in enumerate(shares):
            if row != column:
                axis.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=axis, shrink=0.7)
    try:
        return write_whole(target, lambda path: figure.savefig(path, dpi=120, format="png"))
    finally:
        pyplot.close(figure)
