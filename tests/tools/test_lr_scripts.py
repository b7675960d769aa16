"""The scripts that hold ``lr="auto"`` against grids, and methods against each other over schemes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from l2l.experiments import runner
from l2l.experiments.runner import Record, Trial
from l2l.experiments.stats import Cell, Run
from l2l.meta.config import MetaTrainConfig

pytestmark = pytest.mark.in_turn

ROOT = Path(__file__).parent.parent.parent
PLAN = ROOT / "configs" / "schemes" / "stories260K.yaml"


def loaded(name: str) -> ModuleType:
    """A script of ``benchmarks``, its jobs run in this process."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of the trials that were run, in this process."""
    found: list[str] = []

    def executor(trials: list[Trial], after_each: Any) -> list[Record]:
        found.extend(trial.out for trial in trials)
        return [runner.run_trial(trial) for trial in trials]

    monkeypatch.setattr(runner, "executor_of", lambda name, processes, address=None: executor)
    return found


@pytest.fixture(scope="module")
def auto() -> ModuleType:
    return loaded("lr_auto")


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return loaded("schemes_table")


def runs(losses: dict[Any, tuple[float, float]]) -> dict[Any, list[Run]]:
    head = (Cell("s", "full", "t"), "m", "mezo", "tuner", "mezo", None)
    return {
        lr: [Run(*head, seed, False, {"lr": lr}, train_loss=loss) for seed, loss in enumerate(own)]
        for lr, own in losses.items()
    }


@pytest.mark.parametrize(("last", "good"), [(0.54, "yes"), (0.58, "no")])
def test_auto_is_held_against_the_best_mean_of_the_grid(auto: ModuleType, last: float, good: str):
    losses = {0.1: (0.9, 0.7), 0.2: (0.4, 0.6), 0.3: (0.3, float("inf")), "auto": (last, last)}
    row = auto.compared("t", "full", runs(losses))
    assert (row["best lr"], row["edge"], row["best of grid"]) == (0.2, "no", pytest.approx(0.5))
    assert row["ratio"] == pytest.approx(last / 0.5)
    assert row["within 10 %"] == good


def test_auto_that_diverges_and_a_best_value_at_the_edge_show(auto: ModuleType):
    row = auto.compared("t", "full", runs({0.1: (0.4, 0.4), 0.2: (0.5, 0.5), "auto": (0.4, float("inf"))}))
    assert (row["edge"], row["auto"], row["within 10 %"]) == ("yes", float("inf"), "no")


def test_grids_and_epsilons_are_by_scheme_and_bad_ones_are_named(auto: ModuleType):
    words = "--grid prefix=1e-2,1e-3 --epsilon lora=1e-2 --schemes lora prefix --tasks rte"
    given = auto.parser().parse_args(words.split())
    lora, prefix = auto.experiment(given).tuning_schemes
    assert [point["lr"] for point in auto.points(given)["prefix"]] == [1e-3, 1e-2, "auto"]
    assert (lora.options, prefix.options) == ({"epsilon": 1e-2}, {})
    with pytest.raises(ValueError, match="'ia3' has no grid"):
        auto.points(auto.parser().parse_args(["--schemes", "ia3"]))
    for word in ("full", "full=a", "=1"):
        with pytest.raises(ValueError, match="--grid"):
            auto.by_scheme([word], "grid")


