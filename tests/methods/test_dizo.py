"""DiZO: which blocks it projects, and that the projection does something, in any architecture."""

from __future__ import annotations

import pytest
import torch
from cases import TiedLM, farthest, weights
from torch import Tensor, nn

from l2l.methods.dizo import DiZO as Method
from l2l.methods.dizo import clipped_normal, projected_blocks
from l2l.models.shapes import tiny_random
from l2l.noise import Key
from l2l.optim import DiZO, MeZO
from l2l.params import Blocks

PROJECTED = {"opt": 8, "llama": 8, "qwen2": 8, "gpt2": 4}
"""Matrices of attention in two layers."""


def language_loss(model: nn.Module) -> Tensor:
    tokens = torch.randint(100, (2, 6), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("family", PROJECTED)
def test_the_attention_matrices_of_any_architecture_are_projected(family: str):
    blocks = Blocks.of(tiny_random(family))
    chosen = [blocks[i] for i in projected_blocks(blocks, None)]
    assert len(chosen) == PROJECTED[family]
    assert all(block.attention and block.tensor.ndim == 2 for block in chosen)


@pytest.mark.parametrize("search", ["zo", "fo"])
@pytest.mark.parametrize("family", PROJECTED)
def test_after_a_search_the_projected_weights_differ_from_those_of_mezo_and_the_others_do_not(family: str, search: str):
    projecting, plain = tiny_random(family), tiny_random(family)
    dizo = DiZO(projecting, lr=1e-3, interval=2, iterations=2, search=search)
    mezo = MeZO(plain, lr=1e-3)
    for _ in range(2):
        dizo.step(lambda: language_loss(projecting))
        mezo.step(lambda: language_loss(plain))
    left, right = weights(projecting), weights(plain)
    chosen = {dizo.blocks[i].name for i in projected_blocks(dizo.blocks, None)}
    assert {name for name in left if not torch.equal(left[name], right[name])} == chosen


def test_a_pattern_chooses_the_blocks_and_one_that_matches_nothing_is_refused():
    blocks = Blocks.of(tiny_random("llama"))
    chosen = [blocks[i].name for i in projected_blocks(blocks, r"\.(k|v)_proj\.weight$")]
    assert len(chosen) == 4
    with pytest.raises(ValueError, match=r"projected='c_attn' matches no block; names look like 'model.embed_tokens"):
        DiZO(tiny_random("llama"), projected="c_attn")


def test_without_attention_all_matrices_but_embeddings_are_projected_and_without_matrices_all_blocks():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    blocks = Blocks.of(model)
    assert [blocks[i].name for i in projected_blocks(blocks, None)] == ["1.weight"]
    assert projected_blocks(Blocks.of(nn.LayerNorm(2)), None) == [0, 1]


def test_ratios_stay_within_the_clip():
    model = TiedLM()
    optimizer = DiZO(model, lr=0.1, interval=1, iterations=3, step_size=1e6, clip=0.2)
    plain = TiedLM()
    MeZO(plain, lr=0.1).step(plain)
    anchor = weights(model)["attention.out.weight"]
    optimizer.step(model)
    moved = plain.attention.out.weight.detach() - anchor
    ratio = (model.attention.out.weight.detach() - anchor).norm() / moved.norm()
    assert 0.8 - 1e-4 < ratio < 1.2 + 1e-4
    assert abs(ratio - 1) > 0.1


def test_a_search_takes_its_batches_from_fresh():
    model, asked = TiedLM(), []

    def fresh(index: int) -> TiedLM:
        asked.append(index)
        return model

    optimizer = DiZO(model, interval=2, iterations=3)
    optimizer.step(model, fresh)
    assert asked == []
    optimizer.step(model, fresh)
    assert asked == [0, 1, 2]
    assert optimizer.report is not None
    assert optimizer.report.passes == 2 + 3 * 2


def test_backward_passes_of_the_first_order_search_count_as_two_more():
    model = TiedLM()
    optimizer = DiZO(model, interval=1, iterations=3, search="fo")
    optimizer.step(model)
    assert optimizer.report is not None
    assert optimizer.report.passes == 2 + 3 * 3


@pytest.mark.parametrize("search", ["zo", "fo"])
def test_a_flat_loss_leaves_theta_within_rounding(search: str):
    model = TiedLM()
    before = weights(model)
    DiZO(model, interval=1, iterations=2, search=search).step(lambda: 0 * model())
    assert farthest(before, weights(model)) < 1e-6


def test_the_draw_of_the_search_is_clipped_and_is_not_the_blocks_own_noise():
    values = [clipped_normal(Key(0, step), "w", 0.5) for step in range(200)]
    assert max(map(abs, values)) == 0.5
    assert len({value for value in values if abs(value) < 0.5}) > 20
    assert {value > 0 for value in values} == {True, False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0 must be a whole number"),
        ({"iterations": -1}, "iterations=-1 must be a whole number"),
        ({"clip": float("nan")}, "clip=nan must be positive and finite"),
        ({"search": "bo"}, "search='bo' must be one of zo, fo"),
        ({"epsilon": 0.0}, r"epsilon=0.0 must be positive"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Method(**options)
