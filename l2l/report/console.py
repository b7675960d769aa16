"""What a run shows: tables and progress bars in the terminal, pictures as PNG files; Lightning's messages are kept out."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import TypeAlias

from l2l.report.run_directory import write_whole


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's tips, device lists and dataloader hints; its errors and warnings of this package stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def progress_bar(label: str, total: int | None, done: int = 0, visible: bool = True) -> Iterator[Callable[[float], None]]:
    """A bar over ``total`` steps (None: unknown), ``done`` of them before; yields a function to call with each step's loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    loss, rate = TextColumn("loss {task.fields[loss]:.4f}"), TextColumn("{task.fields[rate]}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), loss, rate, TimeRemainingColumn()
    with Progress(*columns, disable=not visible, transient=False) as bar:
        task = bar.add_task(label, total=total, completed=done, loss=float("nan"), rate="")

        def advance(loss: float) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, advance=1, loss=loss, rate="" if speed is None else f"{speed:.1f} steps/s")

        yield advance


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds; the bare number where there is one."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows with the keys of the first as columns, or a single row name by name. Nothing is cut to fit."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        print(f"{title}: nothing")
        return
    single = len(rows) == 1
    table = Table(title=title, title_justify="left", show_header=not single)
    for name, value in [("", ""), ("", "")] if single else rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    lines: list[tuple[object, ...]] = list(rows[0].items()) if single else [tuple(row.values()) for row in rows]
    for line in lines:
        # Brackets in a text are no markup.
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else escape(str(cell)) for cell in line))
    width = Console(width=1000).measure(table).maximum
    Console(width=max(width, Console().width)).print(table)


Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points (x, y) in order."""


def smooth(curve: Curve, window: int = 25) -> list[tuple[float, float]]:
    """Running mean over the last ``window`` points."""
    values = [y for _, y in curve]
    means = (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))
    return [(x, sum(part) / len(part)) for (x, _), part in zip(curve, means, strict=True)]


def plot_panels(target: Path, panels: Mapping[str, Mapping[str, Curve]], x_label: str, y_label: str) -> Path:
    """One panel per entry of ``panels``, one line per entry of a panel; written whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for label, curve in curves.items():
            axis.plot([x for x, _ in curve], [y for _, y in curve], label=label, linewidth=1.5)
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
        if any(curves.values()):
            axis.legend(frameon=False, fontsize=8)
    try:
        return write_whole(target, lambda path: figure.savefig(path, dpi=120, format="png"))
    finally:
        pyplot.close(figure)
