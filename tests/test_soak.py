"""Kind B of issue 16, *nothing lost*: commands that are killed with SIGKILL at random instants and repeated until they end.

A run's process is killed anywhere in its life: while it starts, trains, evaluates, writes a checkpoint, saves, or takes its
leave. The same command then goes on, and what it leaves is what the uninterrupted run leaves. ``L2L_SOAK`` is the number of
kills of each command, at instants drawn by ``L2L_TEST_DAY``. Processes are forked from one that has imported the package.
"""

import contextlib
import csv
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from daily import DAY

from l2l.cli import main
from l2l.report.run_directory import SUMMARY, UNFINISHED
from l2l.train.replay import differences
from l2l.train.runlog import read_log

KILLS = int(os.environ.get("L2L_SOAK", "50"))
"""Of each command."""
PATIENCE = 300.0
"""Seconds until a process counts as stuck."""
SIZES = "--steps 24 --batch_size 2 --train_size 8 --dev_size 4 --lr 1e-4 --checkpoint_every 2 --log_every 1 --progress false"
FINE_TUNE = f"fine-tune {SIZES} --task world_topic --test_size 4 --eval_every 4"
COMMANDS = {
    "fine-tune": FINE_TUNE,
    "fine-tune with a prefix cache": f"{FINE_TUNE} --train_layers top:1 --prefix_cache disk",
    "meta-train": f"meta-train {SIZES} --tasks world_topic,world_job --validation_tasks world_season --validate_every 6 "
    "--validation_steps 1 --restart_every 5 --outer_lr 0.1",
}
TIMED = ("seconds", "evaluate_seconds")
"""Columns of metrics.csv that differ between two runs of one command."""
START, END = ("config.yaml",), ("model", "tuner.safetensors")
"""What a process writes when its start is over, and when its steps are."""
NEVER_LEFT = ("best", "checkpoint", "checkpoint.1", "initial", "measured", "prefix_cache", "theta")
"""Files that are there only until a run has ended."""


def run(arguments: list[str], said: Path) -> None:
    """The process."""
    with said.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def started(arguments: list[str], said: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["l2l.cli", "l2l.meta.run", "l2l.meta.module", "l2l.train.trainer", "l2l.tools.doctor"])
    process = context.Process(target=run, args=(arguments, said))
    process.start()
    return process


def wait(process: BaseProcess, out: Path, names: tuple[str, ...], seconds: float) -> float:
    """Until the process has ended or written one of the files, and so many seconds more; gives when it wrote."""
    began, deadline = time.time() - 0.01, time.monotonic() + PATIENCE
    while names and process.exitcode is None and not any(written_since(out / name, began) for name in names):
        assert time.monotonic() < deadline, "the process is stuck"
        time.sleep(0.002)
    wrote = time.monotonic()
    process.join(seconds)
    return wrote


def written_since(path: Path, when: float) -> bool:
    return path.exists() and path.stat().st_mtime >= when


def phase(out: Path) -> str:
    """What a run was doing when it was killed, by what lies there."""
    if not (out / "config.yaml").exists():
        return "before its directory"
    if (out / SUMMARY).exists():
        return "after its summary"
    inside = {path.name for folder in out.glob(f"{UNFINISHED}*") for path in folder.iterdir()}
    if inside:
        return f"writing {min(inside)}"
    if any(out.parent.glob(f"{UNFINISHED}*")) or any(out.glob(f"{UNFINISHED}*")):
        return "writing, or rehearsing the end"
    if (out / "model").exists() or (out / "tuner.safetensors").exists():
        return "saving"
    return "between checkpoints" if any(out.glob("checkpoint*")) else "before the first checkpoint"


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]


def check_same(out: Path, whole: Path) -> None:
    """All that a run leaves is what the uninterrupted run has left."""
    weights = next(name for name in ("model/model.safetensors", "tuner.safetensors") if (whole / name).exists())
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    assert rows(out) == rows(whole)
    if (whole / "steps.l2l").exists():
        assert read_log(out / "steps.l2l").best == read_log(whole / "steps.l2l").best is not None
        assert differences(out / "steps.l2l", whole / "steps.l2l") == [f"no difference in {len(rows(whole))} steps"]
        assert (out / "steps.l2l").read_bytes() == (whole / "steps.l2l").read_bytes()
    left = {path.name for path in out.iterdir()}
    assert not left & {f"{name}.safetensors" for name in NEVER_LEFT}
    assert not [path for path in (*out.parent.rglob(f"{UNFINISHED}*"), *out.glob(".lock"))]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a few minutes on a machine that does nothing else
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_instants_and_repeated_it_is_the_uninterrupted_run(name, tmp_path, capsys):
    arguments, whole = COMMANDS[name].split(), tmp_path / "whole" / "run"
    said, draw = tmp_path / "said", random.Random(f"{DAY} {name}")
    started([*arguments, "--out", str(tmp_path / "first" / "run")], said).join(PATIENCE)  # reads what later ones find in memory
    began = time.monotonic()
    process = started([*arguments, "--out", str(whole)], said)
    start = wait(process, whole, START, 0) - began
    train = wait(process, whole, END, PATIENCE) - began - start
    end = time.monotonic() - began - start - train
    assert process.exitcode == 0, said.read_text()
    spans = ((), start), (START, train), (START, train), (END, end + 0.1)
    check_same(whole, whole)
    kills, runs, phases = 0, 0, Counter[str]()
    while kills < KILLS:
        out = tmp_path / f"{runs}" / "run"
        out.parent.mkdir()
        while True:
            process = started([*arguments, "--out", str(out)], said)
            names, seconds = draw.choice(spans)
            wait(process, out, names if kills < KILLS else (), draw.uniform(0, seconds) if kills < KILLS else PATIENCE)
            ended = process.exitcode is not None
            process.kill()
            process.join()
            if not ended:
                kills += 1
                phases[phase(out)] += 1
            elif process.exitcode == 2 and (out / SUMMARY).exists():
                assert "finished" in said.read_text().splitlines()[-1]
                break  # it was killed when all was done
            else:
                assert process.exitcode == 0, said.read_text()[-3000:]
                break
        check_same(out, whole)
        shutil.rmtree(out.parent)
        runs += 1
    with capsys.disabled():
        met = ", ".join(f"{phase} {count}" for phase, count in phases.most_common())
        life = f"{start:.1f} + {train:.1f} + {end:.1f} s"
        print(f"\n{name}: {kills} kills in {runs} runs of {life}, each ended as the uninterrupted one: {met}")
