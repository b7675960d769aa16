"""``l2l quickstart``, shortened, end to end."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

import l2l
from l2l.cli import main
from l2l.experiments.presets.quickstart import RECIPE, QuickstartConfig
from l2l.tasks.tiny_world import HELD_OUT, POOL, VALIDATION

SHORT = shlex.split("--seeds 1 --passes 16 --meta-steps 4 --progress false --processes 1")
TUNED = ["mezo", "dizo"]
METHODS = [*TUNED, "learned", "random sigma"]
FIELDS = {"task", "method", "lr", "seed", "passes", "final_loss", "accuracy", "seconds"}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quickstart")
    assert main(["quickstart", *SHORT, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_it_leaves_results_of_every_method_on_two_held_out_tasks(done):
    summary = json.loads((done / "summary.json").read_text())
    results = summary["results"]
    tasks = QuickstartConfig().tasks
    assert [(r["task"], r["method"]) for r in results] == [(task, method) for task in tasks for method in METHODS]
    recipe = yaml.safe_load(RECIPE.read_text())
    for result in results:
        assert result.keys() >= FIELDS
        config = json.loads((Path(result["run"]) / "summary.json").read_text())["config"]
        if result["method"] in TUNED:
            assert (result["lr"], config["schedule"]) == (recipe["best"][result["task"]][result["method"]], "constant")
        else:  # one plan for every task
            assert (config["method"], result["lr"]) == (recipe["plan"]["method"], recipe["plan"]["lr"])
            assert config["schedule"] == recipe["plan"]["options"]["schedule"] == "linear"
        assert result["seed"] == 0 and 16 <= result["passes"] < 16 + 9, "a run ends with the step that spends its passes"
        assert 0 < result["final_loss"] < 20
        assert 0 <= result["accuracy"] <= 1
        assert (Path(result["run"]) / "summary.json").is_file()


@pytest.mark.slow
def test_its_tuner_loads_and_fits_the_embedded_model(done):
    summary = json.loads((done / "summary.json").read_text())
    tuner = l2l.Tuner.from_pretrained(summary["tuner"])
    tuner.check(l2l.load_model("l2l/tiny"))
    assert tuner.provenance.recipe["steps"] == 4
    assert not set(tuner.provenance.recipe["tasks"]) & set(QuickstartConfig().tasks)
    assert l2l.Tuner.from_pretrained(summary["random_sigma"]).architecture == "table"


@pytest.mark.slow
def test_it_leaves_a_picture_and_its_configuration(done):
    assert (done / "quickstart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert yaml.safe_load((done / "config.yaml").read_text())["passes"] == 16


@pytest.mark.slow
def test_continued_after_an_interruption_it_does_nothing_twice(done, monkeypatch):
    before = json.loads((done / "summary.json").read_text())["results"]
    (done / "summary.json").unlink()
    monkeypatch.setattr("l2l.meta.run.meta_train", lambda *_, **__: pytest.fail("the tuner was learned already"))
    assert main(["quickstart", *SHORT, "--out", str(done)]) == 0
    assert json.loads((done / "summary.json").read_text())["results"] == before


@pytest.mark.parametrize("task", [POOL[0], VALIDATION[0]])
def test_a_task_that_the_tuner_learned_from_is_refused(task, tmp_path, capsys):
    assert main(["quickstart", *SHORT, "--tasks", f"[{task}]", "--out", str(tmp_path / "out")]) == 2
    assert repr(task) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_held_out_task_without_recorded_learning_rates_is_refused_before_anything_is_done(tmp_path, capsys):
    (task, *_) = set(HELD_OUT) - set(yaml.safe_load(RECIPE.read_text())["best"])
    assert main(["quickstart", *SHORT, "--tasks", f"[{task}]", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert repr(task) in line
    assert "`l2l compare`" in line
    assert not (tmp_path / "out").exists()


def test_the_recipe_has_a_learning_rate_of_its_grid_for_every_task_and_tuned_method():
    recipe = yaml.safe_load(RECIPE.read_text())
    assert set(recipe["best"]) >= set(QuickstartConfig().tasks)
    for best in recipe["best"].values():
        assert list(best) == TUNED
        assert set(best.values()) <= set(recipe["grid"])


@pytest.mark.slow
def test_tuning_runs_the_whole_grid_and_writes_the_best(tmp_path):
    tuner = str(l2l.Tuner.for_model(l2l.load_model("l2l/tiny")).save_pretrained(tmp_path / "tuner"))
    out = tmp_path / "out"
    assert main(["quickstart", *SHORT, "--tune", "true", "--tuner", tuner, "--out", str(out)]) == 0
    recipe = yaml.safe_load(RECIPE.read_text())
    best = yaml.safe_load((out / "best_lr.yaml").read_text())["best"]
    assert all(sorted(best[task]) == sorted(TUNED) for task in QuickstartConfig().tasks)
    results = json.loads((out / "summary.json").read_text())["results"]
    assert len(results) == len(QuickstartConfig().tasks) * len(TUNED) * len(recipe["grid"])
