"""``l2l compare``, shortened: what it leaves, that nothing is done twice, and that a bad run is no crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared import TASK, TOY, Here, small

import l2l.methods
from l2l.cli import main
from l2l.experiments import runner
from l2l.experiments.presets import compare
from l2l.experiments.runner import Trial, execute
from l2l.experiments.spec import CompareConfig, plain_methods
from l2l.experiments.tables import finite
from l2l.methods.mezo import MeZO

pytestmark = pytest.mark.in_turn


@pytest.fixture
def here(monkeypatch) -> Here:
    found = Here()
    use(found, monkeypatch)
    return found


def use(executor: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "executor_of", lambda name, processes, address=None: executor)


def test_it_leaves_tables_figures_a_page_and_a_summary(here, tmp_path, capsys):
    auto = {"label": "mezo auto", "method": "mezo", "options": {"lr": "auto"}}
    out = tmp_path / "out"
    found = compare.run_comparison(small(out, methods=["mezo", auto, "adamw"], seeds=2))
    assert len(here.done) == 3 * (2 + 2)  # two step sizes on the tuning seed, then two seeds, of three methods
    assert {
        "config.yaml",
        "results.csv",
        "results.parquet",
        "compare.md",
        "index.html",
        "summary.json",
        "ranks.png",
    } <= {path.name for path in out.iterdir()}
    assert json.loads((out / "summary.json").read_text()).keys() >= {"environment", "config", "average_rank", "wins"}
    assert sorted(found["average_rank"]) == ["adamw", "mezo", "mezo auto"]
    rows = read_parquet(out)
    assert [(row["label"], row["seed"], row["tuning"]) for row in rows[:3]] == [
        ("mezo", 100, True),
        ("mezo", 100, True),
        ("mezo auto", 100, True),
    ]
    assert all(row["status"] == "ok" and row["passes"] >= 4 and row["train_loss"] > 0 for row in rows)
    by_dev = {row["lr"]: row["dev_loss"] for row in rows if row["tuning"] and row["label"] == "mezo"}
    chosen = {choice["method"]: choice for choice in found["chosen"]}
    assert chosen["mezo"]["lr"] == min(by_dev, key=lambda lr: by_dev[lr])
    assert chosen["mezo auto"]["step_fraction"] in (0.1, 0.2)
    text = (out / "compare.md").read_text()
    assert "| mezo auto |" in text and "wins over mezo" in text and "2 seeds" in text
    assert "wins over mezo" in capsys.readouterr().out


def read_parquet(out: Path) -> list[dict[str, Any]]:
    return pytest.importorskip("pyarrow.parquet").read_table(out / "results.parquet").to_pylist()


def test_an_interrupted_comparison_continues_and_a_finished_one_takes_what_is_new(tmp_path, monkeypatch, capsys):
    (tmp_path / "more").mkdir()
    config = small(tmp_path / "out", methods="all", exclude=[name for name in plain_methods() if name != "mezo"])
    first, second, third = Here(most=2), Here(), Here()
    use(first, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compare.run_comparison(config)
    assert not (tmp_path / "out" / "summary.json").exists()
    use(second, monkeypatch)
    before = compare.run_comparison(config)
    assert "2 of 2 runs for the step sizes are done" in capsys.readouterr().out
    assert (len(first.done), len(second.done)) == (2, 1)
    (tmp_path / "more" / "toy.py").write_text(TOY)
    monkeypatch.setattr(l2l.methods, "__path__", [*l2l.methods.__path__, str(tmp_path / "more")])
    use(third, monkeypatch)
    after = compare.run_comparison(config)
    assert len(third.done) == 3
    assert (list(before["average_rank"]), sorted(after["average_rank"])) == (["mezo"], ["mezo", "toy"])
    assert after["methods"]["toy"]["memory"] == "nothing at all"
    assert "nobody, nowhere" in (tmp_path / "out" / "summary.json").read_text()
    with pytest.raises(ValueError, match="another run"):
        compare.run_comparison(small(tmp_path / "out", methods="all", passes=6))
    assert (tmp_path / "out" / "summary.json").exists()


def test_at_equal_seconds_a_run_ends_with_the_step_that_spends_them(here, tmp_path):
    compare.run_comparison(small(tmp_path / "out", methods=["mezo"], grid=[1e-3], seconds=0.05))
    (row,) = read_parquet(tmp_path / "out")
    config = json.loads((Path(row["folder"]) / "summary.json").read_text())["config"]
    assert (config["max_seconds"], config["max_passes"]) == (0.05, None)
    assert row["seconds"] >= 0.05 and row["passes"] == 2 * row["steps"]
    assert "methods at 0.05 seconds of training" in (tmp_path / "out" / "compare.md").read_text()


def test_a_method_of_another_package_takes_part_by_its_path_and_edited_it_runs_again(here, tmp_path, monkeypatch):
    (tmp_path / "some_package").mkdir()
    source = tmp_path / "some_package" / "toy_of_mine.py"
    source.write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small(tmp_path / "out", methods=["mezo", "some_package.toy_of_mine"], grid=[1e-3])
    found = compare.run_comparison(config)
    assert sorted(found["average_rank"]) == ["mezo", "some_package.toy_of_mine"]
    assert "some_package.toy_of_mine" in (tmp_path / "out" / "index.html").read_text()
    assert len(here.done) == 2
    source.write_text(TOY + "# edited\n")
    compare.run_comparison(config)
    assert len(here.done) == 3


def test_a_run_that_diverges_is_a_bad_cell_and_not_a_crash(here, tmp_path, monkeypatch):
    def too_far(trial: Trial) -> dict[str, Any]:
        if trial.head.method == "dizo" and trial.head.seed == 1:
            raise FloatingPointError("the loss is nan")
        return execute(trial)

    monkeypatch.setattr(runner, "execute", too_far)
    found = compare.run_comparison(small(tmp_path / "out", grid=[1e-3], seeds=2))
    assert found["average_rank"] == {"mezo": 1.0, "dizo": 2.0}
    assert (found["diverged"], found["diverged_while_tuning"]) == (1, 0)
    assert [row["status"] for row in read_parquet(tmp_path / "out")] == ["ok", "ok", "ok", "diverged"]
    assert "(1 of 2 diverged)" in (tmp_path / "out" / "compare.md").read_text()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["average_rank"] == finite(found)["average_rank"]


def test_a_run_that_is_refused_says_why_and_the_others_go_on(here, tmp_path, monkeypatch):
    def refuse(trial: Trial) -> dict[str, Any]:
        if trial.head.method == "dizo":
            raise ValueError("not\nhere")
        return execute(trial)

    monkeypatch.setattr(runner, "execute", refuse)
    found = compare.run_comparison(small(tmp_path / "out", grid=[1e-3]))
    assert (found["refused"], list(found["average_rank"])) == (1, ["mezo"])
    assert "refused: dizo tiny full world_stars not here" in (tmp_path / "out" / "compare.md").read_text()


def test_a_method_whose_steps_have_a_length_of_their_own_is_told_of_unless_it_has_a_scale(here, tmp_path, monkeypatch):
    monkeypatch.setattr(MeZO, "step_is_normalized", True, raising=False)
    compare.run_comparison(small(tmp_path / "out", methods=["mezo"], grid=[1e-3]))
    assert "mezo: steps of a length of their own" in (tmp_path / "out" / "compare.md").read_text()
    scaled = {"method": "mezo", "scale": 2.0}
    compare.run_comparison(small(tmp_path / "scaled", methods=[scaled], grid=[1e-3]))
    assert "a length of their own" not in (tmp_path / "scaled" / "compare.md").read_text()


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "compare").glob("*.yaml"))


def test_the_check_is_of_what_the_long_comparison_ran_and_on_other_tasks():
    configs = {path.stem: CompareConfig(**yaml.safe_load(path.read_text())) for path in CONFIGS}
    long, check = configs["all"], configs["fresh"]
    theirs, own = ({entry.label: entry for entry in config.contenders} for config in (long, check))
    assert own and all(theirs[label] == entry for label, entry in own.items())
    assert (long.grid, long.passes, long.train_size) == (check.grid, check.passes, check.train_size)
    seen, new = ({task for setting in config.settings for task in setting.tasks} for config in (long, check))
    assert not seen & new


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_one_and_begins_with_its_command(path, capsys):
    config = CompareConfig(**yaml.safe_load(path.read_text()))
    line, *_ = path.read_text().splitlines()
    assert line.startswith(f"# l2l compare --config configs/compare/{path.name}")
    assert ("all" in config.methods) == (path.stem != "fresh")
    assert [name for name, value in yaml.safe_load(path.read_text()).items() if getattr(CompareConfig(), name) == value] == []
    with pytest.raises(SystemExit) as leaving:
        main(["compare", "--config", str(path), "--print_config"])
    assert leaving.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert CompareConfig(**printed) == CompareConfig(**yaml.safe_load(path.read_text()) | {"out": printed["out"]})


def test_the_short_configuration_is_two_embedded_tasks_and_one_seed():
    (tiny,) = (CompareConfig(**yaml.safe_load(path.read_text())) for path in CONFIGS if path.stem == "tiny")
    assert ([setting.tasks for setting in tiny.settings], tiny.seeds) == ([["world_stars", "world_opposite"]], 1)
    assert {"learned", "mezo", "mezo auto"} <= {entry.label for entry in tiny.contenders}


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    given = ["--methods", "[mezo, mzo]", "--out", str(tmp_path / "out"), "--progress", "false"]
    assert main(["compare", *given, "--settings", f"[{{name: t, tasks: [{TASK}]}}]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("l2l: unknown method 'mzo'") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
