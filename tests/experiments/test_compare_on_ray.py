"""A comparison on a Ray cluster that loses a machine in the middle: its runs are those of this machine alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clusters import ray_cluster, until
from compared import Here, small

from l2l.experiments.presets import compare
from l2l.experiments.presets.compare import run_comparison
from l2l.report.run_directory import SUMMARY
from l2l.train.runlog import NAME, StepRecord, read_log

PASSES = 400
"""Of a run, which takes seconds: both are at work when a machine is taken away."""


def steps(out: Path) -> dict[str, list[StepRecord]]:
    """The steps of each run, by its folder's name, which is a hash of all that decides it."""
    return {path.parent.name: read_log(path).steps for path in out.glob(f"runs/tiny/*/{NAME}")}


@pytest.mark.slow  # starts a cluster of three machines
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")  # of Ray, on the way out
def test_runs_of_a_machine_that_is_lost_are_run_again_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"methods": ["mezo"], "grid": [1e-5, 1e-4], "passes": PASSES, "processes": 2}
    out = tmp_path / "on-ray"
    with ray_cluster(2, monkeypatch) as (cluster, machines), ThreadPoolExecutor(1) as thread:
        config = small("on-ray", executor="ray", ray_address=cluster.address, **given)  # a relative path
        running = thread.submit(run_comparison, config)
        until(lambda: running.done() or len(list(out.glob(f"runs/tiny/*/{NAME}"))) == 2, 1200.0)
        assert not running.done() and not list(out.glob(f"runs/tiny/*/{SUMMARY}"))
        cluster.remove_node(machines[1], allow_graceful=False)
        found = running.result()
        capsys.readouterr()
        again = run_comparison(config)
        assert "2 of 2 runs for the step sizes are done" in capsys.readouterr().out
    monkeypatch.setattr(compare, "executor_of", lambda *_: Here())
    alone = run_comparison(small(tmp_path / "alone", **given))
    assert found["runs"] == again["runs"] == alone["runs"] == 3
    assert found["chosen"] == again["chosen"] == alone["chosen"]
    assert steps(out) == steps(tmp_path / "alone")
    assert all(len(run) == PASSES // 2 for run in steps(out).values())
