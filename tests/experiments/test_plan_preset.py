"""``l2l plan``: costs, scores and the choice exactly; a short run from end to end, interrupted and continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, repeat
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compared import Here

import l2l
from l2l.cli import main
from l2l.estimators import finite_loss
from l2l.experiments import runner
from l2l.experiments.presets import plan
from l2l.experiments.presets.plan import Candidate, Cost, PlanConfig, better_half, check_budgets, choose_plan, scores_of
from l2l.experiments.spec import Contender, Setting
from l2l.tuners import Depth, Provenance, TrainingPlan, Tuner

pytestmark = pytest.mark.in_turn

LEARNED = {"method": "learned", "lr": "auto"}
RSGN = {"method": "learned+rsgn", "num_directions": 2, "batch_size": 8}
SMALL: dict[str, Any] = {
    **{"tasks": ["world_topic", "world_job"], "candidates": [LEARNED, RSGN], "depths": ["top:1"]},
    **{"controls": [{"method": "mezo", "lr": "auto"}], "budgets": [12.0], "screen": 0.5, "batch_size": 4},
    **{"train_size": 16, "dev_size": 8, "evaluations": 1, "progress": False},
}


def candidates(**by_depth: dict[str, Any]) -> list[Candidate]:
    return [Candidate(recipe, layers) for recipe in by_depth.values() for layers in ("top:1", "all")]


def test_a_run_pays_for_its_passes_and_once_for_the_states_of_each_row():
    cost = Cost(per_pass=0.25, states=15.0, passes=5, epoch=100)
    assert [cost.spent(passes) for passes in (0, 50, 100, 200)] == [0, 20, 40, 65]
    assert [cost.limit(budget) for budget in (20, 40, 65)] == [50, 100, 200]
    assert Cost(1, 0, 2, 100).limit(7.5) == 7
    check_budgets({"a": 2}, {"a": cost})
    with pytest.raises(ValueError, match=r"'a' takes 2.0 whole passes per step.* budget of 1.9: raise budgets or screen"):
        check_budgets({"a": 1.9}, {"a": cost})


@dataclass
class TimedClosures:
    """Of a step the first pass takes five seconds, a further one three, and where it shares the first one's states, one."""

    clock: list[float]
    states: object = None
    head_displaced: object = None

    def at(self, step: int) -> Callable[[], float]:
        seconds = chain([5.0], repeat(3.0 if self.states is None else 1.0))

        def evaluated() -> float:
            self.clock[0] += next(seconds)
            return 0.5

        return evaluated


def test_a_pass_takes_the_mean_of_a_steps_passes_by_what_they_share(monkeypatch):
    closures = TimedClosures([0.0])
    monkeypatch.setattr(plan, "thread_time", lambda: closures.clock[0])
    assert plan.pass_seconds(closures, 0, 7, 7, torch.device("cpu")) == (5 + 6 * 3) / 7
    sharing = replace(closures, states="kept", head_displaced=lambda: False)
    assert plan.pass_seconds(sharing, 0, 7, 3, torch.device("cpu")) == (5 + 2 * 3 + 4 * 1) / 7


def test_the_score_is_the_share_of_the_reachable_gain_that_is_left():
    losses = {"a": [1.0, 3.0, 9.0], "b": [2.0, 1.0, 9.0], "c": [3.0, inf, 9.0]}
    assert scores_of(losses, [3.0, 5.0, 9.0]) == {"a": (0 + 0.5) / 2, "b": (0.5 + 0) / 2, "c": inf}  # the third tells nothing
    with pytest.raises(ValueError, match="no candidate lowered a dev loss: give larger budgets"):
        scores_of({"a": [9.0]}, [9.0])


def test_the_worse_half_is_dropped_and_a_tie_keeps_the_order():
    every = candidates(first=LEARNED, second=RSGN)
    scores = dict(zip([one.label for one in every], (0.3, inf, 0.1, 0.3), strict=True))
    assert better_half(every, scores) == [every[0], every[2]]
    assert better_half(every[:3], scores) == [every[0], every[2]]


def test_the_plan_has_the_recipe_that_is_best_over_budgets_with_its_best_depth_at_each():
    every = candidates(first=LEARNED, second=RSGN)
    top, whole, rsgn_top, rsgn_whole = (one.label for one in every)
    scores = {
        100.0: {top: 0.0, whole: 0.5, rsgn_top: 0.1, rsgn_whole: 0.3},
        400.0: {top: 0.6, rsgn_top: 0.2, rsgn_whole: 0.1},  # one was dropped
    }
    found, own = choose_plan(every, scores, batch_size=4)
    assert (found.method, found.num_directions, found.batch_size) == ("learned+rsgn", 2, 8)
    assert found.depths == (Depth(0, "top:1"), Depth(200, "all"))
    assert own == {100.0: 0.1, 400.0: 0.1}
    scores[400.0][rsgn_top] = 0.0
    assert choose_plan(every, scores, 4)[0].depths == (Depth(0, "top:1"),)
    with pytest.raises(ValueError, match="no candidate has runs that ended at every budget"):
        choose_plan(every, {100.0: {top: 0.0}, 400.0: {rsgn_top: 0.0}}, 4)


