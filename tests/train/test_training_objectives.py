"""Training on what has no gradient: accuracy, F1 of generated answers, and any callable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import l2l
from l2l.models.load import load_tokenizer
from l2l.tasks import get_task
from l2l.tasks.base import Example, GeneratedData, Task
from l2l.tasks.evaluate import evaluate
from l2l.tasks.rows import load_splits
from l2l.train.config import FineTuneConfig
from l2l.train.objectives import find_objective, imported
from l2l.train.runlog import read_run_log

SMALL: dict[str, Any] = {
    "task": "world_topic",
    "lr": 1e-3,
    "steps": 2,
    "batch_size": 4,
    "train_size": 16,
    "dev_size": 8,
    "test_size": 8,
    "log_every": 1,
    "progress": False,
    "save": "log",
}
ANSWERED = Task(
    name="answered",
    source=GeneratedData(lambda split, count, seed: []),
    fields=("say",),
    example=lambda row: Example(f"{row['say']}\nAnswer:", (f" {row['say']}\n",), answers=(row["say"],)),
    form="lm",
    metric="f1",
)
ROWS = [{"say": "the fox"}, {"say": "the hen"}, {"say": "rain and snow"}]


def fine_tune(out: Path, **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune("l2l/tiny", out=str(out), **{**SMALL, **options})


def weight_sum(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """An objective that this test names by its path: it never asks the rows, but shows that they came."""
    assert len(rows) in (4, 8)
    return sum(parameter.double().square().sum().item() for parameter in model.parameters()) / 1000


def test_accuracy_as_objective_is_minus_the_accuracy_of_the_batch():
    task, tokenizer = get_task("world_topic"), load_tokenizer("l2l/tiny")
    rows = load_splits(task, None, 12, 1, 1).train
    model = l2l.load_model("l2l/tiny")
    objective = find_objective("accuracy", task, rows[0])
    assert objective is not None
    assert objective(model, tokenizer, rows) == -evaluate(model, tokenizer, task, rows).value


def test_f1_and_exact_match_are_of_what_the_model_generates(monkeypatch):
    asked: dict[str, Any] = {}

    def generated(model: Any, tokenizer: Any, prompts: list[str], limit: int, **options: Any) -> list[str]:
        asked.update(options, prompts=prompts)
        return ["fox", "the red hen", "sun"]

    monkeypatch.setattr("l2l.tasks.evaluate.generate", generated)
    model = l2l.load_model("l2l/tiny")
    values = {}
    for name in ("f1", "exact_match"):
        objective = find_objective(name, ANSWERED, ROWS[0], max_new_tokens=6, micro_batch=2)
        assert objective is not None
        values[name] = objective(model, None, ROWS)
    assert values["f1"] == pytest.approx(-(1 + 2 / 3 + 0) / 3)
    assert values["exact_match"] == pytest.approx(-1 / 3)
    assert (asked["max_new_tokens"], asked["batch_size"]) == (6, 2)
    assert asked["prompts"][0] == "the fox\nAnswer:"


def test_a_run_on_accuracy_logs_it_and_is_judged_by_it(tmp_path):
    result = fine_tune(tmp_path, objective="accuracy")
    _, lines = read_run_log(tmp_path)
    sides = [side for line in lines for _, *pair in line["directions"] for side in pair]
    assert all(-1 <= side <= 0 and side * 4 == int(side * 4) for side in sides)
    best = result.summary["best"]
    assert result.summary["objective"] == {"name": "accuracy", "best_dev": -best["dev"]["value"]}


def test_a_callable_is_minimised(tmp_path):
    """On a parabola every step goes down, as long as lr is below 2 over the curvature along u, some 2300."""
    path = f"{__name__}:weight_sum"
    before = sum(p.double().square().sum().item() for p in l2l.load_model("l2l/tiny").parameters()) / 1000
    result = fine_tune(tmp_path, objective=path, steps=4, lr=4e-4, eval_every=2)
    after = sum(p.double().square().sum().item() for p in result.model.parameters()) / 1000
    assert after < before
    assert result.summary["objective"]["best_dev"] == pytest.approx(after, rel=1e-9)


def test_the_projected_gradient_of_an_objective_is_a_float_of_python():
    """A callable's float passes through no tensor on its way."""
    model = torch.nn.Linear(2, 1).bfloat16()
    optimizer = l2l.MeZO(model, lr=1e-3, epsilon=1e-2)
    values = iter([-0.123456789, -0.123456788])
    optimizer.step(lambda: next(values))
    assert optimizer.report is not None
    assert optimizer.report.projected_gradient == pytest.approx(-1e-9 / 2e-2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "bleu"}, "objective is 'bleu'; use one of loss, accuracy, f1, exact_match, or a callable"),
        ({"objective": "f1"}, "task 'world_topic' has options: use accuracy or loss"),
        ({"objective": "no_such_package:f"}, "no module 'no_such_package' can be imported"),
        ({"objective": "math:no_such"}, "module 'math' has no function 'no_such'"),
        ({"objective": "math:pi"}, "module 'math' has no function 'pi'"),
        ({"objective": "os.path:exists"}, r"must take \(model, tokenizer, rows\)"),
        ({"objective": "a:b", "micro_batch": 2}, "feeds them itself: leave it out"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_an_objective_that_is_none_is_refused_before_anything_is_written(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        fine_tune(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_options_cannot_be_counted_where_answers_are_generated():
    with pytest.raises(ValueError, match="generates answers: use f1, exact_match or loss"):
        find_objective("accuracy", ANSWERED, ROWS[0])


def test_the_loss_is_no_callable():
    assert find_objective("loss", ANSWERED, ROWS[0]) is None
    assert FineTuneConfig().objective == "loss"
    assert imported(f"{__name__}:weight_sum") is weight_sum
