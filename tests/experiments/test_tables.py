"""What the comparison makes of its records."""

from __future__ import annotations

from typing import Any

from l2l.experiments.presets.quickstart import best_lr, table


def record(method: str, lr: float, **values: Any) -> dict[str, Any]:
    same = {"task": "t", "final_loss": 1.0, "accuracy": 0.5, "passes": 100, "seconds": 2.0, "dev_loss": 1.0}
    return {**same, "method": method, "lr": lr, **values}


def test_the_best_learning_rate_is_the_one_of_lowest_dev_loss_per_task_and_method():
    records = [
        record("mezo", 1e-4, dev_loss=0.9, final_loss=0.1),
        record("mezo", 1e-3, dev_loss=0.5, final_loss=0.9),
        record("mezo", 1e-2, dev_loss=0.7),
        record("dizo", 1e-2, dev_loss=0.4),
        record("mezo", 1e-4, dev_loss=0.2, task="u"),
    ]
    expected = {"t": {"mezo": 1e-3, "dizo": 1e-2}, "u": {"mezo": 1e-4}}
    assert best_lr(records) == expected
    assert best_lr(records[::-1]) == expected
    assert best_lr([]) == {}


def test_a_row_is_mean_and_spread_over_the_seeds_of_a_task_and_method():
    records = [
        record("mezo", 1e-4, final_loss=1.0, accuracy=0.25, seconds=1.0),
        record("mezo", 1e-4, final_loss=2.0, accuracy=0.75, seconds=2.0, passes=102),
        record("learned", 1e-3, final_loss=0.5),
    ]
    mezo, learned = table(records)
    assert mezo == {
        "task": "t",
        "method": "mezo",
        "lr": "0.0001",
        "final loss": "1.500 ± 0.707",
        "accuracy": "0.500 ± 0.354",
        "forward passes": "101",
        "seconds": "1.5 ± 0.7",
    }
    assert (learned["method"], learned["lr"], learned["final loss"]) == ("learned", "0.001", "0.500")
