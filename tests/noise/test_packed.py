"""``packed_rademacher``: 32 draws from the bits of one hash are as good as 32 hashes, and are added as one."""

import random
from contextlib import nullcontext

import pytest
import torch
from noise_cases import same_bits

import l2l
from l2l.methods.mezo import MeZO
from l2l.noise import Key, NoiseTerm, TensorSlice, add_noise, backend_problem, integers, native, noise_dot, round_scale
from l2l.noise.dispatch import VARIABLE
from l2l.optim import ZOOptimizer

pytestmark = pytest.mark.in_turn

FAST = [
    pytest.param(name, marks=pytest.mark.skipif(backend_problem(name) is not None, reason=str(backend_problem(name))))
    for name in ("native", "numba")
]
COUNT = 2**18


PACKED = "packed_rademacher"


def signs(draws: range, key: Key, count: int = COUNT) -> torch.Tensor:
    """[draws, count]"""
    return torch.stack([integers("w", key.with_draw(draw), count, PACKED) for draw in draws])


def start(count: int = 5000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def terms(scales: dict[int, float], key: Key, pieces: int = 1) -> list[NoiseTerm]:
    return [NoiseTerm(key.with_draw(draw), [(scale,)] * pieces, PACKED) for draw, scale in scales.items()]


def test_draws_have_mean_0_and_are_uncorrelated_within_a_hash_and_across(key: Key):
    z = signs(range(64), key).double()
    assert z.unique().tolist() == [-1, 1]
    assert z.mean(1).abs().max() * COUNT**0.5 < 4.5
    pairs = (z @ z.T)[*torch.triu_indices(64, 64, 1)] / COUNT**0.5  # 2016 standard normals
    assert pairs.abs().max() < 5
    assert pairs.square().mean() == pytest.approx(1.0, abs=4.5 * (2 / len(pairs)) ** 0.5)


def test_products_of_two_draws_are_not_a_third(key: Key):
    """Methods see u_i u_j: bits that were sums of others would be uncorrelated, and yet tell nothing new."""
    z = signs(range(32), key, 2**12).float()
    products = torch.stack([z[i] * z[j] for i in range(32) for j in range(i)])
    found = (products @ z.T) / 2**6
    assert found.abs().max() < 5.5  # of 15,872 standard normals


def test_the_first_draw_is_rademacher_noise_and_33_draws_take_two_hashes(key: Key):
    assert torch.equal(integers("w", key.with_draw(0), 999, PACKED), integers("w", key.with_draw(0), 999, "rademacher"))
    assert torch.equal(integers("w", key.with_draw(64), 999, PACKED), integers("w", key.with_draw(2), 999, "rademacher"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_terms_of_one_hash_are_summed_and_added_with_one_rounding(dtype: torch.dtype, key: Key):
    weights, scales = start(dtype=dtype), {3: 1e-3, 31: -2e-4, 0: 7e-5}
    exact = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(5000, dtype=exact)
    for draw, scale in scales.items():
        total += round_scale(scale, dtype) * integers("w", key.with_draw(draw), 5000, PACKED).to(exact)
    wanted = (start(dtype=dtype).to(exact) + total).to(dtype)
    add_noise([TensorSlice(weights, "w")], terms(scales, key))
    assert same_bits(weights, wanted)


def test_from_a_direction_to_the_next_elements_of_equal_sign_keep_their_bits(key: Key):
    weights = start()
    add_noise([TensorSlice(weights, "w")], terms({4: -1e-3, 5: 1e-3}, key))
    here, there = signs(range(4, 6), key, 5000)
    assert same_bits(weights[here == there], start()[here == there])
    assert not torch.any(weights[here != there] == start()[here != there])


def test_terms_of_two_hashes_are_two_additions(key: Key):
    together, apart = start(), start()
    add_noise([TensorSlice(together, "w")], terms({30: 1e-3, 31: 2e-3, 32: 3e-3}, key))
    add_noise([TensorSlice(apart, "w")], terms({30: 1e-3, 31: 2e-3}, key))
    add_noise([TensorSlice(apart, "w")], terms({32: 3e-3}, key))
    assert same_bits(together, apart)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32_draws_in_shards_equal_the_reference_on_the_whole(backend: str, dtype: torch.dtype, key: Key, monkeypatch):
    draw, base = random.Random(0), 2**32 - 3000
    scales = {k: draw.uniform(-1e-2, 1e-2) for k in range(32)}
    whole, shards = start(dtype=dtype), start(dtype=dtype)
    monkeypatch.setenv(VARIABLE, "reference")
    add_noise([TensorSlice(whole, "w", base)], terms(scales, key))
    monkeypatch.setenv(VARIABLE, backend)
    pieces = [TensorSlice(shards[a:b], "w", base + a) for a, b in ((0, 1), (1, 1777), (1777, 5000))]
    add_noise(pieces, terms(scales, key, len(pieces)))
    assert same_bits(whole, shards)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_sum_over_the_noise_is_that_of_its_own_draw(backend: str, key: Key, monkeypatch):
    monkeypatch.setenv(VARIABLE, backend)
    values = start().double()
    wanted = float(values.float().double() @ signs(range(7, 8), key, 5000)[0].double())
    assert noise_dot(values.float(), "w", key.with_draw(7), PACKED) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("perturb", ["in_place", "functional"])
def test_a_population_that_is_resumed_continues_as_one_that_was_not(perturb):
    def made(model: torch.nn.Module) -> ZOOptimizer:
        return ZOOptimizer(model, MeZO(num_directions=35, estimator="one_sided", distribution=PACKED), 1e-3, 1, perturb=perturb)

    def model(weights: torch.Tensor) -> torch.nn.Linear:
        own = torch.nn.Linear(40, 3, bias=False)
        own.load_state_dict({"weight": weights.clone()})
        return own

    x, y = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    first, whole = model(start(120).view(3, 40)), model(start(120).view(3, 40))
    optimizer, straight = made(first), made(whole)
    losses = [
        o.step(lambda m=m: torch.nn.functional.cross_entropy(m(x), y)) for m, o in ((first, optimizer), (whole, straight))
    ]
    assert losses[0] == losses[1]
    again = model(first.weight.detach())
    resumed = made(again)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        for m, o in ((again, resumed), (whole, straight)):
            o.step(lambda m=m: torch.nn.functional.cross_entropy(m(x), y))
    assert same_bits(again.weight.detach(), whole.weight.detach())


def test_rsgn_moves_by_the_same_bits_in_fused_steps():
    x, y, ends = torch.randn(8, 50, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3, []
    for fused in (True, False):
        model = torch.nn.Linear(50, 3, bias=False)
        with torch.no_grad():
            model.weight.copy_(start(150).view(3, 50))
        optimizer = l2l.optim.RSGN(model, num_directions=34, seed=3)
        assert optimizer.method.distribution == PACKED
        with optimizer.theta.fused_steps() if fused else nullcontext():
            for _ in range(4):
                optimizer.step(lambda m=model: (m(x), y))
        ends.append(model.weight.detach().clone())
    assert same_bits(*ends)


def test_memory_on_huge_pages_holds_the_same_values():
    tensor = torch.randn(3 * native.HUGE // 4, generator=torch.Generator().manual_seed(0))
    before = tensor.clone()
    asked = native.use_huge_pages([tensor[: len(tensor) // 2], tensor[len(tensor) // 2 :]])
    assert native.HUGE <= asked <= 4 * native.HUGE
    assert torch.equal(tensor, before)
    assert native.use_huge_pages([tensor[:100]]) == 0