def test_layers_that_the_plan_does_not_choose_keep_the_options_that_were_best_there():
    wide, narrow = RSGN | {"num_directions": 32, "lr": 0.5}, RSGN | {"epsilon": 1e-2}
    every = candidates(first=wide, second=narrow, third=LEARNED)
    names = ("top wide", "all wide", "top narrow", "all narrow", "top learned", "all learned")
    labels = dict(zip(names, (one.label for one in every), strict=True))

    def options(**scores: float) -> Any:
        return choose_plan(every, {50.0: {labels[name.replace("_", " ")]: score for name, score in scores.items()}}, 4)[0]

    chosen = options(top_wide=0.0, all_wide=0.4, top_narrow=0.1, all_narrow=0.3, all_learned=0.2)
    assert (chosen.depths, chosen.num_directions) == ((Depth(0, "top:1"),), 32)
    assert chosen.layer_options == {"all": {"num_directions": 2, "lr": None, "epsilon": 1e-2}}, "another method is none for it"
    assert chosen.options_at("all") == {"method": "learned+rsgn", "method_args": {}, **narrow}
    assert options(top_wide=0.0, all_wide=0.2, all_narrow=0.3).layer_options == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ["world_topic", "world_stars"]}, "task 'world_stars' is held out"),
        ({"tasks": ["world_topic"], "held_out": ["world_topic"]}, "task 'world_topic' is held out"),
        ({"candidates": [{"method": "learned", "seed": 3}]}, "a candidate has 'seed'; a plan holds method"),
        ({"candidates": [{"lr": 1.0}]}, "names no method"),
        ({"candidates": [LEARNED, LEARNED]}, "two candidates are called"),
        ({"budgets": [800.0, 200.0]}, "must ascend"),
        ({"screen": 1.0}, "screen=1.0 must be at least 0 and below 1"),
        ({"model": "elsewhere", "tasks": []}, "there is no task"),
    ],
)
def test_bad_input_is_refused_in_a_line(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**SMALL | given)


def test_a_candidate_that_cannot_run_is_refused_before_anything_is_written(tmp_path):
    config = PlanConfig(
        **SMALL | {"out": str(tmp_path / "out"), "candidates": [{"method": "learned", "train_layers": "top:99"}]}
    )
    with pytest.raises(ValueError, match="asks for 99 layers"):
        plan.run_plan(config)
    assert not (tmp_path / "out").exists()


def test_a_fresh_tuner_has_the_sigma_of_mezo_and_is_given_by_a_word(tmp_path, monkeypatch):
    tuner = plan.base_tuner(PlanConfig(**SMALL, tuner="fresh"))
    assert tuner.plan is None and tuner.architecture == "table" and tuner.provenance.base_model == "l2l/tiny"
    assert torch.equal(tuner.network(torch.zeros(len(tuner.fingerprint.names), 3)), torch.ones(len(tuner.fingerprint.names)))
    monkeypatch.setattr(plan, "pass_seconds", lambda closures, *_: finite_loss(closures.at(0)))
    monkeypatch.setattr(plan, "executor_of", lambda name, processes, address=None: Here())
    plan.run_plan(PlanConfig(**{**SMALL, "controls": [], "screen": 0.0}, tuner="fresh", out=str(tmp_path)))
    made = Tuner.from_pretrained(tmp_path / "tuner")
    assert made.plan is not None and made.plan.depths == (Depth(0, "top:1"),) and made.architecture == "table"


