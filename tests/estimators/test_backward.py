"""A backward pass that hands each gradient over and keeps none."""

from __future__ import annotations

import pytest
import torch
from cases import TiedLM
from torch import Tensor, nn

from l2l.estimators import consume_gradients
from l2l.params import Blocks


def ignore(index: int, gradient: Tensor) -> None:
    """Takes a gradient and drops it."""


def test_gradients_are_those_of_autograd_each_once_tied_weights_included():
    model = TiedLM()
    blocks = Blocks.of(model)
    wanted = torch.autograd.grad(model(), [block.tensor for block in blocks])
    seen: dict[int, Tensor] = {}

    def consume(index: int, gradient: Tensor) -> None:
        assert index not in seen
        seen[index] = gradient.clone()

    assert consume_gradients(model, blocks, consume) == model().item()
    assert len(seen) == len(blocks)
    assert all(torch.equal(seen[index], gradient) for index, gradient in enumerate(wanted))


def test_each_gradient_is_freed_before_the_next_is_complete():
    model = TiedLM()
    blocks = Blocks.of(model)
    held: list[int] = []
    consume_gradients(model, blocks, lambda i, g: held.append(sum(b.tensor.grad is not None for b in blocks)))
    assert held == [0] * len(blocks)


def test_parameters_outside_the_blocks_gather_no_gradient():
    model = TiedLM()
    blocks = Blocks.of(model)
    seen: list[int] = []
    consume_gradients(model, blocks[1:2], lambda index, gradient: seen.append(index))
    assert seen == [0]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_stored_gradients_and_requires_grad_are_as_found_even_after_an_error(error: type[BaseException] | None):
    model = TiedLM()
    blocks = Blocks.of(model)
    stored = [torch.randn_like(block.tensor) for block in blocks]
    for i, (block, gradient) in enumerate(zip(blocks, stored, strict=True)):
        block.tensor.requires_grad_(i % 2 == 0)
        block.tensor.grad = gradient
    copies = [gradient.clone() for gradient in stored]

    def consume(index: int, gradient: Tensor) -> None:
        if error is not None and index == 2:
            raise error("while consuming")

    if error is None:
        consume_gradients(model, blocks, consume)
    else:
        with pytest.raises(error):
            consume_gradients(model, blocks, consume)
    for i, (block, gradient, copy) in enumerate(zip(blocks, stored, copies, strict=True)):
        assert block.tensor.grad is gradient
        assert torch.equal(gradient, copy)
        assert block.tensor.requires_grad == (i % 2 == 0)
    for block in blocks:
        block.tensor.requires_grad_(True)
        block.tensor.grad = None
    model().backward()
    assert all(block.tensor.grad is not None for block in blocks)


def test_an_error_in_the_closure_leaves_everything_as_found():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)

    def closure() -> Tensor:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        consume_gradients(closure, Blocks.of(model, trainable=False), ignore)
    assert [parameter.requires_grad for parameter in (model.weight, model.bias)] == [True, False]


def test_a_block_the_loss_does_not_reach_is_not_reported():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1))
    seen: list[int] = []
    consume_gradients(
        lambda: model.get_parameter("0.weight").sum(), Blocks.of(model), lambda index, gradient: seen.append(index)
    )
    assert seen == [0]


@pytest.mark.parametrize("value", [torch.tensor(1.0), 1.0])
def test_a_loss_without_a_graph_is_refused(value: Tensor | float):
    with pytest.raises(TypeError, match="a loss without a graph: do not detach it"):
        consume_gradients(lambda: value, Blocks.of(nn.Linear(2, 2)), ignore)


def test_a_loss_that_is_not_finite_is_refused_before_the_backward_pass():
    model = nn.Linear(2, 2)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        consume_gradients(lambda: model.weight.sum() * float("nan"), Blocks.of(model), ignore)


def test_it_works_where_the_caller_has_turned_gradients_off():
    model = TiedLM()
    seen: list[int] = []
    with torch.no_grad():
        consume_gradients(model, Blocks.of(model), lambda index, gradient: seen.append(index))
    assert len(seen) == len(Blocks.of(model))
