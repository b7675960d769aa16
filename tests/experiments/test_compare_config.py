"""What a comparison refuses before it begins, who takes part in it, and that all are tuned alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from compared import TASK, TOY, small

import l2l.methods
from l2l.experiments import runner
from l2l.experiments.spec import CompareConfig, Contender, Place, SchemeEntry, plain_methods
from l2l.methods import method_class, method_names
from l2l.methods.base import FirstOrder

SETTING = {"name": "tiny", "tasks": [TASK]}


def check_all(config: CompareConfig) -> list[Place]:
    return runner.check_all(config, config.contenders)


AUTO = {"label": "auto", "method": "mezo", "options": {"lr": "auto"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": [{"method": "mezo", "options": {"steps": 5}}]}, "'steps'"),
        ({"methods": [{"method": "mezo", "options": {"speed": 5}}]}, "'speed'"),
        ({"methods": [{"method": "mezo", "options": {"lr": 1e-3}}]}, "lr=0.001"),
        ({"methods": [{"method": "mezo", "options": {"scheme": "lora"}}]}, "scheme"),
        ({"methods": [{"method": "mezo", "scale": -1.0}]}, "scale=-1.0"),
        ({"methods": [{"method": "mezo", "scale": 2.0, "grid": [1e-3]}]}, "a scale"),
        ({"methods": [AUTO | {"scale": 2.0}]}, "pure number"),
        ({"schemes": ["sideways"]}, "'sideways'"),
        ({"schemes": ["full", "full"]}, "'full'"),
        ({"schemes": []}, "no scheme"),
        ({"schemes": [{"name": "lora", "options": {"steps": 5}}]}, "'steps'"),
        ({"settings": [SETTING, SETTING]}, "'tiny'"),
        ({"settings": [SETTING | {"pool": ["world_topic"]}]}, "pool"),
        ({"tuning_seed": 0}, "tuning_seed=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"grid": []}, "grid"),
        ({"executor": "slurm"}, "'slurm'"),
        ({"seconds": 0.0}, "seconds=0.0"),
        ({"seconds": 1.0, "settings": [SETTING | {"passes": 5}]}, "limited by seconds"),
    ],
)
def test_bad_configurations_are_refused_and_named(given, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        small(tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": []}, "no method"),
        ({"methods": ["mezo", "mezo"]}, "'mezo'"),
        ({"methods": ["icl"]}, "no steps"),
        ({"methods": "all", "exclude": ["dizzo"]}, "did you mean 'dizo'"),
        ({"baseline": "adam"}, "'adam'"),
        ({"methods": ["mezo", {"method": "dizo", "grid": [1e-4, 1e-3, 1e-2]}]}, "'dizo' would choose among 3"),
        ({"methods": ["mezo", "dizo", AUTO], "step_fraction_grid": [0.1, 0.2, 0.3]}, "'auto' would choose among 3"),
        ({"grid": [1e-4, 1e-4]}, "twice"),
        ({"methods": ["mzo"]}, "did you mean 'mezo'"),
        ({"methods": ["nowhere.to_be_found"]}, "nowhere.to_be_found"),
        ({"methods": ["mezo", "learned"]}, "'learned' can take part nowhere: .*needs a tuner"),
        ({"methods": [{"method": "dizo", "method_args": {"intervals": 3}}]}, "'dizo' can take part nowhere.*intervals"),
        ({"settings": [SETTING | {"tasks": ["world_star"]}]}, "did you mean 'world_stars'"),
        ({"settings": [SETTING | {"tasks": ["sst2"], "data_dir": "nowhere"}]}, "nowhere"),
        ({"settings": [SETTING | {"model": "./nowhere"}]}, "nowhere"),
        ({"settings": [SETTING | {"tasks": ["world_topic"]}], "methods": [{"method": "learned", "tuner": "l2l-tiny"}]},
         "has learned from task 'world_topic'"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_and_named_before_anything_is_written(given, said, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        check_all(small(tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_all_are_the_zeroth_order_methods_that_need_nothing_but_a_learning_rate(tmp_path):
    found = [entry.label for entry in small(tmp_path, methods="all").contenders]
    assert found == plain_methods()
    assert {"mezo", "dizo"} <= set(found) <= set(method_names())
    assert "learned" not in found
    assert not any(issubclass(method_class(name), FirstOrder) for name in found)


def test_a_new_file_among_the_methods_is_one_of_all(tmp_path: Path, monkeypatch):
    before = plain_methods()
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(l2l.methods, "__path__", [*l2l.methods.__path__, str(tmp_path)])
    found = [entry.label for entry in small(tmp_path, methods="all").contenders]
    assert sorted([*before, "toy"]) == found
    assert "toy" not in [entry.label for entry in small(tmp_path, methods="all", exclude=["toy"]).contenders]


def test_a_list_holds_all_beside_others_and_an_entry_takes_the_place_of_its_label(tmp_path):
    found = {e.label: e for e in small(tmp_path, methods=["all", {"method": "dizo", "scale": 3.0}, AUTO, "adamw"]).contenders}
    assert list(found) == [*plain_methods(), "auto", "adamw"]
    assert (found["dizo"].scale, found["mezo"].scale) == (3.0, 1.0)
    assert [entry.label for entry in small(tmp_path, methods="dizo, mezo").contenders] == ["dizo", "mezo"]


def test_the_grid_is_shared_up_to_the_scales_of_method_and_scheme(tmp_path):
    config = small(tmp_path, grid=[3e-4, 1e-4])
    (setting,) = config.settings

    def sizes(entry: Contender, scheme: SchemeEntry) -> list[object]:
        return [point.get("step_fraction", point["lr"]) for point in config.points(setting, scheme, entry)]

    assert sizes(Contender("mezo", "mezo"), SchemeEntry()) == [1e-4, 3e-4]
    assert sizes(Contender("mezo", "mezo", scale=0.1), SchemeEntry()) == [1e-5, 3e-5]
    assert sizes(Contender("mezo", "mezo", scale=0.1), SchemeEntry("lora", scale=30)) == [3e-4, 9e-4]
    around_one = pytest.approx([3**-0.5, 3**0.5], rel=1e-5)  # the default of rsgn
    assert sizes(Contender("rsgn", "rsgn"), SchemeEntry()) == around_one
    assert sizes(Contender("rsgn", "rsgn", grid=[1.0]), SchemeEntry()) == [1.0]
    assert sizes(Contender("mezo", "mezo", grid=[1.0, 2.0]), SchemeEntry()) == [1.0, 2.0]
    assert sizes(Contender("mezo", "mezo", options={"lr": "auto"}), SchemeEntry("lora", scale=30)) == [0.1, 0.2]


def test_a_method_that_a_scheme_refuses_is_left_out_there_with_the_reason_and_runs_elsewhere(tmp_path):
    learned = {"method": "learned", "tuner": "l2l-tiny-ratio"}
    full, lora = check_all(small(tmp_path, methods=["mezo", learned], schemes=["full", "lora"]))
    assert (list(full.entries), list(lora.entries)) == (["mezo", "learned"], ["mezo"])
    assert "scheme 'lora'" in lora.left_out["learned"]
    assert [entry.steps for entry in full.entries.values()] == [None, 2]  # the learned one: four passes, two a step
    assert full.entries["mezo"].costs.trained_bytes > lora.entries["mezo"].costs.trained_bytes > 0


def test_estimator_and_directions_are_options_of_a_contender(tmp_path: Path):
    options = {"estimator": "one_sided", "num_directions": 3}
    mezo, fzoo = ({"label": f"one-sided {method}", "method": method, "options": options} for method in ("mezo", "fzoo"))
    (place,) = check_all(small(tmp_path, methods=["mezo", mezo]))
    assert set(place.entries) == {"mezo", "one-sided mezo"}
    with pytest.raises(ValueError, match="estimator='one_sided' is no choice with method 'fzoo'"):
        check_all(small(tmp_path, methods=["mezo", fzoo]))


def test_a_contender_of_one_step_size_takes_part_and_runs_no_trials(tmp_path):
    config = small(tmp_path, methods=["mezo", {"label": "planned", "method": "fzoo", "grid": [1e-2]}])
    (place, *_) = check_all(config)
    asked: list[runner.Trial] = []

    def executor(trials, after):
        asked.extend(trials)
        raise KeyboardInterrupt

    planned = runner.Runner(config, executor, [place], tmp_path)
    assert [len(planned.points(place, label)) for label in ("mezo", "planned")] == [len(config.grid), 1]
    with pytest.raises(KeyboardInterrupt):
        planned.tune()
    assert {trial.head.contender for trial in asked} == {"mezo"}
