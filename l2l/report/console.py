"""Keep a library's advice out of a run's output; errors and warnings of ours stay.

A progress bar with loss, steps per second and time left.

Tables in the terminal, and progress bars.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean, stdev


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """No tips, device lists and dataloader hints of Lightning inside: the project's own bar and logs say what happens."""
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
def progress_bar(label: str, total: int, done: int = 0, visible: bool = True) -> Iterator[Callable[[float], None]]:
    """A bar over ``total`` steps of which ``done`` lie behind; call what it yields with the loss after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
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
    from rich.table import Table

    if not rows:
        print(f"{title}: nothing")
        return
    table = Table(title=title, title_justify="left", show_header=len(rows) > 1)
    if len(rows) == 1:
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        for name, value in rows[0].items():
            table.add_row(name, _text(value))
    else:
        for name in rows[0]:
            table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(_text(value) for value in row.values()))
    width = Console(width=1000).measure(table).maximum
    Console(width=max(width, Console().width)).print(table)


def _text(value: object) -> str:
    """As it stands: brackets are no markup."""
    from rich.markup import escape

    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
