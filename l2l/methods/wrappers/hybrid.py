"""Backpropagation in the last layers, any method in the others. ``hybrid+mezo``.

Zhang et al. 2024 (ZO-Bench), arXiv:2402.11592, hybrid training; the paper describes it, and no code of it was published. The
method inside evaluates its directions with the last layers unperturbed; one backward pass at theta goes through these alone,
so that theirs are the only activations that are stored; they then take a step of plain SGD. Last is what comes after in the
order of the model's parameters; with the last layers go blocks that follow all layers (a norm, a head), embeddings never."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch

from l2l.estimators import ClosureValue, loss_of, pieces_of, summed_gradients
from l2l.methods import base
from l2l.methods.base import Blocks, Closure, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext
from l2l.params.operators import Group, layer_groups_of, layers


@final
@dataclass(frozen=True)
class Hybrid(base.Wrapper[Any]):
    """Backpropagation in the last layers, under another method."""

    info: ClassVar = base.MethodInfo("Zhang et al. 2024, arXiv:2402.11592", "0P; gradients of the last layers in a step")
    positive = ("fo_lr",)
    layers: int = 1
    """How many last layers; 0 is the method inside. As many as there are, or more: all blocks, which is SGD."""
    match: str | None = None
    """Instead of ``layers``: a regular expression over block names."""
    fo_lr: float = 1.0
    """Learning rate of these layers, in multiples of the run's: that of SGD is often a thousand times MeZO's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_counts(0, layers=self.layers)
        for name in ("leaves_span", "differentiates"):
            object.__setattr__(self, name, getattr(self.inner, name) or self._backward)
        if self._backward:
            object.__setattr__(self, "not_replayable", "the gradients of its last layers are not kept")

    @property
    def _backward(self) -> bool:
        return self.match is not None or self.layers > 0

    @property
    def passes(self) -> float:
        return self.inner.passes + (3 if self._backward else 0)

    @property
    def passes_once(self) -> float:
        return self.inner.passes_once + (3 if self._backward else 0)

    def scratch_bytes(self, blocks: Blocks) -> int:
        last = self.last(blocks) if self._backward else ()
        return self.inner.scratch_bytes(blocks) + sum(blocks[i].tensor.nbytes for i in last)

    def init(self, blocks: Blocks) -> Any:
        self.last(blocks)
        return self.inner.init(blocks)

    def last(self, blocks: Blocks) -> Group:
        """The blocks that go by backpropagation. Raises ValueError where a pattern matches none."""
        if self.match is not None:
            found = frozenset(i for i, name in enumerate(blocks.names) if re.search(self.match, name))
            if not found:
                raise ValueError(f"match={self.match!r} takes no block; names look like {blocks.names[0]!r}")
            return found
        inside, outside = layers(blocks)
        if self.layers >= len(inside):
            return frozenset(range(len(blocks)))
        end = max(i for layer in inside for i in layer)
        after = [i for i in outside if i > end and not blocks[i].embedding]
        chosen = inside[len(inside) - self.layers :]
        return frozenset(i for layer in chosen for i in layer) | frozenset(after if chosen else ())

    def _others(self, blocks: Blocks, direction: Direction) -> Direction:
        return layer_groups_of(direction, frozenset(range(len(blocks))) - self.last(blocks))

    def direction(self, blocks: Blocks, state: Any, key: Key) -> Direction:
        return self._others(blocks, self.inner.direction(blocks, state, key))

    def estimate(self, evaluator: LossEvaluator, state: Any) -> tuple[Estimates, Any]:
        # Outer wrappers act first: they see all blocks.
        still = replace(
            evaluator, transform=lambda direction: self._others(evaluator.theta.blocks, evaluator.transform(direction))
        )
        return base.run_estimator(self.inner, still if self._backward else evaluator, state)

    def update_(self, theta: PerturbedParameters, state: Any, estimates: Estimates, context: StepContext) -> Any:
        last = sorted(self.last(theta.blocks)) if self._backward else []
        gradients = self._gradients(theta, last, context.closure) if last else {}
        following = self.inner.update_(theta, state, estimates, context)
        theta.add_dense_each(gradients.pop, {index: -context.lr[index] * self.fo_lr for index in sorted(gradients)})
        return following

    def _gradients(self, theta: PerturbedParameters, last: Sequence[int], closure: Closure) -> dict[int, torch.Tensor]:
        """Gradients of the last layers at theta, before any update."""
        theta.restore()
        others = [block.tensor for i, block in enumerate(theta.blocks) if i not in last]
        required = [tensor.requires_grad for tensor in others]
        try:
            for tensor in others:  # autograd then stores nothing for their gradients
                tensor.requires_grad_(False)
            pieces, blocks = map(_with_graph, pieces_of(closure)), Blocks(theta.blocks[i] for i in last)
            _, found = summed_gradients(pieces, blocks)
        finally:
            for tensor, before in zip(others, required, strict=True):
                tensor.requires_grad_(before)
        norm = math.hypot(*(torch.linalg.vector_norm(g, dtype=base.accumulation_dtype(g.dtype)).item() for g in found.values()))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}: lower fo_lr, or look for overflowing inputs")
        return {last[i]: gradient for i, gradient in found.items()}


def _with_graph(closure: Closure) -> Closure:
    def checked() -> ClosureValue:
        value = loss_of(closure())
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            raise ValueError(
                "hybrid needs the gradient of what is minimised, and this has none in the last layers: use objective loss, or "
                "leave hybrid out"
            )
        return value

    return checked
