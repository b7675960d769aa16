"""``l2l meta-evaluate``, shortened: what it refuses, what it leaves, and that nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared import Here, result

import l2l
from l2l.experiments import runner
from l2l.experiments.presets import meta_evaluate as evaluate
from l2l.experiments.presets.meta_evaluate import run_meta_evaluation
from l2l.experiments.runner import Trial, execute, run_trial
from l2l.experiments.spec import CONTROLS, Contender, MetaEvaluateConfig, Setting
from l2l.experiments.stats import Cell
from l2l.experiments.tables import finite
from l2l.params import Blocks
from l2l.tasks.tiny_world import HELD_OUT, POOL, VALIDATION
from l2l.tuners.api import Tuner
from l2l.tuners.model import Provenance, random_basis

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {
    "passes": 4,
    "seeds": 2,
    "train_size": 16,
    "dev_size": 8,
    "test_size": 8,
    "evaluations": 1,
    "control_batches": 2,
    "grid": [1e-4, 1e-3],
    "step_fraction_grid": [0.1, 0.2],
    "processes": 1,
    "progress": False,
}
TASK = "world_stars"
SETTING = {"name": "tiny", "tasks": [TASK], "batch_size": 4}
MEZO = {"label": "MeZO", "method": "mezo", "role": "baseline-mezo"}
DIZO = {"label": "DiZO", "method": "dizo", "role": "baseline-dizo", "method_args": {"interval": 2, "iterations": 1}}


@pytest.fixture(scope="module")
def tuner(tmp_path_factory) -> str:
    """A fresh tuner with a basis."""
    model = l2l.load_model("l2l/tiny")
    fresh = Tuner.for_model(model, "shared_mlp", start="random", basis=random_basis(Blocks.of(model), 2))
    return str(fresh.save_pretrained(tmp_path_factory.mktemp("tuner")))


@pytest.fixture
def configured(tuner, tmp_path) -> Callable[..., MetaEvaluateConfig]:
    judged = {"label": "tuner", "method": "learned", "tuner": tuner, "options": {"lr": "auto"}}

    def configure(**given: Any) -> MetaEvaluateConfig:
        same = {"settings": [SETTING], "contenders": [MEZO, judged], "controls": [], "out": str(tmp_path / "out")}
        return MetaEvaluateConfig(**SMALL | same | given)

    return configure


@pytest.fixture(autouse=True)
def here(monkeypatch) -> Here:
    """Runs trials in this process."""
    return use(Here(), monkeypatch)


def use(executor: Here, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setattr(evaluate, "executor_of", lambda name, processes, address=None: executor)
    return executor


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"contenders": [MEZO, MEZO]}, "'MeZO'"),
        ({"contenders": [{"label": "t", "method": "learned"}]}, "baseline-mezo"),
        ({"contenders": [MEZO]}, "nothing to judge"),
        ({"contenders": [MEZO, MEZO | {"label": "again"}, {"label": "t"}]}, "'again'"),
        ({"contenders": [MEZO, {"label": "t", "role": "referee"}]}, "'referee'"),
        ({"contenders": [MEZO, {"label": "t", "options": {"lr": 1e-3}}]}, "lr=0.001"),
        ({"contenders": [MEZO, {"label": "t", "options": {"steps": 5}}]}, "'steps'"),
        ({"contenders": [MEZO, {"label": "t", "options": {"speed": 5}}]}, "'speed'"),
        ({"contenders": [MEZO, {"label": "t", "alternatives": [{"lr": "auto"}]}]}, "alternatives"),
        ({"settings": [SETTING, SETTING]}, "'tiny'"),
        ({"settings": [SETTING | {"tasks": []}]}, "no tasks"),
        ({"settings": [SETTING | {"tasks": [TASK, TASK]}]}, "twice"),
        ({"settings": [SETTING | {"name": "a/b"}]}, "'a/b'"),
        ({"settings": [SETTING | {"name": ".."}]}, "'..'"),
        ({"contenders": [MEZO, {"label": "random sigma"}], "controls": ["random_sigma"]}, "'random sigma'"),
        ({"controls": ["prayer"]}, "'prayer'"),
        ({"judged": "MeZO"}, "judged"),
        ({"tuning_seed": 1}, "tuning_seed=1"),
        ({"seeds": 0}, "seeds=0"),
        ({"grid": []}, "grid"),
        ({"step_fraction_grid": [0.1, -1.0]}, "step_fraction_grid"),
    ],
)
def test_bad_configurations_are_refused_and_named(given, said, configured):
    with pytest.raises(ValueError, match=said):
        configured(**given)


def learned_on(task: str, folder: Path) -> str:
    provenance = Provenance("l2l/tiny", recipe={"tasks": [], "validation_tasks": f"world_season, {task}"})
    return str(Tuner.for_model(l2l.load_model("l2l/tiny"), provenance=provenance).save_pretrained(folder))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"tasks": [POOL[0]]}, "its pool"),
        ({"tasks": [VALIDATION[0]]}, "its validation"),
        ({"pool": [TASK]}, "its pool"),
        ({"validation": [TASK]}, "its validation"),
        ({"tasks": ["world_star"]}, "did you mean 'world_stars'"),
        ({"model": "./nowhere"}, "nowhere"),
    ],
)
def test_tasks_that_took_part_and_what_is_not_there_are_refused_before_anything_is_written(setting, said, configured, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run_meta_evaluation(configured(settings=[SETTING | setting]))
    assert not (tmp_path / "out").exists()


def test_a_tuner_that_was_chosen_by_a_held_out_task_is_refused(configured, tmp_path):
    judged = {"label": "t", "method": "learned", "tuner": learned_on(TASK, tmp_path / "tuner")}
    with pytest.raises(ValueError, match="learned from"):
        run_meta_evaluation(configured(contenders=[MEZO, judged]))
    with pytest.raises(ValueError, match="'tiny'"):
        run_meta_evaluation(configured(contenders=[MEZO, judged | {"tuner": {"elsewhere": "l2l-tiny"}}]))
    with pytest.raises(ValueError, match="needs a tuner"):
        run_meta_evaluation(configured(contenders=[MEZO, {"label": "t", "method": "learned"}]))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_evaluation_continues_and_repeats_no_run(configured, tmp_path, monkeypatch, capsys):
    config, first = configured(seeds=1), use(Here(most=3), monkeypatch).done
    with pytest.raises(KeyboardInterrupt):
        run_meta_evaluation(config)
    assert not (tmp_path / "out" / "meta_evaluate.json").exists()
    second = use(Here(), monkeypatch).done
    found = run_meta_evaluation(config)
    assert "continuing: 3 of 4 runs for the step sizes are done" in capsys.readouterr().out
    assert len(first) == 3
    assert len(second) == 4 + 2 - 3  # two contenders: two points each on the tuning seed, then one seed each
    assert not set(first) & set(second)
    assert json.loads((tmp_path / "out" / "meta_evaluate.json").read_text()) == finite(found)
    with pytest.raises(ValueError, match="finished"):
        run_meta_evaluation(config)


def test_it_leaves_a_verdict_records_and_pictures_and_shares_its_runs(here, configured, tmp_path):
    out, shared = tmp_path / "out", tmp_path / "shared"
    run_meta_evaluation(configured(seeds=1, runs=str(shared)))
    assert {"config.yaml", "summary.json", "losses-tiny.png", "wins.png"} <= {path.name for path in out.iterdir()}
    found = json.loads((out / "meta_evaluate.json").read_text())
    assert found["win_rate_over_mezo"] in (0.0, 1.0)
    assert found["win_rate_over_dizo"] is None
    assert {"median_pass_ratio_to_mezo_loss", "mean_accuracy_gain", "intervals", "environment"} <= found.keys()
    assert [(row["contender"], row["tuning"], row["seed"]) for row in found["runs"]] == [
        *[("MeZO", True, 100)] * 2,
        *[("tuner", True, 100)] * 2,
        ("MeZO", False, 0),
        ("tuner", False, 0),
    ]
    assert all(row["passes"] >= 4 and row["train_loss"] > 0 for row in found["runs"])
    chosen = {row["contender"]: row for row in found["protocol"]["chosen"]}
    by_dev = {row["lr"]: row["dev_loss"] for row in found["runs"] if row["tuning"] and row["contender"] == "MeZO"}
    assert chosen["MeZO"]["lr"] == min(by_dev, key=lambda lr: by_dev[lr])
    assert chosen["tuner"]["lr"] == "auto"
    assert found["departures"][1:] == [
        *("passes 4 instead of 1000", "train_size 16 instead of 1000", "dev_size 8 instead of 200"),
        *("test_size 8 instead of 500", "1 seeds instead of 3", "no DiZO"),
    ]
    summary = json.loads(next((shared / "tiny").glob("*/summary.json")).read_text())
    assert summary["config"]["max_passes"] == 4
    assert summary["config"]["test_size"] == 8
    assert len(here.done) == 6
    run_meta_evaluation(configured(seeds=2, runs=str(shared), out=str(tmp_path / "again")))
    assert len(here.done) == 6 + 2


def test_a_learning_rate_that_diverges_is_a_bad_one_and_not_an_error(configured, tmp_path, monkeypatch):
    def too_far(trial: Trial) -> dict[str, Any]:
        if trial.head.point["lr"] == 10.0:
            raise FloatingPointError("the loss is nan")
        return execute(trial)

    monkeypatch.setattr(runner, "execute", too_far)
    found = run_meta_evaluation(configured(seeds=1, grid=[1e-4, 10.0]))
    runs = {(row["contender"], row["tuning"], row["size"]): row for row in found["runs"]}
    assert runs["MeZO", True, 10.0]["diverged"]
    assert not runs["MeZO", False, 1e-4]["diverged"]
    written = json.loads((tmp_path / "out" / "meta_evaluate.json").read_text())
    assert [row["train_loss"] for row in written["runs"] if row["diverged"]] == [None]
    (note,) = (tmp_path / "out" / "runs" / "tiny").glob("*.diverged.json")
    monkeypatch.setattr(runner, "execute", lambda _: pytest.fail("what is known is not tried again"))
    head = result(Cell("tiny", "full", TASK), "MeZO", 1.0)
    trial = Trial(head, {}, str(note).removesuffix(".diverged.json"))
    assert run_trial(trial) == {"final_loss": float("inf"), "refused": ""}


def test_all_controls_are_built_and_run(configured, tuner, tmp_path, monkeypatch):
    judged = {"label": "tuner", "method": "learned", "tuner": {"tiny": tuner}, "options": {"lr": "auto"}}
    pooled = SETTING | {"pool": ["world_topic"]}
    one = {"seeds": 1, "grid": [1e-4], "step_fraction_grid": [0.1], "controls": list(CONTROLS), "passes": 4}
    found = run_meta_evaluation(configured(settings=[pooled], contenders=[MEZO, DIZO, judged], **one))
    assert list(found["win_rate_over_each_control"]) == [text for name, text in CONTROLS.items() if name != "random_turns"]
    assert list(found["protocol"]["controls_left_out"]["tiny"]) == ["random_turns"]
    given = {row["contender"]: row for row in found["protocol"]["chosen"]}
    schedules = [row["schedule"] for row in found["runs"] if row["contender"] == CONTROLS["mezo_schedule"]]
    assert sorted(set(schedules)) == ["constant", "cosine", "linear"]
    assert given[CONTROLS["random_sigma"]]["step_fraction"] == given["tuner"]["step_fraction"] == 0.1
    tuners = [Tuner.from_pretrained(path) for path in (tmp_path / "out" / "runs" / "_tuners").iterdir()]
    assert len(tuners) == 7  # the tuner itself, fresh networks, four tables, the random basis
    assert {found.architecture for found in tuners} == {"shared_mlp", "table"}


def test_a_control_that_has_no_meaning_for_a_tuner_is_left_out_with_the_reason(configured, monkeypatch):
    plain = {"label": "tuner", "method": "learned", "tuner": "l2l-tiny"}
    wanted = ["mezo_step_control", "dizo_step_control", "random_basis"]
    found = run_meta_evaluation(configured(contenders=[MEZO, plain], controls=wanted, seeds=1, grid=[1e-4], passes=4))
    assert list(found["protocol"]["controls_left_out"]["tiny"]) == wanted
    assert found["win_rate_over_controls"] is None


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "meta_evaluate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_one(path):
    config = MetaEvaluateConfig(**yaml.safe_load(path.read_text()))
    assert all(isinstance(setting, Setting) for setting in config.settings)
    assert all(isinstance(contender, Contender) for contender in config.contenders)
    assert path.read_text().startswith(f"# l2l meta-evaluate --config configs/meta_evaluate/{path.name}")
    if path.stem == "l2l-tiny":
        assert set(config.settings[0].tasks) <= set(HELD_OUT)


KILLED = """
import sys, yaml
from l2l.experiments.spec import MetaEvaluateConfig
from l2l.experiments.presets.meta_evaluate import run_meta_evaluation
run_meta_evaluation(MetaEvaluateConfig(**yaml.safe_load(sys.argv[1])))
"""


@pytest.mark.slow
def test_the_short_configuration_killed_after_its_first_run_continues_behind_it(tmp_path):
    (path,) = (path for path in CONFIGS if path.stem == "smoke")
    given = yaml.safe_load(path.read_text()) | {"out": str(tmp_path / "out"), "progress": False}
    command = [sys.executable, "-c", KILLED, yaml.safe_dump(given)]
    process = subprocess.Popen(command, start_new_session=True)  # a group of its own: its workers are killed with it
    try:
        while process.poll() is None and not summaries(tmp_path):
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = summaries(tmp_path)
    assert before
    assert run_meta_evaluation(MetaEvaluateConfig(**given))["win_rate_over_mezo"] in (0.0, 1.0)
    after = summaries(tmp_path)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before


def summaries(folder: Path) -> dict[str, int]:
    """Runs that are done, and when."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("out/runs/*/*/summary.json")}
