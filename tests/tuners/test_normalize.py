"""Normalisers keep their budget, whatever sigma is, and say clearly what they lack."""

from __future__ import annotations

import pytest
import torch
from cases import TiedLM

from l2l.params import Blocks
from l2l.tuners.normalize import (
    NORMALIZERS,
    CurvatureNormalizer,
    EnergyNormalizer,
    NoNormalizer,
    Normalizer,
    build_normalizer,
    normalizer_config,
)

BLOCKS = Blocks.of(TiedLM())
TRACES = {name: 10.0 ** (i - 3) for i, name in enumerate(BLOCKS.names)}
INSIDE = {"attention.qkv.weight": 50.0, "attention.out.weight": 0.3}
ALL = [EnergyNormalizer(7.0, 4), CurvatureNormalizer(TRACES, INSIDE), NoNormalizer()]


def random_sigma(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 0.01


@pytest.mark.parametrize("normalizer", ALL[:2])
@pytest.mark.parametrize("seed", range(3))
def test_the_budget_is_that_of_mezo_for_every_sigma(normalizer: Normalizer, seed: int):
    counts, sigma = normalizer.counts(BLOCKS), random_sigma(6, seed=seed)
    scaled = normalizer.factor(sigma, counts) * sigma.double()
    assert (counts * scaled**2).sum().item() == pytest.approx(counts.sum().item(), rel=1e-12)


@pytest.mark.parametrize("normalizer", ALL[:2])
def test_the_budget_counts_what_lies_inside_the_basis(normalizer: Normalizer):
    counts, sigma = normalizer.counts(BLOCKS, INSIDE), random_sigma(6, 2)
    assert counts.shape == (6, 2)
    scaled = normalizer.factor(sigma, counts) * sigma.double()
    assert (counts * scaled**2).sum().item() == pytest.approx(counts[:, 0].sum().item(), rel=1e-12)


def test_energy_counts_a_block_with_a_basis_twice_and_one_without_once():
    counts = EnergyNormalizer().counts(BLOCKS, INSIDE)
    for name, (dense, inside) in zip(BLOCKS.names, counts.tolist(), strict=True):
        assert inside == (dense if name in INSIDE else 0.0)


def test_curvature_counts_the_traces_it_was_given():
    counts = CurvatureNormalizer(TRACES, INSIDE).counts(BLOCKS, INSIDE)
    assert counts[:, 0].tolist() == list(TRACES.values())
    assert counts[:, 1].tolist() == [INSIDE.get(name, 0.0) for name in BLOCKS.names]


@pytest.mark.parametrize("normalizer", ALL)
def test_sigma_one_has_factor_exactly_one(normalizer: Normalizer):
    assert normalizer.factor(torch.ones(6), normalizer.counts(BLOCKS)) == 1.0


def test_without_a_normaliser_sigma_is_taken_as_it_is():
    for shape, basis in (((6,), ()), ((6, 2), INSIDE)):
        normalizer = NoNormalizer()
        assert normalizer.factor(random_sigma(*shape), normalizer.counts(BLOCKS, basis)) == 1.0


@pytest.mark.parametrize("normalizer", ALL)
def test_a_normaliser_comes_back_from_its_config(normalizer: Normalizer):
    assert build_normalizer(**normalizer_config(normalizer)) == normalizer


def test_normalisers_are_known_by_their_names():
    assert sorted(NORMALIZERS) == ["curvature", "energy", "none"]
    with pytest.raises(ValueError, match="unknown tuner normalizer 'mine': l2l has energy, curvature, none"):
        build_normalizer("mine")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_trace_that_is_not_positive_is_refused(value: float):
    for traces in ({"traces": {"a": value}}, {"basis_traces": {"a": value}}):
        with pytest.raises(ValueError, match=f"the curvature trace of block 'a' is {value}: it must be positive"):
            CurvatureNormalizer(**traces)


def test_a_missing_trace_is_named():
    with pytest.raises(ValueError, match=r"has no trace of block 'embed\.weight' \(6 are missing\)"):
        CurvatureNormalizer().counts(BLOCKS)
    with pytest.raises(ValueError, match=r"no trace inside the basis of block 'attention\.out\.weight' \(1 are"):
        CurvatureNormalizer(TRACES).counts(BLOCKS, {"attention.out.weight"})


@pytest.mark.parametrize("sigma", [[0.0] * 6, [float("nan")] * 6])
def test_sigma_without_curvature_is_refused(sigma: list[float]):
    normalizer = CurvatureNormalizer(TRACES)
    with pytest.raises(ValueError, match="sigma has curvature"):
        normalizer.factor(torch.tensor(sigma), normalizer.counts(BLOCKS))


@pytest.mark.parametrize("values", [(0.0, 16), (15.0, -1), (float("nan"), 16)])
def test_an_energy_that_counts_nothing_is_refused(values: tuple[float, int]):
    with pytest.raises(ValueError, match="must be positive and finite"):
        EnergyNormalizer(*values)
