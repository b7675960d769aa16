"""Squared norms of the gradient, per component of the direction: without noise from two batches, with it from one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from l2l.blocks import Blocks
from l2l.estimators.backward import consume_gradients
from l2l.estimators.base import Closure
from l2l.meta.components import Components
from l2l.meta.objectives.base import MetaState


@dataclass(frozen=True)
class Statistics:
    """What two independent batches say about the gradient at theta."""

    signal: Tensor
    """[components] float64: <gradient of A, gradient of B>, unbiased for the squared norm of the full gradient (G)."""
    noisy: Tensor
    """[components] float64: squared norm of one batch's gradient, the noise of the batch included (G'); mean of both."""
    loss: float
    """Of batch A at theta."""
    passes: int


def gradient_statistics(point: MetaState, components: Components, keep: bool = True) -> Statistics:
    """Gradients of batches A and B at theta. That of A goes to ``point.consume`` too.

    Args:
        keep: hold A's gradient while B's is taken: two backward passes, memory for one gradient of the model. False: a third
            backward pass, of the sum of both losses, and <a, b> = (|a + b|^2 - |a|^2 - |b|^2) / 2: no gradient is held,
            and where the batches are alike, or nearly orthogonal, figures are lost to cancellation.
    """
    own, others, both = components.zeros(), components.zeros(), components.zeros()
    kept: dict[int, Tensor] = {}

    def first(index: int, gradient: Tensor) -> None:
        components.add(own, index, gradient, gradient)
        if keep:
            kept[index] = gradient
        if point.consume is not None:
            point.consume(index, gradient)

    def second(index: int, gradient: Tensor) -> None:
        components.add(others, index, gradient, gradient)
        mine = kept.pop(index, None)
        if mine is not None:
            components.add(both, index, mine, gradient)

    loss = consume_gradients(point.closure, point.theta.blocks, first)
    consume_gradients(point.other, point.theta.blocks, second)
    if not keep:
        both = (
            squared_norms(point.theta.blocks, components, lambda: point.closure() + point.other()) - own - others
        ) / 2
    return Statistics(both, (own + others) / 2, loss, 6 if keep else 12)


def squared_norms(blocks: Blocks, components: Components, closure: Closure) -> Tensor:
    """[components] float64: squared norms of a loss's gradient. One forward and backward pass."""
    found = components.zeros()
    consume_gradients(closure, blocks, lambda index, gradient: components.add(found, index, gradient, gradient))
    return found
