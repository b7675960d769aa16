"""A direction along a basis is what its formula says, everywhere that a move or a look is applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from based import EPSILON, RANK, based, basis_of, formula, written
from cases import TiedLM, farthest, same_bits, weights
from torch import Tensor, nn

from l2l.estimators import two_point
from l2l.noise import Key
from l2l.params import Basis, Blocks, Direction, PerturbedParameters
from l2l.params.direction import low_rank_dot, low_rank_noise


class Bowl(nn.Module):
    """A quadratic in two matrices and a vector, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.left = nn.Parameter(torch.randn(7, 12, generator=draw, dtype=torch.float64))
        self.right = nn.Parameter(torch.randn(12, 5, generator=draw, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(5, generator=draw, dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.left - 1).square().sum() + (self.right * torch.arange(1, 6)).square().sum() + self.bias.sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(model(), parameters), strict=True))


def test_the_two_point_estimate_is_the_inner_product_with_the_gradient():
    model = Bowl()
    theta = PerturbedParameters(Blocks.of(model))
    u = based(theta.blocks, factor=0.7)
    gradient, wanted = gradients(model), formula(theta.blocks, u)
    slope = sum((gradient[name] * value).sum().item() for name, value in wanted.items())
    with torch.no_grad():
        estimate = two_point(model, theta, u, EPSILON)
    assert estimate.projected_gradient == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_looking_adds_the_direction_of_the_formula(dtype: torch.dtype, distribution: Any):
    model = TiedLM().to(dtype)
    theta = PerturbedParameters(Blocks.of(model))
    u = based(theta.blocks, factor=1.3, distribution=distribution)
    before = weights(model)
    theta.perturb(u, EPSILON)
    rtol, atol = (1e-10, 1e-13) if dtype == torch.float64 else (1e-6, 3e-7)
    for name, value in formula(theta.blocks, u).items():
        torch.testing.assert_close(weights(model)[name].double(), before[name].double() + EPSILON * value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("walk", ["in_place", "functional"])
def test_the_direction_that_is_updated_is_the_one_that_is_perturbed(walk: Any):
    model = TiedLM().double()
    theta = PerturbedParameters(Blocks.of(model), walk)
    u = based(theta.blocks)
    with theta.step():
        sides = []
        for distance in (0.1, -0.1):
            theta.perturb(u, distance)
            sides.append(theta.evaluate(lambda: written(model)))
        theta.restore()
        before = weights(model)
        theta.add(u, [0.3] * len(theta.blocks))
    for name, now in weights(model).items():
        perturbed = (sides[0][name] - sides[1][name]) / 0.2
        # Scales keep 41 bits beside exact products in float64.
        torch.testing.assert_close((now - before[name]) / 0.3, perturbed, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(perturbed, formula(theta.blocks, u)[name], rtol=1e-10, atol=1e-12)


def test_its_mean_square_is_that_of_its_scales():
    block = Blocks.of(nn.Linear(96, 400, bias=False))
    basis = basis_of(block, rank=8)
    found = []
    for seed in range(20):
        u = Direction(Key(seed), (0.6,), basis=basis, basis_sigma=(0.8,), factor=2.0)
        found.append(formula(block, u)["weight"].square().mean().item())
    # Of each square the relative deviation is about sqrt(2 / (m r)) = 0.025.
    assert sum(found) / len(found) == pytest.approx(4 * (0.6**2 + 0.8**2), rel=0.02)


def test_the_noise_written_out_has_the_name_of_the_basis_and_the_size_of_dense_noise():
    vectors = torch.linalg.qr(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))[0]
    found = low_rank_noise("w", vectors, Key(1), 500)
    assert found.square().mean().item() == pytest.approx(1, rel=0.05)
    assert not torch.equal(found, low_rank_noise("v", vectors, Key(1), 500))
    assert torch.linalg.matrix_rank(found).item() == 4


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_the_inner_product_with_a_gradient_needs_no_noise_written_out(distribution: Any):
    draw = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(40, 6, generator=draw))[0]
    gradient = torch.randn(30, 40, generator=draw)
    wanted = (low_rank_noise("w", vectors, Key(1), 30, distribution).double() * gradient.double()).sum().item()
    assert low_rank_dot("w", vectors, Key(1), gradient, distribution) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("walk", ["in_place", "functional"])
@pytest.mark.parametrize("centred", [False, True])
def test_a_basis_of_scale_zero_changes_nothing_bit_for_bit(walk: Any, centred: bool):
    ends = []
    for zeros in (False, True):
        model = TiedLM()
        theta = PerturbedParameters(Blocks.of(model), walk)
        count = len(theta.blocks)
        centre = (0.0,) * count if centred else None
        basis = {"basis": basis_of(theta.blocks), "basis_sigma": (0.0,) * count} if zeros else {}
        u = Direction(Key(2), (0.5,) * count, centre=centre, **basis)
        with torch.no_grad(), theta.step():
            losses = []
            for distance in (EPSILON, -EPSILON):
                theta.perturb(u, distance)
                losses.append(theta.evaluate(model).item())
            theta.add(u, [0.1] * count)
            losses.append(theta.moments(u))
        ends.append((losses, weights(model)))
    assert ends[0][0] == ends[1][0]
    assert same_bits(ends[0][1], ends[1][1])


