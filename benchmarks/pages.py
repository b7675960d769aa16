"""Results of the benchmark scripts as rows, tables and pages of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2l.tools.bench import FORWARDS, GIB, STEP, TEXTBOOK


def row(found: Mapping[str, Any]) -> dict[str, str]:
    """A result of :func:`l2l.tools.bench.measure` as a row of a Markdown table. Memory in GiB."""
    seconds, peak = found["seconds"], found["peak_bytes"]
    shown = {
        "shape": found["shape"],
        "dtype": found["dtype"],
        "threads": found["threads"],
        "backend": found["backend"],
        "two forwards, s": seconds[FORWARDS],
        "step, s": seconds[STEP],
        "textbook, s": seconds.get(TEXTBOOK),
        "step / two forwards": found["step_over_two_forwards"],
        "plain step / two forwards": found["plain_step_over_two_forwards"],
        "textbook / step": found["reference_over_ours"],
        "learned / MeZO": found["learned_over_mezo"],
        "tokens/s": found["tokens_per_second"],
        "peak, forward": peak[FORWARDS] / GIB,
        "peak, step": peak[STEP] / GIB,
        "peak, textbook": peak[TEXTBOOK] / GIB if TEXTBOOK in peak else None,
        "peak step / forward": found["peak_over_inference"],
        "restored bit for bit": found["restore_bit_identical"],
    }
    return {name: cell(value) for name, value in shown.items()}


def cell(value: object) -> str:
    """A value as a cell: four digits, yes or no, a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the keys of the first as columns; a row may lack some."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row.get(name, "-") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(title: str, machine: Mapping[str, Any], command: str, parts: Sequence[str]) -> str:
    """A dated page: hardware, versions, the command that made it, then its parts.

    Args:
        machine: what :func:`l2l.tools.bench.hardware` returns.
    """
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = "unknown" if machine["load_average"] is None else f"{machine['load_average']:.2f}"
    noisy = " **The machine was busy: times are noisy.**" if machine["noisy"] else ""
    facts = f"{machine['cpu']}, {machine['cores']} cores, load {load}, {machine['gpu'] or 'no GPU'}; {versions}.{noisy}"
    return "\n\n".join([f"# {machine['date']}: {title}", facts, f"`{command}`", *parts]) + "\n"
