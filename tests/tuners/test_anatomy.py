"""What is shown of a tuner: how far it moved, its sigma by kind, its basis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import TiedLM

from l2l.params.blocks import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.diagnostics import basis_line, movement, sigma_by_kind, sigma_change, typical_sigma
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
