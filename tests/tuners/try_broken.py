"""Loads or imports every case below a folder, in a process of its own; prints as JSON what came of each, and the memory."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from l2l.tuners.api import Tuner
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.published import import_published

PRINTS = Fingerprint(("layer.weight", "layer.bias"), ((3, 4), (3,)))
RUNS = (
    "os.system",
    "subprocess.Popen",
    "pickle.find_class",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "os.symlink",
)
seen: list[str] = []
watching: list[Path] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what runs, and every file opened to write that is not below the folder watched."""
    if not watching:
        return
    if event in RUNS:
        seen.append(f"{event} {arguments}"[:200])
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    if writes and not str(arguments[0]).startswith(str(watching[0])):
        seen.append(f"{event} {arguments}"[:200])


def peak() -> int:
    """Most memory of this process so far, in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def attempt(folder: Path) -> dict[str, str]:
    """What becomes of a case: the kind of error and its text; ``none`` where there is no error."""
    try:
        if folder.name.startswith("published"):
            import_published(folder / "tuner.pth", "me/model", folder / "out", PRINTS)
        else:
            Tuner.from_pretrained(folder)
    except Exception as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return {"kind": "none", "text": ""}


def main() -> None:
    """The good cases first: what they need is the memory that others are measured against."""
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    sys.addaudithook(watch)
    found: dict[str, Any] = {folder.name: attempt(folder) for folder in sorted(root.glob("*-good"))}
    before = peak()
    for folder in sorted(set(root.iterdir()) - set(root.glob("*-good"))):
        files = {*folder.rglob("*"), *root.iterdir()}
        signal.alarm(60)
        watching[:] = [folder]
        found[folder.name] = attempt(folder)
        watching.clear()
        signal.alarm(0)
        found[folder.name]["left"] = sorted(map(str, files.symmetric_difference({*folder.rglob("*"), *root.iterdir()})))
    print(json.dumps({"cases": found, "seen": seen, "growth_mib": (peak() - before) / 1024}))


if __name__ == "__main__":
    main()
