"""What linear maps are given as input: for each weight matrix, a basis of the span that its inputs mostly lie in.

The gradient of such a matrix is a sum of outer products with its inputs: outside their span it is zero. As with transient
weights, interception is by argument, not by module. Inputs are not stored: of each call a sketch of few rows is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from l2l.blocks import Block, Blocks
from l2l.noise import Key
from l2l.noise.pieces import computed_in
from l2l.perturb.basis import full_precision
from l2l.perturb.factors import factor, orthonormal

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_SUMS = (torch.addmm, Tensor.addmm)
_TURNS = (Tensor.t, torch.t, *(getattr(Tensor, name).__get__ for name in ("T", "mT")))


@dataclass(frozen=True)
class Span:
    """Where the inputs of one weight matrix mostly lie."""

    vectors: Tensor
    """[d, r], orthonormal columns, d being the length of an input."""
    over_rows: bool
    """Whether inputs meet the matrix's rows, as in ``x @ weight``; else its columns, as in ``linear(x, weight)``."""


@final
class Activations(TorchFunctionMode):
    """While it is active, watches what linear maps with a block as weight are given.

    Args:
        rank: r; of a block with shorter inputs, their length.
        iterations: of the power iteration.
        key: of the noise that it starts from.
    """

    def __init__(self, blocks: Blocks, rank: int, iterations: int, key: Key) -> None:
        super().__init__()
        self.spans: dict[int, Span] = {}
        self._sketches: dict[int, Tensor] = {}  # [at most r, d]: what stands for the inputs seen so far when more come
        self._blocks, self._rank, self._iterations, self._key = blocks, rank, iterations, key
        self._index = {id(block.tensor): i for i, block in enumerate(blocks) if block.tensor.ndim == 2}
        self._turned: dict[int, tuple[Tensor, int]] = {}  # transposed views, held so that their identity stays theirs

    def during(self, closure: Callable[[], Any]) -> Any:
        """The closure's value, watched."""
        with self:
            value = closure()
        self._turned.clear()
        self._sketches.clear()
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _TURNS and id(args[0]) in self._index:
            self._turned[id(result)] = (result, self._index[id(args[0])])
            return result
        values = [*args, *(kwargs[name] for name in ("input", "weight") if name in kwargs)]
        if func is functional.linear:
            self._see(values[0], values[1], turned=True)
        elif func in _PRODUCTS or func in _SUMS:
            first = 1 if func in _SUMS else 0
            if len(args) > first + 1:
                self._see(args[first], args[first + 1], turned=False)
        return result

    def _see(self, inputs: Tensor, weight: Tensor, turned: bool) -> None:
        """Take in ``inputs @ weight``, or ``inputs @ weight.T`` where it is ``turned``."""
        index = self._index.get(id(weight))
        if index is None and id(weight) in self._turned:
            index, turned = self._turned[id(weight)][1], not turned
        if index is None or not inputs.is_floating_point() or not inputs.numel():
            return
        known = self.spans.get(index)
        if known is not None and known.over_rows == turned:
            return  # read from its other side as well: the side that was seen first holds
        block = self._blocks[index]
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(computed_in(block.tensor.dtype))
        with torch.no_grad(), full_precision(rows.device):
            vectors, self._sketches[index] = self._dominant(block, rows, self._sketches.get(index))
        self.spans[index] = Span(vectors, not turned)

    def _dominant(self, block: Block, rows: Tensor, sketch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Basis of the rows and of what the sketch stands for, and the sketch of both."""
        if sketch is not None:
            rows = torch.cat([sketch, rows])
        width = rows.shape[1]
        vectors = factor(block, "activations", self._key, (width, min(self._rank, width)))
        for _ in range(self._iterations):
            vectors = orthonormal(rows.t() @ (rows @ vectors))
        return vectors, torch.linalg.qr(rows @ vectors).R @ vectors.t()
