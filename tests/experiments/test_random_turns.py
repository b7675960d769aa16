"""The control of turns: the tuner's blocks dealt at random, and tables of sigma that take no turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compared import Here

import l2l
from l2l.experiments.presets import meta_evaluate as evaluate
from l2l.experiments.spec import MetaEvaluateConfig
from l2l.params import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.schedule import BlockSchedule

SMALL: dict[str, Any] = {
    "settings": [{"name": "tiny", "tasks": ["world_stars"], "batch_size": 4}],
    "controls": ["random_sigma", "random_turns"],
    "passes": 4,
    "seeds": 1,
    "train_size": 8,
    "dev_size": 4,
    "test_size": 4,
    "grid": [1e-4],
    "step_fraction_grid": [0.1],
    "processes": 1,
    "progress": False,
}


@pytest.mark.slow
def test_a_tuner_that_takes_turns_meets_random_groups_and_tables_that_take_none(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(evaluate, "executor_of", lambda name, processes, address=None: Here())
    model = l2l.load_model("l2l/tiny")
    turns = BlockSchedule.by_role(Blocks.of(model))
    Tuner.for_model(model, "table", block_schedule=turns).save_pretrained(tmp_path / "turns")
    contenders = [
        {"label": "MeZO", "method": "mezo", "role": "baseline-mezo"},
        {"label": "tuner", "method": "learned", "tuner": str(tmp_path / "turns")},
    ]
    found = evaluate.run_meta_evaluation(MetaEvaluateConfig(**SMALL | {"contenders": contenders, "out": str(tmp_path / "out")}))
    assert set(found["win_rate_over_each_control"]) == {"random sigma", "turns of random groups"}
    kept = [Tuner.from_pretrained(path).block_schedule for path in (tmp_path / "out" / "runs" / "_tuners").iterdir()]
    (dealt,) = [one for one in kept if one and one != turns]
    assert len(kept) == 3 and kept.count(None) == kept.count(turns) == 1
    assert sorted(map(len, dealt.groups)) == sorted(map(len, turns.groups))
