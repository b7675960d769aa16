"""Models that accelerate has spread by a device_map: the run is that of the model in one place, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from perturbed import language_loss

import l2l
from l2l.models.offload import offload_layers
from l2l.models.prefix import train_only
from l2l.models.shapes import tiny_random

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def trained(model: Any, perturb: Any = "auto") -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer, loss = l2l.MeZO(model, lr=1e-2, seed=3, perturb=perturb), language_loss(model)
    with optimizer.theta.fused_steps():
        losses = [optimizer.step(loss) for _ in range(4)]
    return losses, {block.name: block.tensor.detach().clone() for block in optimizer.blocks}


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], own) for name, own in expected[1].items())


def spread(model: Any, disk: tuple[str, ...], folder: Path) -> Any:
    places: dict[str, Any] = {part: "disk" if part in disk else "cpu" for part in PARTS}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("perturb", ["in_place", "functional"])
def test_a_model_whose_parts_move_their_inputs_is_trained_as_one_in_one_place(perturb: str, tmp_path: Path):
    assert_same(trained(spread(tiny_random("llama"), (), tmp_path), perturb), trained(tiny_random("llama"), perturb))


@pytest.mark.parametrize("perturb", ["in_place", "functional"])
def test_layers_that_are_not_trained_may_lie_on_disk(perturb: str, tmp_path: Path):
    found = []
    for disk in ((), ("model.layers.0",)):
        model = tiny_random("llama")
        train_only(model, "top:1")
        found.append(trained(spread(model, disk, tmp_path), perturb))
    assert next(model.model.layers[0].parameters()).is_meta
    assert_same(found[1], found[0])


def test_layers_that_are_trained_may_not_and_the_way_out_leads_out(tmp_path: Path):
    with pytest.raises(ValueError, match=r"block 'model\.layers\.0\.self_attn\.q_proj\.weight' has no memory") as caught:
        l2l.MeZO(spread(tiny_random("llama"), ("model.layers.0",), tmp_path))
    assert "l2l.load_model(..., offload=True), or train other layers" in str(caught.value)
    model = tiny_random("llama")
    offload_layers(model, "cpu")  # what offload=True does
    assert_same(trained(model), trained(tiny_random("llama"), "functional"))
