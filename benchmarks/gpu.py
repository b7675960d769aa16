"""Steps of large models on CUDA beside the textbook loop, with peak memory: prints and writes Markdown.

Without CUDA it measures small shapes on the CPU, so that the script is known to run, and its page says that the GPU
figures are missing.

python benchmarks/gpu.py --help
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from pathlib import Path

import torch
from pages import cell, document, markdown_table, row

from l2l.report.run_directory import write_whole
from l2l.tools.bench import BenchConfig, hardware, measure
from l2l.tools.doctor import equals_reference

LARGE = ["opt-1.3b-shape", "opt-2.7b-shape", "opt-13b-shape", "opt-30b-shape"]
SMALL = ["opt-tiny-shape"]
MISSING = "**GPU figures are missing**: no CUDA device was found, so small shapes were measured on the CPU instead."
NOTE = (
    "Random weights. Medians over rounds in which every kind of step takes its turn. Loss over all tokens of "
    "{batch}x{length}. Peak memory in GiB, weights counted, interpreter and libraries not."
)


def parser() -> argparse.ArgumentParser:
    """What the script is told."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shapes", nargs="+", help="default: four large ones on CUDA, a small one without")
    options.add_argument("--dtype", default="bf16")
    options.add_argument("--update", default="auto", choices=("auto", "master", "stochastic"))
    options.add_argument("--batch_size", type=int, default=16)
    options.add_argument("--length", type=int, default=64)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--out", help="Markdown file; default: docs/results/<date>-gpu.md")
    return options


def measured(config: BenchConfig) -> dict[str, str]:
    """A row of the table; of a shape that does not fit, its name and the reason."""
    try:
        found = row(measure(config))
    except torch.OutOfMemoryError:
        found = {"shape": config.model, "dtype": config.dtype, "two forwards, s": "out of memory"}
    gc.collect()
    if config.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def exactness(device: str) -> str:
    """Whether the noise there has the bits of the specification on the CPU."""
    exact = {"fp32": torch.float32, "bf16": torch.bfloat16}
    answers = [f"{name} {cell(equals_reference(device, dtype))}" for name, dtype in exact.items()]
    return f"Noise on {device} equals the specification on the CPU bit for bit: {', '.join(answers)}."


def main() -> None:
    """Measure every shape."""
    given = parser().parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    machine = hardware()
    configs = [
        BenchConfig(
            model=shape,
            dtype=given.dtype,
            device=device,
            batch_size=given.batch_size,
            length=given.length,
            repeats=given.repeats,
            update=given.update,
            progress=sys.stderr.isatty(),
        )
        for shape in given.shapes or (LARGE if cuda else SMALL)
    ]
    rows = sorted((measured(config) for config in configs), key=len, reverse=True)  # the whole ones name the columns
    note = NOTE.format(batch=given.batch_size, length=given.length)
    parts = [*([] if cuda else [MISSING]), markdown_table(rows), exactness(device), note]
    command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    page = document("a step of large models", machine, command, parts)
    target = Path(given.out or f"docs/results/{machine['date']}-gpu.md")
    write_whole(target, lambda path: path.write_text(page))
    print(page)


if __name__ == "__main__":
    main()