def test_a_plan_is_chosen_from_real_runs_continued_and_used_by_fine_tuning(tmp_path, monkeypatch, capsys):
    # A loss: as many runs on every machine.
    monkeypatch.setattr(plan, "pass_seconds", lambda closures, *_: finite_loss(closures.at(0)))
    config = PlanConfig(**SMALL, out=str(tmp_path / "out"))
    first, second = Here(most=3), Here()
    monkeypatch.setattr(plan, "executor_of", lambda name, processes, address=None: first)
    with pytest.raises(KeyboardInterrupt):
        plan.run_plan(config)
    costs = (tmp_path / "out" / "costs.json").read_text()
    monkeypatch.setattr(plan, "executor_of", lambda name, processes, address=None: second)
    found = plan.run_plan(config)
    # Screened: two candidates on two tasks; then the better one, and the control.
    assert len(first.done) == 3 and len(second.done) == 1 + 2 + 2
    assert (tmp_path / "out" / "costs.json").read_text() == costs  # a second measurement would give other runs
    tuner = Tuner.from_pretrained(tmp_path / "out" / "tuner")
    assert tuner.plan is not None and tuner.plan.depths == (Depth(0, "top:1"),)
    assert found["plan"]["method"] == tuner.plan.method
    evidence = tuner.provenance.results["plan"]
    (scores,) = evidence["scores"].values()
    assert min(scores.values()) >= 0 and scores["plan"] < inf and len(scores) == 3  # 0: the best on every task
    assert len(evidence["beats"]) + len(evidence["does_not_beat"]) == 1
    assert (tmp_path / "out" / "plan.png").stat().st_size > 0 and (tmp_path / "out" / "summary.json").exists()
    assert (
        "plan: method" in capsys.readouterr().out and "Training plan" in (tmp_path / "out" / "tuner" / "README.md").read_text()
    )
    sizes = {"train_size": 16, "dev_size": 8, "test_size": 8, "save": "log", "progress": False}
    run = l2l.fine_tune(task="world_stars", tuner=tuner, max_passes=8, out=str(tmp_path / "run"), **sizes)
    assert run.summary["method"] == tuner.plan.method and run.summary["config"]["train_layers"] == "top:1"
    with pytest.raises(ValueError, match="has learned from task 'world_job'"):  # as with the tasks of its pool
        runner._load_tuner(
            Setting("s", tasks=["world_job"]), Contender(method="learned", tuner=str(tmp_path / "out/tuner")), True
        )


def test_a_plan_is_extended_by_what_is_best_at_further_layers(tmp_path, monkeypatch):
    before = TrainingPlan(
        "rsgn", num_directions=4, batch_size=4, depths=[Depth(0, "top:1")], layer_options={"top:2": {"lr": 0.5}}
    )
    origin = Provenance("l2l/tiny", recipe={"plan_tasks": ["world_stray"]}, results={"plan": {"seeds": 1}})
    made = Tuner.for_model(l2l.load_model("l2l/tiny"), provenance=origin).with_plan(before)
    source = str(made.save_pretrained(tmp_path / "before"))
    candidates = [{"method": "rsgn", "num_directions": n} for n in (1, 2)]
    given = {
        **SMALL,
        "tuner": source,
        "extend": True,
        "candidates": candidates,
        "depths": ["all"],
        "controls": [],
        "screen": 0.0,
    }
    monkeypatch.setattr(plan, "pass_seconds", lambda closures, *_: finite_loss(closures.at(0)))
    monkeypatch.setattr(plan, "executor_of", lambda name, processes, address=None: Here())
    found = plan.run_plan(PlanConfig(**given, out=str(tmp_path / "out")))
    tuner = Tuner.from_pretrained(tmp_path / "out" / "tuner")
    (scores,) = found["scores"].values()
    best = min(plan.PlanConfig(**given).contenders, key=lambda one: scores[one.label])
    own = {"num_directions": best.given["num_directions"]}
    assert tuner.plan == replace(before, layer_options={"top:2": {"lr": 0.5}, "all": own})
    assert tuner.provenance.recipe["plan_tasks"] == ["world_stray", "world_topic", "world_job"]
    assert tuner.provenance.results.keys() == {"plan", "plan of all"} and tuner.provenance.results["plan"] == {"seeds": 1}
    for wrong, message in (
        ({"tuner": "fresh"}, "tuner 'fresh' has none: leave extend out"),
        ({"tuner": "l2l-tiny"}, "has none: leave extend out"),
        ({"candidates": [LEARNED]}, "cannot be added to a plan whose method 'rsgn' and batch_size 4 hold for all layers"),
        ({"batch_size": 8}, "cannot be added to a plan whose method 'rsgn' and batch_size 4"),
        ({"depths": ["top:1"]}, "trains layers that the plan chooses itself: give it other layers"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.run_plan(PlanConfig(**{**given, **wrong}, out=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "plan").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_and_is_read_as_it_stands(path: Path, capsys):
    assert path.read_text().startswith(f"# l2l plan --config configs/plan/{path.name} --out ")
    given = yaml.safe_load(path.read_text())
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(path), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {name: printed[name] for name in given} == given
    config, default = PlanConfig(**given), PlanConfig()
    assert [name for name in given if getattr(config, name) == getattr(default, name)] == []
