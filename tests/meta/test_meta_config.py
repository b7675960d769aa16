"""Configurations of meta-training: wrong ones are refused before anything is loaded; the tasks of outer steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from bowl import TINY

from l2l.meta.config import MetaTrainConfig, with_defaults
from l2l.meta.pool import sampled_task


def test_drawn_tasks_follow_their_weights_and_no_batch_is_passed_over():
    found = [sampled_task(step, (3.0, 0.0, 1.0), seed=5) for step in range(5000)]
    counts = Counter(task for task, _ in found)
    assert counts[1] == 0
    assert counts[0] / len(found) == pytest.approx(0.75, abs=0.03)
    assert [number for task, number in found if task == 2] == list(range(counts[2]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"objective": "evolution"},
            "takes no backward pass .* set trajectory to 'zo', or trajectory_gradient to 'own'",
        ),
        ({"objective": "best"}, "unknown objective 'best'"),
        ({"objective_args": {"steps": 2}}, "objective_args of 'one_step_loss'.*its arguments are: none"),
        ({"trajectory": "random"}, "trajectory='random' must be"),
        ({"zo_share": 1.5}, "zo_share=1.5 must lie between 0 and 1"),
        ({"sampling": "both"}, "sampling='both' must be"),
        ({"task_weights": [1.0, 2.0]}, "set sampling to 'random'"),
        ({"task_weights": [1.0], "sampling": "random"}, "task_weights has 1 values for 2 tasks"),
        ({"task_weights": [-1.0, 1.0], "sampling": "random"}, r"task_weights=\[-1.0, 1.0\] must be finite"),
        ({"outer_optimizer": "lion"}, "outer_optimizer='lion' must be"),
        ({"normalizer": "budget"}, "normalizer='budget' must be one of energy, curvature, none"),
        ({"normalizer": "none", "normalise": False}, "normalise is off, but normalizer is 'none'"),
        ({"features": "raw"}, "unknown tuner features 'raw'"),
        ({"basis": "gradient"}, "basis='gradient' must be one of none, gradients, activations, random"),
        ({"basis_rank": 0}, "basis_rank=0 must be a whole number"),
        ({"basis": "random", "architecture_args": {"outputs": 1}}, "outputs=1, but a basis needs a sigma of its own"),
        ({"validation_tasks": ["world_job"]}, "'world_job' is in the pool and in validation_tasks"),
        ({"model": "some/model", "tasks": []}, "tasks is empty"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_is_loaded(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        with_defaults(MetaTrainConfig(**{**TINY, **options}))
