"""Where tuners began is read off blocks that started alike."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l.tuners.diagnostics import reconstruct, reconstructed_state


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
