"""Tables in the terminal, and progress bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev


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
