"""A tuner's training plan: its file, what it refuses, and what it decides in a run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import l2l
from l2l.cli import main
from l2l.methods.learned import Learned
from l2l.methods.rsgn import RSGN
from l2l.train import trainer
from l2l.train.config import FineTuneConfig
from l2l.tuners import Depth, TrainingPlan, Tuner, io
from l2l.tuners.inspect import verify
from l2l.tuners.plan import build_plan, plan_config, plan_line

DEPTHS = (Depth(0, "top:1"), Depth(20, "top:1/2"), Depth(400, [1, 2]))
PLAN = TrainingPlan(
    **{"method": "learned+rsgn", "method_args": {"rsgn": {"damping": 0.3}}, "num_directions": 4, "batch_size": 8},
    **{"lr": 0.5, "schedule": "linear", "depths": DEPTHS},
)
SMALL: dict[str, Any] = {
    **{"task": "world_topic", "train_size": 16, "dev_size": 8, "test_size": 8},
    **{"eval_every": 100, "save": "log", "progress": False},
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """A saved tuner of the embedded model, with a plan."""
    return Tuner.from_pretrained("l2l-tiny").with_plan(PLAN).save_pretrained(tmp_path_factory.mktemp("tuner"))


def options(out: Path) -> dict[str, Any]:
    return yaml.safe_load((out / "config.yaml").read_text())


def test_a_plan_comes_back_from_its_file_and_is_shown(planned, capsys):
    loaded = Tuner.from_pretrained(planned)
    assert loaded.plan == PLAN
    assert json.loads((planned / io.CONFIG).read_text())["format_version"] == 4
    again = io.to_config(loaded)
    assert again["plan"] == plan_config(PLAN) and build_plan(again["plan"]) == PLAN
    assert main(["tuners", "show", str(planned)]) == 0
    line = plan_line(PLAN)
    assert "lr 0.5, batch_size 8" in line and "top:1/2 from a budget of 20 whole passes" in line
    assert line in " ".join(capsys.readouterr().out.split()) and line in (planned / io.CARD).read_text()
    assert "error" not in [finding.level for finding in verify(planned)]


def test_a_tuner_without_a_plan_is_written_as_before(planned, tmp_path):
    config = io.to_config(Tuner.from_pretrained(planned).with_plan(None))
    assert config["format_version"] == 2 and not {"plan", "turns"} & config.keys()


def test_a_damaged_plan_is_refused_with_its_file(planned, tmp_path):
    folder = Tuner.from_pretrained(planned).save_pretrained(tmp_path)
    config = json.loads((folder / io.CONFIG).read_text())
    for plan, named in (({"method": "learned"}, "depths"), ({**config["plan"], "speed": 1}, "'speed'"), ([1], "plan is")):
        (folder / io.CONFIG).write_text(json.dumps(config | {"plan": plan}))
        with pytest.raises(ValueError, match=named):
            Tuner.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("method", ""), ("estimator", "three_sided"), ("schedule", "square"), ("schedule_end", -1.0)),
        *(("lr", -1.0), ("lr", "fast"), ("lr", float("nan")), ("epsilon", 0.0), ("batch_size", 0), ("num_directions", 1.5)),
        *(("depths", ()), ("depths", (Depth(5, "all"),)), ("depths", (Depth(0, "all"), Depth(0, "top:1")))),
    ],
)
def test_nonsense_is_refused_by_name_value_and_rule(field: str, value: Any):
    with pytest.raises(ValueError, match=f"training plan: {field}=.* must be .*l2l plan"):
        TrainingPlan(**{"method": "learned", field: value})


def test_layers_that_no_model_has_are_refused_in_a_plan():
    with pytest.raises(ValueError, match="train_layers='bottom:2' must be"):
        TrainingPlan("learned", depths=[Depth(0, "bottom:2")])


@pytest.mark.parametrize(
    ("budget", "layers"), [(0, "top:1"), (19.9, "top:1"), (20, "top:1/2"), (399, "top:1/2"), (1e9, [1, 2])]
)
def test_the_entry_with_the_largest_budget_not_above_the_runs_holds(budget: float, layers: Any):
    assert PLAN.train_layers(budget) == layers


def test_a_plan_fills_what_is_open_and_nothing_else():
    given = FineTuneConfig(tuner="x", lr=0.1, schedule="cosine")
    taken = given.open_to(PLAN)
    assert taken == {
        **{"method": "learned+rsgn", "method_args": {"rsgn": {"damping": 0.3}}, "num_directions": 4, "batch_size": 8},
        "train_layers": "top:1",
    }
    complete, before = given.completed(taken), asdict(given)
    changed = {name for name, value in asdict(complete).items() if value != before[name]}
    assert changed == {*taken, "epsilon", "schedule_end"}  # which the plan leaves open too
    assert (complete.lr, complete.schedule, complete.epsilon, complete.schedule_end) == (0.1, "cosine", 1e-3, 0.0)
    assert complete.open_to(PLAN) == {}
    assert asdict(complete.completed()) == asdict(complete)


def test_under_another_method_a_plan_decides_what_belongs_to_no_method_and_under_a_scheme_nothing():
    taken = FineTuneConfig(tuner="x", method="learned+lozo").open_to(PLAN)
    assert taken == {"batch_size": 8, "train_layers": "top:1"}
    assert FineTuneConfig(tuner="x", scheme="lora").open_to(PLAN) == {}


def test_layers_that_a_user_sets_have_options_of_their_own(tmp_path):
    own = {"all": {"num_directions": 2, "lr": None}, "25,26": {"schedule": "cosine"}}
    plan = replace(PLAN, layer_options=own)
    assert build_plan(json.loads(json.dumps(plan_config(plan)))) == plan
    assert Tuner.from_pretrained(Tuner.from_pretrained("l2l-tiny").with_plan(plan).save_pretrained(tmp_path)).plan == plan
    assert "; where a user sets train_layers all: num_directions 2" in plan_line(plan)
    taken = FineTuneConfig(tuner="x", train_layers="all").open_to(plan)
    assert taken == {
        **{"method": "learned+rsgn", "method_args": {"rsgn": {"damping": 0.3}}, "num_directions": 2, "batch_size": 8},
        "schedule": "linear",
    }
    assert FineTuneConfig(tuner="x", train_layers="all", num_directions=3, lr=0.1).completed(taken).num_directions == 3
    assert FineTuneConfig(tuner="x", train_layers=[26, 25]).open_to(plan)["schedule"] == "cosine"
    for layers in (None, "top:1", "top:2"):  # the plan's, one of its depths, and one of which it knows nothing
        assert FineTuneConfig(tuner="x", train_layers=layers).open_to(plan)["num_directions"] == 4


@pytest.mark.parametrize(
    ("layers", "given", "message"),
    [
        ("top:1", {}, "layer_options='top:1' must be of other layers than depths"),
        ("all", {"method": "mezo"}, r"layer_options=.* must be of fields of a plan other than batch_size, depths.*method"),
        ("all", {"speed": 1}, "layer_options=.* must be of fields"),
        ("all", {"num_directions": 0}, "num_directions=0 must be a whole number"),
        ("bottom:2", {}, "train_layers='bottom:2' must be"),
    ],
)
def test_options_of_layers_are_checked_as_the_plan_is(layers: str, given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, layer_options={layers: given})


def test_without_a_plan_the_constants_are_those_of_method_and_scheme():
    assert FineTuneConfig().method == "mezo" and FineTuneConfig(tuner="x").completed().method == "learned"
    names = ("batch_size", "schedule", "schedule_end", "method_args", "train_layers", "lr", "epsilon")
    wanted = [16, "constant", 0.0, {}, "all", 1e-6, 1e-3]
    for config in (FineTuneConfig(), FineTuneConfig(tuner="x").completed()):
        assert [getattr(config, name) for name in names] == wanted


@pytest.mark.parametrize(
    ("limit", "layers"),
    [
        ({"max_passes": 19}, "top:1"),
        ({"max_passes": 20, "steps": 1000}, "top:1/2"),
        ({"max_passes": 10, "batch_size": 16}, "top:1/2"),  # passes over twice the plan's batch
        ({"steps": 3}, "top:1"),  # of 4 + 1 passes
        ({"steps": 4}, "top:1/2"),
    ],
)
def test_a_run_without_numbers_of_its_own_follows_the_plan_at_its_budget(limit, layers, planned, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "start_fine_tuning", lambda config, *rest: config)
    config: Any = l2l.fine_tune(tuner=str(planned), out=str(tmp_path / "out"), **SMALL | limit)
    batch = limit.get("batch_size", 8)
    assert (config.train_layers, config.method, config.lr, config.batch_size) == (layers, "learned+rsgn", 0.5, batch)


def test_seconds_become_a_budget_by_a_measured_pass_and_a_continued_run_keeps_its_layers(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "start_fine_tuning", lambda config, *rest: config)
    given: dict[str, Any] = SMALL | {"out": str(tmp_path), "max_seconds": 1e-6}
    config: Any = l2l.fine_tune(tuner=str(planned), **given)
    assert config.train_layers == "top:1"  # less than a pass
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config) | {"train_layers": [1, 2]}))
    continued: Any = l2l.fine_tune(tuner=str(planned), **given)
    assert continued.train_layers == [1, 2]
    given["max_seconds"] = 1e6
    given["out"] = str(tmp_path / "new")
    fresh: Any = l2l.fine_tune(tuner=str(planned), **given)
    assert fresh.train_layers == [1, 2]


def test_layers_by_budget_and_streamed_layers_go_together_where_no_whole_pass_is_run(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "start_fine_tuning", lambda config, *rest: config)
    given: dict[str, Any] = SMALL | {"out": str(tmp_path / "out"), "tuner": str(planned), "stream_layers": True}
    with pytest.raises(ValueError, match="set train_layers, or max_passes as the only limit"):
        l2l.fine_tune(**{**given, "steps": 4})
    for more, layers in (({"max_passes": 30}, "top:1/2"), ({"steps": 4, "train_layers": "top:1"}, "top:1")):
        config: Any = l2l.fine_tune(**{**given, **more})
        assert config.train_layers == layers


def test_the_command_line_says_what_came_from_the_plan_and_records_the_values_used(planned, tmp_path, capsys):
    sizes = [f"--{name}={value}" for name, value in (SMALL | {"progress": True, "max_passes": 5}).items()]
    out = tmp_path / "out"
    assert main(["fine-tune", "--tuner", str(planned), "--out", str(out), *sizes]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("from the tuner's plan"))
    assert "method learned+rsgn" in said and said.endswith("train_layers top:1")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["method"], summary["lr"], summary["passes"]) == ("learned+rsgn", 0.5, 5)
    assert options(out)["train_layers"] == "top:1" == summary["config"]["train_layers"]
    assert options(out)["batch_size"] == 8


def test_a_tuner_object_has_its_plan_too_and_a_method_without_sigma_runs_without_it():
    bare = TrainingPlan("rsgn", num_directions=4, batch_size=8, depths=[Depth(0, "top:1")])
    tuner = Tuner.from_pretrained("l2l-tiny")
    for plan, kind in ((bare, RSGN), (None, Learned)):
        config = FineTuneConfig(tuner="l2l-tiny", **SMALL)
        given = tuner.with_plan(plan)
        complete = config.completed({} if plan is None else config.open_to(plan))
        assert type(trainer.prepare_fine_tuning(complete, tuner=given).optimizer.method) is kind
    with pytest.raises(ValueError, match="takes no tuner"):
        trainer.prepare_fine_tuning(FineTuneConfig(method="rsgn", tuner="l2l-tiny", **SMALL))
