"""A progress bar with loss, steps per second and time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