def test_a_block_without_dense_noise_moves_along_its_basis_alone(monkeypatch: pytest.MonkeyPatch):
    import l2l.params.engine

    model = TiedLM()
    theta = PerturbedParameters(Blocks.of(model))
    names: list[str] = []
    genuine = l2l.params.engine.add_noise
    monkeypatch.setattr(
        l2l.params.engine, "add_noise", lambda p, *rest: (names.extend(one.name for one in p), genuine(p, *rest))[1]
    )
    before = weights(model)
    u = based(theta.blocks, sigma=0.0)
    theta.perturb(u, 1.0)
    for name, value in formula(theta.blocks, u).items():
        moved = weights(model)[name] - before[name]
        torch.testing.assert_close(moved.double(), value, rtol=1e-3, atol=1e-5)
        assert torch.equal(moved, torch.zeros_like(moved)) == (value.ndim == 1)
        if value.ndim == 2:
            assert torch.linalg.matrix_rank(moved, rtol=1e-4).item() <= RANK
    assert all(name.endswith("#basis") for name in names)


def test_directions_are_equal_where_they_have_the_same_basis():
    blocks = Blocks.of(TiedLM())
    u = based(blocks)
    again = Direction(u.key, u.sigma, basis=u.basis, basis_sigma=u.basis_sigma)
    assert u == again
    assert hash(u) == hash(again)
    assert u != Direction(u.key, u.sigma, basis=basis_of(blocks), basis_sigma=u.basis_sigma)
    assert u != Direction(u.key, u.sigma)


def spoilt(change: Callable[[Tensor], Tensor]) -> Callable[[Blocks], Basis]:
    return lambda blocks: Basis({0: change(basis_of(blocks).vectors[0])})


WRONG: list[tuple[Callable[[Blocks], Basis], str]] = [
    (lambda blocks: Basis({2: torch.eye(8)}), r"'attention.qkv.bias' has no place: the block has shape \[24\]"),
    (
        spoilt(lambda v: v[:-1]),
        r"basis of block 'embed.weight' has shape \[7, 3\]: it must be \[8, r\] with r from 1 to 8",
    ),
    (spoilt(lambda v: v[:, :0]), r"has shape \[8, 0\]"),
    (lambda blocks: Basis({0: torch.eye(9)[:8]}), r"has shape \[8, 9\]"),
    (spoilt(lambda v: v * math.nan), "'embed.weight' holds a value that is not a finite number"),
    (spoilt(lambda v: v * 1.001), r"'embed.weight' has columns that are not orthonormal: V\^T V is off by 2.0e-03"),
    (lambda blocks: Basis({77: torch.eye(8)}), "a basis is given for block 77, but there are 6 blocks"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[str(k) for k in range(len(WRONG))])
def test_what_is_no_basis_is_refused_and_nothing_moves(make: Callable[[Blocks], Basis], message: str):
    model = TiedLM()
    theta = PerturbedParameters(Blocks.of(model))
    u = Direction(Key(1), (1.0,) * 6, basis=make(theta.blocks), basis_sigma=(0.0,) * 6)
    before = weights(model)
    for move in (lambda: theta.perturb(u, EPSILON), lambda: theta.add(u, [1.0] * 6)):
        with pytest.raises(ValueError, match=message):
            move()
    assert same_bits(before, weights(model))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -0.5])
def test_a_broken_scale_along_a_basis_is_refused(scale: float):
    blocks = Blocks.of(TiedLM())
    with pytest.raises(ValueError, match=f"basis_sigma is {scale}: it must be finite and not negative"):
        Direction(Key(1), (1.0,) * 6, basis=basis_of(blocks), basis_sigma=(scale,) * 6)


def test_scales_that_fit_no_basis_are_refused():
    basis = basis_of(Blocks.of(TiedLM()))
    with pytest.raises(ValueError, match="basis_sigma has 5 scales for 6 blocks"):
        Direction(Key(1), (1.0,) * 6, basis=basis, basis_sigma=(1.0,) * 5)
    with pytest.raises(ValueError, match=r"basis_sigma has 6 scales for 6 blocks: .* none where there is not"):
        Direction(Key(1), (1.0,) * 6, basis_sigma=(1.0,) * 6)
    with pytest.raises(ValueError, match=r"basis_sigma of block 2 is 1\.0, but it has no basis: it must be 0"):
        Direction(Key(1), (1.0,) * 6, basis=basis, basis_sigma=(1.0,) * 6)


def test_a_scale_along_a_basis_that_is_not_finite_moves_no_block():
    model = TiedLM()
    theta = PerturbedParameters(Blocks.of(model))
    u = based(theta.blocks, sigma=0.0)
    before = weights(model)
    with pytest.raises(ValueError, match=r"noise scale is .*e\+3.*; it must be finite in torch.float32"):
        theta.add(u, [1e39] * 6)
    assert same_bits(before, weights(model))


def test_a_process_that_multiplies_matrices_coarsely_walks_the_same():
    ends = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            model = TiedLM()
            theta = PerturbedParameters(Blocks.of(model), "functional")
            theta.perturb(based(theta.blocks), EPSILON)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "medium"):
                ends.append(theta.evaluate(lambda model=model: written(model)))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert farthest(*ends) == 0
