"""Movement, reconstructed initialisation, sigma by kind, basis: figures of a tuner computed from it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import TiedLM
from torch import Tensor

from l2l.params import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.diagnostics import (
    basis_line,
    movement,
    reconstruct,
    reconstructed_state,
    sigma_by_kind,
    sigma_change,
    typical_sigma,
)
from l2l.tuners.model import random_basis

VALUES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_fresh_tuner_has_not_moved():
    for architecture in ("per_block_mlp", "shared_mlp", "table"):
        tuner = Tuner.for_model(TiedLM(), architecture)
        assert movement(tuner) == sigma_change(tuner) == [0.0] * 6


def test_only_the_block_whose_network_moved_has_moved():
    tuner = Tuner.for_model(TiedLM(), seed=1)
    with torch.no_grad():
        tuner.network.get_parameter("second_bias")[2] += 0.5
    moved, changed = movement(tuner), sigma_change(tuner)
    assert [value > 0 for value in moved] == [value != 0 for value in changed] == [i == 2 for i in range(6)]
    parts = [value[2].flatten() for value in Tuner.for_model(TiedLM(), seed=1).network.state_dict().values()]
    assert moved[2] == pytest.approx(0.5 / torch.cat(parts).norm().item(), rel=1e-5)


def test_shared_weights_that_moved_moved_every_block():
    tuner = Tuner.for_model(TiedLM(), "shared_mlp", embedding=2)
    with torch.no_grad():
        tuner.network.get_parameter("second_bias")[0] += 0.5
    assert min(movement(tuner)) > 0
    assert sigma_change(tuner) == pytest.approx([torch.tensor(0.5).exp().item() - 1] * 6, rel=1e-5)


def test_the_movement_of_a_table_that_started_at_zero_is_the_change_of_log_sigma():
    tuner = Tuner.for_model(TiedLM(), "table")
    with torch.no_grad():
        tuner.network.get_parameter("log_sigma")[1] -= 0.25
    assert movement(tuner) == [0.0, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_sigma_is_summed_up_by_kind_of_block():
    model = TiedLM()
    tuner = Tuner.for_model(model, "table", values=VALUES)
    sigma = dict(zip(Blocks.of(model).names, VALUES, strict=True))
    rows = {row.kind: row for row in sigma_by_kind(tuner)}
    norms = [sigma["norm.weight"], sigma["norm.bias"]]
    assert rows["vector"].blocks == 2
    assert (rows["vector"].smallest, rows["vector"].largest) == pytest.approx((min(norms), max(norms)))
    assert rows["vector"].median == pytest.approx(sum(norms) / 2)
    assert rows["vector"].variation == pytest.approx(0.5 / (sum(norms) / 2))
    assert rows["embedding"].median == pytest.approx(sigma["embed.weight"])
    assert rows["all"].blocks == 6
    assert set(rows) == {"embedding", "attention matrix", "attention vector", "vector", "all"}


def test_sigma_inside_the_basis_is_shown_for_the_blocks_that_have_one():
    blocks = Blocks.of(TiedLM())
    basis = random_basis(blocks, {"attention.qkv.weight": 3, "attention.out.weight": 2})
    tuner = Tuner.for_model(TiedLM(), "table", basis=basis, basis_start=0.5)
    last = sigma_by_kind(tuner)[-1]
    assert (last.kind, last.blocks, last.median) == ("inside the basis", 2, pytest.approx(0.5))
    assert basis_line(tuner) == "2 blocks, rank 2 to 3, 0.2 KiB"
    assert typical_sigma(tuner).shape == (6, 2)


def test_the_card_tells_all_of_it_and_long_lists_are_counted(tmp_path: Path):
    blocks = Blocks.of(TiedLM())
    tuner = Tuner.for_model(TiedLM(), "table", values=VALUES, basis=random_basis(blocks, 2))
    with torch.no_grad():
        tuner.network.get_parameter("log_sigma")[0] += 0.5
    card = (tuner.save_pretrained(tmp_path) / "README.md").read_text()
    assert '"values": "6 values"' in card
    assert "Basis: 2 blocks, rank 2, 0.1 KiB." in card
    assert "Distance from its initialisation, relative: median 0.0000, largest `embed.weight`" in card
    assert "Change of sigma since, relative: median +0.0000, largest `embed.weight` +0.6487" in card
    assert "| embedding | 1 | 1.649 | 1.649 | 1.649 | 0.000 |" in card
    assert "| inside the basis | 2 | 0.3 | 0.3 | 0.3 | 0.000 |" in card


def drawn(copies: list[int], numbers: int = 449, seed: int = 0) -> Tensor:
    """[blocks, numbers]: as many rows of each draw as ``copies`` says, in turn, as devices hand them out."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(len(copies), numbers, generator=draw) * 2 - 1
    order = [i for round in range(max(copies)) for i, count in enumerate(copies) if round < count]
    return rows[order]


def test_blocks_that_did_not_move_are_what_they_began_as():
    weights = drawn([3, 4, 5])
    found = reconstruct(weights)
    assert torch.equal(found.initial, weights.double())
    assert found.sizes == tuple(found.group.count(number) for number in found.group)
    assert sorted(set(found.sizes)) == [3, 4, 5]


def test_a_block_that_moved_is_found_and_the_others_of_its_group_did_not():
    started = drawn([3, 3, 5])
    weights = started.clone()
    draw = torch.Generator().manual_seed(9)
    weights[4] += 0.3 * (torch.rand(449, generator=draw) - 0.5)
    found = reconstruct(weights)
    assert torch.equal(found.initial, started.double())
    moved = (weights - found.initial).norm(dim=1)
    assert (moved > 0).nonzero().flatten().tolist() == [4]


def test_of_two_blocks_each_counts_half_of_what_one_moved():
    started = drawn([2, 3])
    weights = started.clone()
    weights[0, 0] += 0.5
    moved = (weights - reconstruct(weights).initial).norm(dim=1)
    assert moved.tolist() == [0.25, 0.0, 0.25, 0.0, 0.0]


def test_a_block_that_nothing_is_like_stays_unknown():
    weights = drawn([1, 3])
    initial = reconstruct(weights).initial
    assert initial.isnan().all(1).tolist() == [True, False, False, False]
    assert reconstructed_state({"one": weights[:, :400], "two": weights[:, 400:]}) is None


def test_a_state_comes_back_with_its_names_and_forms():
    weights = drawn([3, 3])
    state = {"first": weights[:, :320].reshape(6, 64, 5), "last": weights[:, 448]}
    found = reconstructed_state(state)
    assert found is not None
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == torch.float32 for name in state)
