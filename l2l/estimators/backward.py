"""A backward pass that keeps no gradients: each is handed over and freed as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.estimators.base import Closure, as_loss


def consume_gradients(closure: Closure, blocks: Blocks, consume: Callable[[int, Tensor], None]) -> float:
    """Loss and gradient at theta as it stands; ``consume(i, gradient_i)`` is called once per block, in backward order.

    Peak memory: the activations and the gradients in flight, never a gradient per parameter. Gradients that the caller
    had stored stay as they were. A block that the loss does not reach is not reported.

    Raises:
        TypeError: the closure's value carries no graph.
        FloatingPointError: the loss is not finite.
    """
    with torch.enable_grad(), _gradients_only_for(blocks), _hooks(blocks, consume):
        loss = closure()
        value = as_loss(loss)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise TypeError("the closure returned a loss without a graph: do not detach it or call .item() in it")
        loss.backward(inputs=[block.tensor for block in blocks])  # other parameters gather no gradient
    return value


@contextmanager
def _gradients_only_for(blocks: Blocks) -> Iterator[None]:
    kept = [(block.tensor, block.tensor.requires_grad, block.tensor.grad) for block in blocks]
    try:
        for tensor, _, _ in kept:
            tensor.requires_grad_(True)
            tensor.grad = None
        yield
    finally:
        for tensor, required, grad in kept:
            tensor.grad = grad
            tensor.requires_grad_(required)


@contextmanager
def _hooks(blocks: Blocks, consume: Callable[[int, Tensor], None]) -> Iterator[None]:
    def hook(index: int) -> Callable[[Tensor], None]:
        def take(tensor: Tensor) -> None:
            gradient, tensor.grad = tensor.grad, None
            if gradient is not None:
                consume(index, gradient)

        return take

    handles = [block.tensor.register_post_accumulate_grad_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
