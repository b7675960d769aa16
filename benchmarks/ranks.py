"""Steps per second of 1, 2 and 4 processes that share a run, beside each other: scaling of data and population parallel.

Runs alternate, so that whatever else the machine does falls on all of them, and medians are printed with the load. Each run is
``l2l fine-tune`` of the embedded model; its time per step is that of ``metrics.csv`` between the first steps, in which ranks
come together, and the last.

python benchmarks/ranks.py --sizes 1,2,4 --steps 60 --repeats 3 --out build/ranks
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from l2l.report.console import print_table
from l2l.report.run_directory import read_metrics, write_json

COMMON = "--train_size 64 --dev_size 4 --test_size 4 --batch_size 16 --lr 1e-4 --log_every 1 --progress false --overwrite true"
MODES = {
    "data": "--parallel data --micro_batch 4",
    "population": "--method mezo --num_directions 8 --perturb functional",
}
"""Options of each mode; of a population of one process ``parallel`` is left out."""
FIRST = 10
"""Steps that are not counted."""


def run(mode: str, size: int, steps: int, out: Path, options: list[str]) -> tuple[float, float | None]:
    """Seconds per step, and the most bytes that a rank has sent per step."""
    with closing(socket.socket()) as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    command = [
        "-m",
        "l2l",
        "fine-tune",
        "--out",
        str(out),
        "--steps",
        str(steps),
        *COMMON.split(),
        *MODES[mode].split(),
        *options,
    ]
    if mode == "population" and size > 1:
        command += ["--parallel", "population"]
    waiting = []
    for rank in range(size):
        given = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
        waiting.append(subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL))
    if any(one.wait() for one in waiting):
        raise SystemExit(f"a run of {size} processes failed: {' '.join(command)}")
    rows = read_metrics(out / "metrics.csv")
    first, last = rows[min(FIRST, len(rows) - 2)], rows[-1]
    seconds = (float(last["seconds"]) - float(first["seconds"])) / (int(last["step"]) - int(first["step"]))
    together = json.loads((out / "summary.json").read_text())["parallel"]
    return seconds, together and max(own["per_step"] for own in together["sent"].values())


def main() -> None:
    """Run all sizes in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,2,4")
    parser.add_argument("--modes", default="data,population")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/ranks"))
    parser.add_argument("options", nargs="*", help="further options of l2l fine-tune, after --")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    seen: dict[tuple[str, int], list[tuple[float, float | None]]] = {}
    loads = []
    for _ in range(arguments.repeats):
        for mode in arguments.modes.split(","):
            for size in sizes:
                loads.append(os.getloadavg()[0])
                found = run(mode, size, arguments.steps, arguments.out / f"{mode}-{size}", arguments.options)
                seen.setdefault((mode, size), []).append(found)
    rows = []
    for (mode, size), found in seen.items():
        times = [seconds for seconds, _ in found]
        alone = statistics.median(seconds for seconds, _ in seen[mode, sizes[0]])
        middle = statistics.median(times)
        row = {"mode": mode, "processes": size, "s/step": round(middle, 4), "least": round(min(times), 4)}
        speedup = alone / middle
        rows.append(
            row | {"speedup": round(speedup, 2), "efficiency": round(speedup * sizes[0] / size, 2), "bytes": found[0][1]}
        )
    print_table(f"{os.cpu_count()} processors, load {min(loads):.1f} to {max(loads):.1f} before runs", rows)
    write_json(arguments.out / "ranks.json", {"rows": rows, "loads": loads, "processors": os.cpu_count()})


if __name__ == "__main__":
    main()
