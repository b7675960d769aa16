"""Offloaded layers: the run is that of a model in memory, bit for bit, and no more than two layers are on the device."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from perturbed import language_loss
from torch import Tensor

import l2l
from l2l.methods.registry import build_method
from l2l.models.offload import LayerStream, offload_layers, stream_of
from l2l.models.prefix import layer_list, train_only
from l2l.models.schemes import apply_scheme
from l2l.models.shapes import tiny_random
from l2l.optim import ZOOptimizer

STEPS = 4


def made(dtype: torch.dtype = torch.float32, family: str = "llama") -> Any:
    return tiny_random(family, num_hidden_layers=4).to(dtype).eval()


def trained(model: Any, method: str = "mezo", fused: bool = True, args: dict[str, Any] | None = None, **options: Any) -> Any:
    """Losses of steps, a loss at theta between and after them, and the weights."""
    loss = language_loss(model)
    built = build_method(method, 1e-3, args or {}, None, model)
    optimizer = ZOOptimizer(model, built, 1e-2, 3, perturb="auto" if stream_of(model) else "functional", **options)
    losses: list[float] = []

    def seen() -> float:
        optimizer.theta.restore()
        with torch.inference_mode():
            return loss().item()

    def loop() -> None:
        for step in range(STEPS):
            losses.append(optimizer.step(loss))
            if step == 1:
                losses.append(seen())

    if fused:
        with optimizer.theta.fused_steps():
            loop()
    else:
        loop()
    losses.append(seen())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], own) for name, own in expected[1].items())


@pytest.mark.parametrize(
    ("method", "fused", "dtype", "options"),
    [
        ("mezo", True, torch.float32, {}),
        ("mezo", False, torch.float32, {"weight_decay": 0.1}),
        ("mezo", True, torch.bfloat16, {"update": "master"}),
        ("mezo", True, torch.bfloat16, {"update": "stochastic"}),
        ("fzoo", True, torch.float32, {"on_bad_loss": "rollback:1"}),
        ("adam", True, torch.bfloat16, {"update": "master"}),
        ("lozo", True, torch.float32, {}),
        ("conservative", True, torch.float32, {}),
        ("sparse_mezo", True, torch.float32, {}),
    ],
)
def test_an_offloaded_run_is_that_in_memory(method: str, fused: bool, dtype: torch.dtype, options: dict[str, Any]):
    expected = trained(made(dtype), method, fused, **options)
    model = made(dtype)
    stream = offload_layers(model, "cpu")
    assert_same(trained(model, method, fused, **options), expected)
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in stream.layers)
    assert largest < stream.peak_bytes <= 2 * largest
