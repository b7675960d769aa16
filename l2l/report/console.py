"""What a run shows: tables and progress bars in the terminal, pictures as PNG files; Lightning's messages are kept out."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean, stdev
from threading import Event, Thread
from typing import Any, TypeAlias, final

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


Advance: TypeAlias = Callable[..., None]
"""``advance(amount=1, note="")``: so much of a phase was done; the note stands beside its bar."""


@final
class Bars:
    """Progress bars: one per phase while it lasts, with its own estimate of the time left, below one of the whole.

    ``with Bars("sst2", total) as bars, bars.phase("train", steps, cost) as advance: advance()``

    Args:
        label: of the whole; empty: phases alone are shown, and stay.
        total: cost of all phases, in any unit.
        done: of it, before; an interrupted run goes on.
        visible: False shows nothing.
    """

    def __init__(self, label: str = "", total: float = 0.0, done: float = 0.0, visible: bool = True) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}")
        self._bars = Progress(*columns, TimeRemainingColumn(), disable=not visible)
        self._whole = self._add(label, total, done) if label else None

    def _add(self, name: str, total: float, done: float) -> Any:
        return self._bars.add_task(name, total=total, completed=done, note="")  # pyright: ignore[reportArgumentType]  # any number

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None and self._whole is not None:  # phases that were not needed are done, too
            self._bars.update(self._whole, completed=self._bars.tasks[0].total)
        self._bars.stop()

    @contextmanager
    def phase(self, name: str, total: float, cost: float = 1.0, done: float = 0.0) -> Iterator[Advance]:
        """The bar of a phase of ``total`` units, ``done`` of them before; each costs ``cost`` of the whole. When the phase
        ends, however far it came, the whole stands where it was expected then. Phases may be nested."""
        task, whole = self._add(name, total, done), self._whole
        left = cost * (total - done)

        def advance(amount: float = 1.0, note: str = "") -> None:
            nonlocal left
            left -= cost * amount
            self._bars.update(task, advance=amount, note=note)
            if whole is not None:
                self._bars.update(whole, advance=cost * amount)

        yield advance
        if whole is not None:
            self._bars.update(whole, advance=left)
            self._bars.remove_task(task)

    def speed(self) -> float | None:
        """Units of the phase at work per second; None where it is not known yet."""
        return self._bars.tasks[-1].speed


@contextmanager
def progress_bar(label: str, total: int, done: int = 0, visible: bool = True) -> Iterator[Callable[[float], None]]:
    """A bar over ``total`` steps, ``done`` of them before; yields a function to call with the loss after each step."""
    count = done
    with Bars(visible=visible) as bars, bars.phase(label, total, done=done) as advance:

        def step(loss: float) -> None:
            nonlocal count
            count, speed = count + 1, bars.speed()
            advance(1, f"{count}/{total} loss {loss:.4f}" + ("" if speed is None else f" {speed:.1f} steps/s"))

        yield step


@contextmanager
def growing(folder: Path, advance: Advance) -> Iterator[None]:
    """Advance by the bytes that files below ``folder`` gain while the block runs."""
    ended = Event()

    def watch() -> None:
        seen = 0
        while not ended.wait(0.5):
            with suppress(OSError):  # a file was renamed meanwhile
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                advance(size - seen, f"{size / 1e6:,.0f} MB")
                seen = size

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


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
