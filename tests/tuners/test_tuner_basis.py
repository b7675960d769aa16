"""The basis of a tuner: made, checked, kept, and handed to directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import TiedLM
from torch import Tensor

from l2l.params import Blocks
from l2l.tuners import io as store
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics
from l2l.tuners.model import random_basis, ranks
from l2l.tuners.normalize import EnergyNormalizer

MODEL = TiedLM()
BLOCKS = Blocks.of(MODEL)
MATRICES = {"attention.qkv.weight": 8, "attention.out.weight": 8}


@pytest.fixture
def basis() -> dict[str, Tensor]:
    return random_basis(BLOCKS, 3, seed=1)


@pytest.fixture
def tuner(basis: dict[str, Tensor]) -> Tuner:
    return Tuner.for_model(MODEL, "shared_mlp", basis=basis, start="random", embedding=2)


def scales(tuner: Tuner, blocks: Blocks = BLOCKS) -> Tensor:
    return tuner.scales(tuner.features(RunStatistics.start(blocks)), blocks.names).detach()


@pytest.mark.parametrize("r", [1, 3, 8, 20])
def test_a_random_basis_has_orthonormal_columns_for_every_matrix_that_is_no_embedding(r: int):
    basis = random_basis(BLOCKS, r)
    assert basis.keys() == MATRICES.keys()
    for name, vectors in basis.items():
        assert vectors.shape == (MATRICES[name], min(r, 8))
        torch.testing.assert_close(vectors.t() @ vectors, torch.eye(min(r, 8)), rtol=0, atol=1e-6)


def test_a_random_basis_takes_the_ranks_of_another(basis: dict[str, Tensor]):
    one, same, other = (random_basis(BLOCKS, ranks(basis), seed) for seed in (1, 1, 2))
    assert ranks(one) == ranks(basis) == {name: 3 for name in MATRICES}
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert ranks(random_basis(BLOCKS, {"embed.weight": 2})) == {"embed.weight": 2}


@pytest.mark.parametrize("wanted", [0, {"attention.out.weight": 9}, {"norm.weight": 1}, {"nowhere": 1}])
def test_a_rank_that_cannot_be_is_refused(wanted):
    with pytest.raises(ValueError, match=r"no basis of rank \d for block '.*': the rank is 1 to the width of a matrix"):
        random_basis(BLOCKS, wanted)


def test_a_tuner_with_a_basis_gives_two_scales_and_none_where_there_is_no_basis(tuner: Tuner):
    found = scales(tuner)
    assert found.shape == (6, 2)
    for name, (dense, inside) in zip(BLOCKS.names, found.tolist(), strict=True):
        assert dense > 0
        assert (inside > 0) == (name in MATRICES)
    assert torch.equal(tuner.sigma(tuner.features(RunStatistics.start(BLOCKS)), BLOCKS.names), found[:, 0])


def test_the_factor_spends_the_energy_of_mezo_on_both_parts(tuner: Tuner):
    found, counts = scales(tuner), EnergyNormalizer().counts(BLOCKS)
    scaled = (tuner.factor(found, BLOCKS) * found.double()) ** 2
    assert (counts * scaled.sum(1)).sum().item() == pytest.approx(counts.sum().item(), rel=1e-12)


def test_a_normaliser_set_later_is_used_and_the_basis_stays_the_same_object(tuner: Tuner):
    found, before = scales(tuner), tuner.basis_for(BLOCKS)
    assert tuner.factor(found, BLOCKS) != 1.0
    tuner.normalizer = EnergyNormalizer(enabled=False)
    assert tuner.factor(found, BLOCKS) == 1.0
    assert tuner.basis_for(BLOCKS) is before


def test_directions_get_the_basis_by_block_and_the_same_object_every_time(tuner: Tuner, basis: dict[str, Tensor]):
    found = tuner.basis_for(BLOCKS)
    assert found is not None
    assert found is tuner.basis_for(BLOCKS)
    assert {BLOCKS.names[i] for i in found.vectors} == basis.keys()
    for i, vectors in found.vectors.items():
        assert torch.equal(vectors, basis[BLOCKS.names[i]])
    assert Tuner.for_model(MODEL).basis_for(BLOCKS) is None


def test_a_frozen_subset_gets_its_part_of_the_basis(tuner: Tuner):
    part = Blocks(block for block in BLOCKS if "qkv" in block.name)
    found = tuner.basis_for(part)
    assert found is not None
    assert list(found.vectors) == [0]
    torch.testing.assert_close(scales(tuner, part)[0], scales(tuner)[BLOCKS.names.index(part.names[0])])
    bare = Blocks(block for block in BLOCKS if "norm" in block.name)
    assert tuner.basis_for(bare) is None
    assert tuner.factor(scales(tuner, bare), bare) > 0


def test_a_basis_is_saved_and_comes_back_bit_for_bit(tuner: Tuner, basis: dict[str, Tensor], tmp_path: Path):
    folder = tuner.save_pretrained(tmp_path)
    kept = safetensors.torch.load_file(folder / store.WEIGHTS)
    assert {name for name in kept if name.startswith("basis.")} == {f"basis.{name}" for name in basis}
    loaded = Tuner.from_pretrained(folder)
    assert loaded.basis is not None
    assert all(torch.equal(loaded.basis[name], basis[name]) for name in basis)
    assert torch.equal(scales(loaded), scales(tuner))


def test_another_basis_can_be_given_to_the_same_network(tuner: Tuner):
    other = tuner.with_basis(random_basis(BLOCKS, 1))
    assert other.network is tuner.network
    assert other.basis is not None
    assert ranks(other.basis) == {name: 1 for name in MATRICES}
    assert torch.equal(scales(other), scales(tuner))
    without = tuner.with_basis(None)
    assert without.basis is None
    assert (scales(without)[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"nowhere": v}, "is for a block 'nowhere' that the model does not have"),
        (lambda v: {"norm.weight": v}, "only a matrix can have one"),
        (lambda v: {"attention.out.weight": v[:5]}, r"must be \[8, r\]"),
        (lambda v: {"attention.out.weight": 2 * v}, "columns that are not orthonormal"),
        (lambda v: {"attention.out.weight": v / 0}, "not a finite number"),
    ],
)
def test_a_basis_that_does_not_fit_is_refused_naming_the_block(basis: dict[str, Tensor], change, message: str):
    with pytest.raises(ValueError, match=message):
        Tuner.for_model(MODEL, basis=change(basis["attention.out.weight"]))


def test_a_network_without_a_second_output_cannot_have_a_basis(basis: dict[str, Tensor]):
    with pytest.raises(ValueError, match="its network gives no sigma for it: make it with outputs=2"):
        Tuner.for_model(MODEL).with_basis(basis)


@pytest.mark.parametrize("change", ["drop", "add", "cut"])
def test_a_file_whose_basis_is_not_the_one_its_config_lists_is_refused(tuner: Tuner, tmp_path: Path, change: str):
    folder = tuner.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(folder / store.WEIGHTS)
    name = "basis.attention.out.weight"
    taken = weights.pop(name)
    if change == "add":
        weights |= {name: taken, "basis.embed.weight": taken.clone()}
    elif change == "cut":
        weights |= {name: taken[:, :2].contiguous()}
    safetensors.torch.save_file(weights, folder / store.WEIGHTS)
    with pytest.raises(ValueError, match="config lists a basis for 2 blocks that is not there"):
        Tuner.from_pretrained(folder)
