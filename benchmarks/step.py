"""A step beside its two forwards and the textbook loop, by dtype and number of threads: prints and writes Markdown.

python benchmarks/step.py --help
"""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import product
from pathlib import Path
from typing import Any

from pages import document, markdown_table, row

from l2l.report.run_directory import write_whole
from l2l.tools.bench import BenchConfig, hardware, measure

NOTE = (
    "Medians over rounds in which every kind of step takes its turn. Loss over all tokens of {batch}x{length}. Peak "
    "memory in GiB, weights counted, interpreter and libraries not."
)


def parser() -> argparse.ArgumentParser:
    """What the script is told."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="opt-125m-shape")
    options.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    options.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--length", type=int, default=64)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--out", help="Markdown file; default: docs/results/<date>-step.md")
    return options


def main() -> None:
    """Measure every dtype with every number of threads."""
    given = parser().parse_args()
    machine = hardware()
    sizes: dict[str, Any] = {name: getattr(given, name) for name in ("model", "batch_size", "length", "repeats")}
    configs = [
        BenchConfig(**sizes, dtype=dtype, threads=threads, progress=sys.stderr.isatty())
        for dtype, threads in product(given.dtypes, given.threads)
    ]
    table = markdown_table([row(measure(config)) for config in configs])
    note = NOTE.format(batch=given.batch_size, length=given.length)
    command = shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]])
    page = document("a step, its two forwards and the textbook loop", machine, command, [table, note])
    target = Path(given.out or f"docs/results/{machine['date']}-step.md")
    write_whole(target, lambda path: path.write_text(page))
    print(page)


if __name__ == "__main__":
    main()
