"""Record golden results anew: ``python tests/goldens/record.py [NAME ...]``, without names all of them.

Only where results are meant to change: say in the commit which and why. See ``git diff tests/goldens/recorded``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from golden_runs import COMMANDS, PRINTED, RECORDED, RECORDINGS, Compute, Result, machine, printed_config, printed_path


def written(results: dict[str, Result]) -> str:
    """JSON with a line per result, so that a diff names what changed."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items())
    return f'{{"machine": {json.dumps(machine())},\n"results": {{\n{lines}\n}}}}\n'


def run(compute: Compute) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return compute(Path(folder) / "out")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    PRINTED.mkdir(parents=True, exist_ok=True)
    for name in names or [*RECORDINGS, PRINTED.name]:
        began = time.perf_counter()
        if name == PRINTED.name:
            for path in COMMANDS:
                printed_path(path).write_text(printed_config(path))
        else:
            (RECORDED / f"{name}.json").write_text(written({key: run(f) for key, f in RECORDINGS[name].items()}))
        print(f"{name}: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
