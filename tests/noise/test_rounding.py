"""Stochastic rounding is right on average and fixed by its key; what is not finite is never hidden."""

from __future__ import annotations

import math

import pytest
import torch
from noise_cases import same_bits

from l2l.noise import Key, NoiseTerm, TensorSlice, add_noise, backend_problem
from l2l.noise.dispatch import VARIABLE

pytestmark = pytest.mark.in_turn

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(backend_problem(name) is not None, reason=str(backend_problem(name))))
    for name in ("reference", "native", "numba")
]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def rounded(values: torch.Tensor, rounding: Key | None, offset: int = 0) -> torch.Tensor:
    """Float32 values as the bfloat16 copy that a traversal makes of them."""
    piece = TensorSlice(torch.zeros(len(values), dtype=torch.bfloat16), "w", offset, master=values.clone())
    add_noise([piece], rounding=rounding)
    assert same_bits(piece.master, values)
    return piece.flat


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_rounding_goes_up_as_often_as_makes_it_right_on_average(fraction: float, sign: float):
    count, step = 200_000, 2.0**-7
    values = torch.full((count,), sign * (1 + fraction * step))
    moved = rounded(values, Key(3)).float()
    assert set(moved.unique().tolist()) == {sign, sign * (1 + step)}
    ups = (moved.abs() > 1).double().mean().item()
    assert abs(ups - fraction) < 4.5 * math.sqrt(fraction * (1 - fraction) / count)


def test_values_that_bfloat16_holds_are_never_moved():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(rounded(values, Key(3)).float(), values)


def test_stochastic_rounding_depends_on_its_key_and_place_alone():
    values = torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    whole = rounded(values, Key(3))
    assert torch.equal(whole, rounded(values, Key(3)))
    assert not torch.equal(whole, rounded(values, Key(4)))
    parts = torch.cat([rounded(values[:40_001], Key(3)), rounded(values[40_001:], Key(3), 40_001)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("rounding", [None, Key(3)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "master"])
def test_what_is_not_finite_stays_so(form: str, rounding: Key | None):
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0] * 9)
    flat = values.to(torch.float32 if form == "float32" else torch.bfloat16)
    piece = TensorSlice(flat, "w", master=values.clone() if form == "master" else None)
    add_noise([piece], [NoiseTerm(Key(1), [(1e-3,)])], rounding=rounding)
    for written in (piece.flat, piece.master):
        if written is not None:
            assert torch.equal(written.isnan(), values.isnan())
            assert torch.equal(written.isposinf(), values.isposinf())
            assert torch.equal(written.isneginf(), values.isneginf())


def test_a_signalling_nan_stays_a_nan():
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert rounded(odd, None).isnan().all()
    assert rounded(odd, Key(3)).isnan().all()


def test_float32_is_not_rounded_to_bfloat16():
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    plain, keyed = start.clone(), start.clone()
    add_noise([TensorSlice(plain, "w")], [NoiseTerm(Key(1), [(1e-3,)])])
    add_noise([TensorSlice(keyed, "w")], [NoiseTerm(Key(1), [(1e-3,)])], rounding=Key(3))
    assert same_bits(plain, keyed)
