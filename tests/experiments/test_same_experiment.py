"""Kind 1 of issue 16 in meta-training and experiments: what is continued has read what it reads now, or names what changed."""

from __future__ import annotations

import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared import Here, small

import l2l
from l2l.experiments.presets import compare, plan
from l2l.experiments.presets.plan import PlanConfig
from l2l.meta.module import MetaTraining
from l2l.report.run_directory import Stopped, read_tensors

TASK = {
    "data_files": {"train": "train.csv", "validation": "test.csv"},
    "training_split": "train",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ text }} the day was",
    "doc_to_choice": ["bad", "good"],
    "doc_to_target": "{{ 'good' if mood == 'happy' else 'bad' }}",
}
META: dict[str, Any] = {
    **{"tasks": ["data/moods.yaml", "world_topic"], "steps": 4, "lr": 1e-3, "batch_size": 2, "train_size": 8, "dev_size": 4},
    **{"checkpoint_every": 1, "log_every": 1, "restart_every": 2, "progress": False, "out": "meta"},
}


def write_csv(path: Path, number: int, first: int = 0, moods: tuple[str, str] = ("sad", "happy")) -> None:
    rows = [f"the cat of day {first + i} slept .,{moods[i % 2]}\n" for i in range(number)]
    path.write_text("text,mood\n" + "".join(rows))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, with a task of files in ``data``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", 40)
    write_csv(tmp_path / "data" / "test.csv", 12, 100)
    (tmp_path / "data" / "moods.yaml").write_text(yaml.safe_dump({"task": "moods", **TASK}))
    return tmp_path


def compared(monkeypatch: pytest.MonkeyPatch, task: str = "data/moods.yaml", **given: Any) -> list[str]:
    """The runs that a comparison has done."""
    executor = Here()
    monkeypatch.setattr(compare, "executor_of", lambda name, processes, address=None: executor)
    settings = [{"name": "tiny", "tasks": [task], "batch_size": 4}]
    compare.run_comparison(small("out", settings=settings, methods=["mezo"], grid=[1e-3], **given))
    return executor.done


@pytest.mark.slow
def test_a_comparison_on_other_rows_is_refused_and_on_moved_ones_repeats_nothing(here, monkeypatch):
    assert len(compared(monkeypatch)) == 1
    shutil.copytree("data", "elsewhere")
    assert compared(monkeypatch, "elsewhere/moods.yaml") == compared(monkeypatch, "./data/moods.yaml") == []
    write_csv(here / "data" / "train.csv", 40, moods=("happy", "sad"))
    said = r"read something else: tiny task 0 files train.csv: \w{16} -> \w{16}; .*train rows labels: .*Choose another"
    page = (here / "out" / "index.html").read_bytes()
    with pytest.raises(ValueError, match=said):
        compared(monkeypatch)
    assert (here / "out" / "index.html").read_bytes() == page


@pytest.mark.slow
def test_runs_that_comparisons_share_are_those_of_the_same_rows(here, monkeypatch):
    assert len(compared(monkeypatch, runs="shared")) == 1
    write_csv(here / "data" / "test.csv", 12, 200)
    shutil.move("out", "before")
    assert len(compared(monkeypatch, runs="shared")) == 1  # and not none


def test_without_its_record_a_comparison_on_another_task_is_refused(here, monkeypatch, caplog):
    compared(monkeypatch)
    (here / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"data/moods\.yaml -> world_stars"), caplog.at_level(logging.WARNING):
        compared(monkeypatch, "world_stars")
    assert "is missing or damaged" in caplog.text


def test_a_plan_knows_its_rows_and_its_tuner(here, monkeypatch):
    for seed, name in ((1, "tuner"), (2, "other")):
        l2l.Tuner.for_model(l2l.load_model("l2l/tiny"), seed=seed).save_pretrained(name)
    given = {
        "tasks": ["data/moods.yaml"],
        "depths": ["all"],
        "controls": [],
        "budgets": [8.0],
        "batch_size": 4,
        "train_size": 16,
    }
    given |= {"dev_size": 8, "evaluations": 1, "progress": False, "out": "out", "screen": 0.0, "tuner": "tuner"}
    monkeypatch.setattr(plan, "executor_of", lambda name, processes, address=None: Here(most=0))
    with pytest.raises(KeyboardInterrupt):
        plan.run_plan(PlanConfig(**given))
    shutil.rmtree("tuner")
    shutil.copytree("other", "tuner")
    with pytest.raises(ValueError, match=r"read something else: tuner: \w{16} -> \w{16}\. Choose another"):
        plan.run_plan(PlanConfig(**given))


def meta_train_until(step: int, **given: Any) -> None:
    """Meta-training that SIGTERM reaches in an outer step."""
    original = MetaTraining.training_step

    def patched(self: MetaTraining, batch: int, batch_idx: int) -> None:
        if self.global_step == step:
            signal.raise_signal(signal.SIGTERM)
        original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match=f"stopped after outer step {step + 1}; a checkp"):
        patch.setattr(MetaTraining, "training_step", patched)
        l2l.meta_train(**META | given)


def test_meta_training_ends_at_a_step_when_asked_and_goes_on_for_longer_but_not_on_other_rows(here):
    meta_train_until(1, checkpoint_every=100)
    assert read_tensors(here / "meta" / "checkpoint.safetensors")["global_step"] == 2
    content = (here / "data" / "train.csv").read_bytes()
    write_csv(here / "data" / "train.csv", 40, moods=("happy", "sad"))
    with pytest.raises(ValueError, match=r"read something else: task 0 train rows labels: \w{16} -> \w{16}; .*Choose another"):
        l2l.meta_train(**META)
    (here / "data" / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match="has taken 2 steps, and steps=1: give a larger number"):
        l2l.meta_train(**META | {"steps": 1})
    shutil.move("data", "moved")
    longer = META | {"steps": 6, "tasks": ["moved/moods.yaml", "world_topic"]}
    l2l.meta_train(**longer)
    l2l.meta_train(**longer | {"out": "whole"})
    one, other = ((here / out / "tuner.safetensors").read_bytes() for out in ("meta", "whole"))
    assert one == other
