"""The choice of an estimator: one-sided differences along N directions that share a loss at theta, under any method."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ARGS, MethodCase, Quadratic, TiedLM, farthest, weights, zeroth_order
from torch import Tensor, nn

import l2l
from l2l.methods import method_class
from l2l.methods.base import Method
from l2l.methods.fzoo import FZOO
from l2l.methods.guided import Guided
from l2l.methods.lozo import LOZO
from l2l.methods.mezo import MeZO
from l2l.methods.registry import with_estimator
from l2l.methods.wrappers.blockwise import Blockwise
from l2l.methods.wrappers.sparse import Sparse
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import dense_direction

LR, SEED, N = 0.01, 4, 3
CHOICES = {"estimator", "num_directions"}
OPEN = [name for name in zeroth_order() if set(inspect.signature(method_class(name)).parameters) >= CHOICES]
"""Methods that leave estimator and number of directions to choose."""


class Linear(nn.Module):
    """<c, w>: any difference is exact."""

    c: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
        self.register_buffer("c", torch.arange(15, dtype=torch.float64).view(5, 3) / 7 - 1)

    def forward(self) -> Tensor:
        return (self.c * self.w).sum()


def optimizer(model: nn.Module, method: Method[Any]) -> ZOOptimizer:
    return ZOOptimizer(model, method, LR, SEED)


def one_sided(name: str, model: nn.Module) -> Method[Any]:
    return with_estimator(MethodCase(name, ARGS.get(name, {})).make(model), "one_sided", N)


def test_most_methods_leave_the_choice():
    assert {"mezo", "learned", "dizo", "adam", "momentum", "sign", "lozo", "lozo_m", "subzero", "tezo", "curvzo"} <= set(OPEN)


@pytest.mark.parametrize("name", [*OPEN, "learned+lozo", "sparse+mezo", "hybrid+mezo"])
def test_a_step_takes_one_pass_per_direction_and_one_more_at_theta(name: str):
    model = TiedLM().double()
    method, seen = one_sided(name, model), []

    def watched() -> Tensor:
        seen.append(weights(model))
        return model()

    stepped, start = optimizer(model, method), weights(model)
    stepped.step(watched)
    assert stepped.report is not None
    backward = 2 if name.startswith("hybrid") else 0  # of which a pass calls the closure
    assert stepped.report.passes == N + 1 + (1 + backward if backward else 0)
    assert len(stepped.report.estimates) == N
    assert farthest(seen[0], start) < 1e-12
    assert len({estimate.loss_center for estimate in stepped.report.estimates}) == 1
    assert all(farthest(point, start) > 1e-6 for point in seen[1 : N + 1])


@pytest.mark.parametrize("name", OPEN)
def test_directions_are_those_of_two_sided_estimates(name: str):
    model, other = TiedLM().double(), TiedLM().double()
    method = one_sided(name, model)
    left, right = optimizer(model, method), optimizer(other, with_estimator(method, "two_sided", None))
    left.step(model)
    right.step(other)
    assert left.report is not None
    assert right.report is not None
    for mine, wanted in zip(left.report.estimates, right.report.estimates, strict=True):
        assert mine.loss_plus == pytest.approx(wanted.loss_plus, rel=1e-12)
        for index in range(len(left.blocks)):
            pair = dense_direction(mine.direction, left.blocks, index), dense_direction(wanted.direction, right.blocks, index)
            torch.testing.assert_close(*pair)


@pytest.mark.parametrize("epsilon", [1e-3, 1.0])
def test_on_a_linear_loss_the_step_is_that_of_two_sided_estimates(epsilon: float):
    steps = []
    for estimator in ("one_sided", "two_sided"):
        model = Linear()
        optimizer(model, MeZO(epsilon, N, estimator=estimator)).step(model)
        steps.append(weights(model))
    assert farthest(*steps) < 1e-12


def test_on_a_quadratic_it_is_off_by_half_epsilon_times_the_curvature():
    model, epsilon = Quadratic().double(), 0.1
    seen = []
    for estimator in ("one_sided", "two_sided"):
        fresh = Quadratic().double()
        stepped = optimizer(fresh, MeZO(epsilon, N, estimator=estimator))
        stepped.step(fresh)
        assert stepped.report is not None
        seen.append(stepped.report.estimates)
    blocks = ZOOptimizer(model, MeZO(), LR).blocks
    bends = {"matrix": model.curvature, "vector": torch.ones(6, dtype=torch.float64)}
    for mine, exact in zip(*seen, strict=True):
        us = {block.name: dense_direction(mine.direction, blocks, i) for i, block in enumerate(blocks)}
        curvature = sum((bends[name] * u**2).sum().item() for name, u in us.items())
        assert mine.projected_gradient == pytest.approx(exact.projected_gradient + epsilon / 2 * curvature, rel=1e-9)


def test_groups_of_blocks_share_the_loss_at_theta():
    model = Quadratic().double()
    method = Blockwise(MeZO(num_directions=N, estimator="one_sided"), level="block", groups=2)
    stepped = optimizer(model, method)
    stepped.step(model)
    assert stepped.report is not None
    assert stepped.report.passes == method.passes == 2 * N + 1
    with pytest.raises(ValueError, match="use two_sided estimates, which share no loss"):
        optimizer(model, Blockwise(MeZO(estimator="one_sided"), apply="at once"))
    optimizer(model, Blockwise(MeZO(estimator="two_sided"), apply="at once")).step(model)  # the way out


@pytest.mark.parametrize("half", [False, True])
def test_under_auto_the_curvature_costs_one_more_pass_where_it_is_measured(half: bool):
    model, passes = TiedLM(), []
    model = model.bfloat16() if half else model
    stepped = ZOOptimizer(model, MeZO(1e-2, N, estimator="one_sided"), "auto", SEED)
    for _ in range(8):
        stepped.step(lambda: model().float())
        assert stepped.report is not None
        passes.append(stepped.report.passes)
        assert (stepped.report.curvature is not None) == (passes[-1] == N + 2)
    assert passes == [N + 2] * 6 + [N + 1] * 2


def test_the_curvature_is_that_along_the_first_direction():
    model = Quadratic().double()
    stepped = ZOOptimizer(model, MeZO(1e-2, N, estimator="one_sided"), "auto", SEED)
    u = stepped.method.direction(stepped.blocks, None, Key(SEED))  # pyright: ignore
    bends = (model.curvature, torch.ones(6, dtype=torch.float64))
    wanted = sum((bend * dense_direction(u, stepped.blocks, i) ** 2).sum().item() for i, bend in enumerate(bends))
    stepped.step(model)
    assert stepped.report is not None
    assert stepped.report.curvature == pytest.approx(wanted, rel=1e-6)


def test_an_optimizer_of_any_method_takes_it_by_name():
    model, other = TiedLM(), TiedLM()
    made = l2l.MeZO(model, estimator="one_sided", num_directions=8)
    assert made.method == MeZO(num_directions=8, estimator="one_sided")
    assert l2l.LOZO(other, estimator="one_sided").method == LOZO(estimator="one_sided")


def test_of_a_composed_method_it_is_the_innermost_that_takes_it():
    method = with_estimator(Sparse(MeZO(), sparsity=0.25), "one_sided", 8)
    assert method == Sparse(MeZO(num_directions=8, estimator="one_sided"), sparsity=0.25)
    assert (method.passes, method.estimator, method.num_directions) == (9, "one_sided", 8)
    assert with_estimator(FZOO(), None, None) == FZOO()
    assert with_estimator(FZOO(), None, 4) == FZOO(num_directions=4)


@pytest.mark.parametrize(
    ("method", "estimator", "count", "said"),
    [
        (FZOO(), "two_sided", None, "is no choice with method 'fzoo', which has its own way: leave estimator out"),
        (Sparse(FZOO()), "one_sided", None, "estimator='one_sided' is no choice with method 'fzoo'"),
        (Guided(), None, 3, "num_directions=3 is no choice with method 'guided'"),
        (MeZO(), "three_sided", None, "estimator='three_sided' must be one of two_sided, one_sided"),
        (MeZO(), None, 0, "num_directions=0 must be a whole number"),
    ],
)
def test_what_is_no_choice_is_refused_in_a_line(method: Method[Any], estimator: Any, count: int | None, said: str):
    with pytest.raises(ValueError, match=said):
        with_estimator(method, estimator, count)


SMALL: dict[str, Any] = {
    **{"lr": 1e-3, "steps": 3, "batch_size": 4, "train_size": 12, "dev_size": 4, "test_size": 4},
    **{"log_every": 1, "progress": False, "save": "log"},
}


@pytest.mark.parametrize("method", ["mezo", l2l.MeZO, MeZO, MeZO()])
def test_a_run_takes_estimator_and_directions_however_its_method_is_named(method: Any, tmp_path: Path):
    found = l2l.fine_tune(
        "l2l/tiny", "world_topic", method, out=str(tmp_path), estimator="one_sided", num_directions=N, **SMALL
    )
    assert found.summary["passes"] == 3 * (N + 1)


@pytest.mark.parametrize("method", ["fzoo", "adamw", "sparse+guided"])
def test_a_run_refuses_it_before_it_loads_a_model(method: str, tmp_path: Path):
    with pytest.raises(ValueError, match="estimator='one_sided' is no choice with method"):
        l2l.fine_tune("no/such-model", "world_topic", method, out=str(tmp_path / "a"), estimator="one_sided", **SMALL)
    with pytest.raises(ValueError, match="estimator='sideways' must be two_sided, one_sided or left out"):
        l2l.fine_tune("no/such-model", "world_topic", "mezo", out=str(tmp_path / "b"), estimator="sideways", **SMALL)
    assert not any(tmp_path.iterdir())
