"""SubZero: against its paper's pseudo-code, its subspaces, and as what it reduces to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import MethodCase, Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, SEED, Loss, Weights, assert_near, assert_same_run, moved, normal, run, two_sided
from torch import Tensor, nn

from l2l.methods.subzero import InSubspace, SubZero, folded
from l2l.noise import Key
from l2l.params import Blocks, Direction, dense_direction

RANK, INTERVAL = 3, 4


def thin(name: str, what: str, step: int, rows: int) -> Tensor:
    return torch.linalg.qr(normal(f"{name}#{what}", Key(SEED, step), rows, RANK)).Q


def paper_step(loss: Loss, at: Weights, key: Key) -> Weights:
    """sqrt(m n / r^2) U Z V^T in matrices of which both sides are longer than r, U and V redrawn every few steps."""
    u, since = {}, key.step - key.step % INTERVAL
    for name, value in at.items():
        if value.ndim == 1:
            u[name] = normal(name, key, *value.shape)
            continue
        (m, n), core = value.shape, normal(f"{name}#core", key, RANK, RANK)
        left, right = thin(name, "rows", since, m), thin(name, "columns", since, n)
        u[name] = math.sqrt(m * n / RANK**2) * left @ core @ right.T
    return moved(at, -LR * two_sided(loss, at, u), u)


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


class OneMatrix(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))


def direction(blocks: Blocks, method: SubZero, step: int) -> Direction:
    return method.direction(blocks, method.init(blocks), Key(SEED, step))


def test_it_takes_the_steps_of_the_paper(model: nn.Module):
    assert_same_run(model, SubZero(EPSILON, rank=RANK, interval=INTERVAL), paper_step)


def test_the_update_is_along_what_was_perturbed_where_subspaces_are_redrawn(model: nn.Module):
    at: list[Weights] = []

    def watched() -> Tensor:
        at.append({name: model.get_parameter(name) * 1.0 for name in weights(model)})
        return model()

    optimizer = run(model, SubZero(EPSILON, rank=2, interval=2), steps=2)
    before = weights(model)
    optimizer.step(watched)
    assert optimizer.report is not None
    by = -LR * optimizer.report.projected_gradient / EPSILON
    assert_near(weights(model), {name: w + by * (at[0][name] - w) for name, w in before.items()}, 1e-6, 1e-10)


def test_over_a_whole_square_matrix_the_direction_has_the_covariance_of_plain_noise():
    blocks = Blocks.of(OneMatrix(3, 3))
    method = SubZero(rank=3, interval=1)
    samples = torch.stack([dense_direction(direction(blocks, method, s), blocks, 0).flatten() for s in range(800)])
    assert (samples.T @ samples / len(samples) - torch.eye(9)).abs().max() < 0.25


@pytest.mark.parametrize(("form", "rank"), [((8, 12), 1), ((8, 12), 5), ((6, 4, 5), 3), ((2, 32), 4), ((1, 7), 4)])
def test_a_direction_is_as_long_as_its_core_says(form: tuple[int, ...], rank: int):
    """U and V are orthonormal: |u|^2 = (m n / r^2) |Z|^2, of mean m n."""
    blocks = Blocks.of(OneMatrix(*form))
    u = dense_direction(direction(blocks, SubZero(rank=rank), 0), blocks, 0)
    r = min(rank, *folded(blocks[0], rank))
    core = normal("weight#core", Key(SEED), r, r)
    assert u.shape == form
    assert u.norm().item() == pytest.approx(math.sqrt(u.numel()) / r * core.norm().item(), rel=1e-9)


def test_a_subspace_stays_for_its_interval():
    blocks = Blocks.of(OneMatrix(9, 8))
    us = [dense_direction(direction(blocks, SubZero(rank=2, interval=3), step), blocks, 0) for step in range(4)]
    assert torch.linalg.matrix_rank(torch.cat(us[:3])) == torch.linalg.matrix_rank(torch.cat(us[:3], 1)) == 2
    assert torch.linalg.matrix_rank(torch.cat(us[2:])) == torch.linalg.matrix_rank(torch.cat(us[2:], 1)) == 4


def test_thin_matrices_are_read_as_nearly_square_ones():
    shapes = {(2, 32): (8, 8), (32, 2): (8, 8), (9, 8): (9, 8), (1, 7): (1, 7), (4, 6): (4, 6)}
    for form, wanted in shapes.items():
        assert folded(Blocks.of(OneMatrix(*form))[0], 4) == wanted


def test_subspaces_are_kept_once_and_are_orthonormal(model: nn.Module):
    optimizer = run(model, SubZero(rank=2, interval=3), steps=4)
    assert optimizer.report is not None
    walked, state = optimizer.report.estimates[0].direction.shape, optimizer.method_state
    assert isinstance(walked, InSubspace) and walked.subspaces is state.subspaces and state.since == 3
    for pair in state.subspaces.values():
        for side in pair:
            torch.testing.assert_close(side.T @ side, torch.eye(2).double())


def test_a_failed_step_draws_no_new_subspace(model: nn.Module):
    optimizer = run(model, SubZero(rank=2, interval=3), steps=3)
    state = optimizer.method_state
    with pytest.raises(FloatingPointError):
        optimizer.step(lambda: float("nan"))
    assert optimizer.method_state is state and state.since == 0


def test_a_tuner_scales_what_is_walked_and_what_is_moved():
    model = TiedLM().double()
    before, case = weights(model), MethodCase("learned+subzero", {"subzero": {"rank": 3}})
    optimizer = run(model, case.make(model), steps=1)
    assert optimizer.report is not None
    (seen,) = optimizer.report.estimates
    by = -LR * seen.projected_gradient
    us = {block.name: dense_direction(seen.direction, optimizer.blocks, i) for i, block in enumerate(optimizer.blocks)}
    assert len(set(seen.direction.sigma)) == len(us)
    assert_near(weights(model), moved(before, by, us), 1e-9, 1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": -1.0}, "epsilon=-1.0 must be positive"),
        ({"rank": 0}, "rank=0 must be a whole number, at least 1"),
        ({"interval": 0}, "interval=0 must be a whole number, at least 1"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SubZero(**wrong)