def test_the_script_runs_and_runs_again_without_doing_anything_twice(auto: ModuleType, done, tmp_path, monkeypatch):
    words = f"--model l2l/tiny --tasks world_topic --schemes full --grid full=1e-4,3e-4 --tiny --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["lr_auto.py", *words.split()])
    auto.main()
    auto.main()
    assert len(done) == len(set(done)) == 3
    found = json.loads((tmp_path / "lr_auto.json").read_text())
    assert found["rows"][0]["task"] == "world_topic"
    assert set(found["losses"]["world_topic full"]) == {"0.0001", "0.0003", "auto"}
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/*/summary.json")]
    assert len(summaries) == 3 and all(8 <= summary["passes"] <= 10 for summary in summaries)


def test_the_plan_for_stories260k_covers_what_was_asked_for(table: ModuleType):
    plan = table.read_plan(PLAN)
    config = table.experiment(plan, ".", Path("runs"))
    assert set(plan.tasks) == {"sst2", "trec", "ag_news", "rte"}
    assert [scheme.name for scheme in config.tuning_schemes] == ["full", "lora"]
    assert list(plan.methods) == ["adamw", "mezo", "learned"]
    assert table.points_of(plan, "lora", "adamw") == [{"lr": 3e-3}, {"lr": 1e-2}]
    assert table.points_of(plan, "full", "learned") == [{"lr": "auto", "step_fraction": 0.1}]
    MetaTrainConfig(out="x", **plan.tuner)
    assert not set(plan.tasks) & set(plan.tuner["tasks"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "'model' is missing"),
        ({"colour": 1}, "'colour' is unknown"),
        ({"methods": {"mezo": {}}}, "must have 'lr'"),
        ({"methods": {"mezo": {"lr": {"full": 0.1}}}}, "no lr for scheme 'lora'"),
        ({"run": {"colour": 1}}, "'colour' is no field of FineTuneConfig"),
        ({"run": {"progress": True}}, "'progress' is set by the script"),
        ({"tuner": {"colour": 1}}, "'colour' is no field of MetaTrainConfig"),
        ({"tuner": None}, "'learned' needs 'tuner'"),
        ({"baselines": ["oracle"]}, "no baseline 'oracle'"),
    ],
)
def test_a_bad_plan_is_named(table: ModuleType, change: dict[str, Any], message: str, tmp_path):
    given = yaml.safe_load(PLAN.read_text()) | change
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in given.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        table.read_plan(path)


def test_one_file_runs_all_methods_on_all_schemes_into_one_table(table: ModuleType, done, tmp_path, monkeypatch):
    plan: dict[str, Any] = {
        "model": "l2l/tiny",
        "tasks": ["world_topic"],
        "schemes": ["full", "lora"],
        "baselines": ["zero_shot"],
        "passes": 6,
        "run": {"batch_size": 4, "train_size": 16, "dev_size": 4, "test_size": 8},
        "methods": {
            "adamw": {"lr": 1e-3},
            "mezo": {"lr": {"full": [1e-4, 3e-4], "lora": 1e-3}},
            "learned": {"lr": "auto"},
        },
        "tuner": {"tasks": ["world_job"], "steps": 2, "train_size": 16, "batch_size": 4, "architecture": "shared_mlp"}
        | {"features": "standard", "restart_every": 2, "progress": False},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    monkeypatch.setattr(sys, "argv", ["schemes_table.py", str(path), "--out", str(tmp_path / "out")])
    table.main()
    table.main()
    assert len(done) == len(set(done)) == 1 + 4 + 3
    plan["tuner"]["steps"] = 3
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    with pytest.raises(SystemExit, match="learned with another 'steps'"):
        table.main()
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [(row["scheme"], row["method"]) for row in rows] == [
        ("none", "zero_shot"),
        *[(scheme, method) for scheme in ("full", "lora") for method in ("adamw", "mezo", "learned")],
    ]
    assert all(" to " in row["95 % interval"] for row in rows)
    assert all(row["lr"] in ("-", "0.001", "0.0001", "0.0003", "auto") for row in rows)
    assert (tmp_path / "out" / "table.md").read_text().count("\n| world_topic ") == 7


def test_figures_of_several_seeds_and_a_missing_interval(table: ModuleType):
    assert table.spread([0.5, 0.7]) == "0.600 (0.141)"
    assert table.ends([[0.4, 0.6], [0.6, 0.8]]) == "0.500 to 0.700"
    assert table.ends([None, [0.1, 0.2]]) == "-"
