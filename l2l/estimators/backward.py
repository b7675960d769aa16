"""A backward pass that keeps no gradients: each is handed over and freed as soon as it is complete."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.autograd.graph import Node

from l2l.estimators.finite_difference import Closure, as_loss
from l2l.params.blocks import Blocks


def consume_gradients(closure: Closure, blocks: Blocks, consume: Callable[[int, torch.Tensor], None]) -> float:
    """Loss and gradient at the present parameters; ``consume(i, gradient_i)`` is called once per block, in backward order.

    Peak memory: the activations and the gradients in flight, never a gradient per parameter. Gradients that the caller
    had stored stay as they were. A block that the loss does not reach is not reported.

    Raises:
        TypeError: the closure's value carries no graph.
        FloatingPointError: the loss is not finite.
    """
    with torch.enable_grad(), _gradients_handed_over(blocks, consume):
        loss = closure()
        value = as_loss(loss)
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise TypeError("the closure returned a loss without a graph: do not detach it or call .item() in it")
        # Let autograd add up the parts of the gradient of a tensor that is used more than once without a third tensor.
        # It adds in place where it alone holds the first part. A part that is a transposed view of the matrix that the head
        # has computed holds that one too; detached, it does not. Of a tied embedding that is the largest tensor there is.
        for node in _repeated(loss):
            node.register_hook(lambda parts, _: tuple(part if part is None else part.detach() for part in parts))
        loss.backward(inputs=[block.tensor for block in blocks])  # other parameters gather no gradient
    return value


def summed_gradients(pieces: Iterable[Closure], blocks: Blocks) -> tuple[float, dict[int, torch.Tensor]]:
    """(loss, gradient by index of the block) of the sum of the pieces, one :func:`consume_gradients` each."""
    found: dict[int, torch.Tensor] = {}

    def gather(index: int, gradient: torch.Tensor) -> None:
        found[index] = found[index].add_(gradient) if index in found else gradient

    return sum(consume_gradients(piece, blocks, gather) for piece in pieces), found


def _repeated(loss: torch.Tensor) -> list[Node]:
    """Nodes of the loss's graph that hand a part of its gradient to a leaf that gets further parts."""
    givers: dict[Node, list[Node]] = {}
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for following in (other for other, _ in node.next_functions if other is not None):
            if not following.next_functions:
                givers.setdefault(following, []).append(node)
            elif following not in seen:
                seen.add(following)
                waiting.append(following)
    return [node for nodes in givers.values() if len(nodes) > 1 for node in nodes]


@contextmanager
def _gradients_handed_over(blocks: Blocks, consume: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    kept = [(block.tensor, block.tensor.requires_grad, block.tensor.grad) for block in blocks]

    def take(tensor: torch.Tensor, index: int) -> None:
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None:
            consume(index, gradient)

    handles = []
    try:
        for index, (tensor, _, _) in enumerate(kept):
            tensor.requires_grad_(True)
            tensor.grad = None
            handles.append(tensor.register_post_accumulate_grad_hook(partial(take, index=index)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor, required, grad in kept:
            tensor.grad = grad
            tensor.requires_grad_(required)
