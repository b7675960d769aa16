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
    """Print rows with the keys of the first as columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
