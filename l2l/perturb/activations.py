"""What linear maps are given as input: for each weight matrix, a basis of the span that its inputs mostly lie in.

The gradient of such a matrix is a sum of outer products with its inputs: outside their span it is zero. Inputs are not
stored: of each call a sketch of few rows is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from l2l.blocks import Block, Blocks
from l2l.noise import Key
from l2l.noise.pieces import computed_in
from l2l.perturb.basis import full_precision
from l2l.perturb.factors import factor, orthonormal
from l2l.perturb.inputs import Watch


@dataclass(frozen=True)
class Span:
    """Where the inputs of one weight matrix mostly lie."""

    vectors: Tensor
    """[d, r], orthonormal columns, d being the length of an input."""
    over_rows: bool
    """Whether inputs meet the matrix's rows, as in ``x @ weight``; else its columns, as in ``linear(x, weight)``."""


@final
class Activations(Watch):
    """While it is active, watches what linear maps with a block as weight are given.

    Args:
        rank: r; of a block with shorter inputs, their length.
        iterations: of the power iteration.
        key: of the noise that it starts from.
    """

    def __init__(self, blocks: Blocks, rank: int, iterations: int, key: Key) -> None:
        super().__init__(blocks)
        self.spans: dict[int, Span] = {}
        self._sketches: dict[int, Tensor] = {}  # [at most r, d]: what stands for the inputs seen so far when more come
        self._blocks, self._rank, self._iterations, self._key = blocks, rank, iterations, key

    def during(self, closure: Callable[[], Any]) -> Any:
        """The closure's value, watched."""
        with self:
            value = closure()
        self._sketches.clear()
        return value

    def multiplied(self, index: int, inputs: Tensor, over_rows: bool) -> None:
        known = self.spans.get(index)
        if known is not None and known.over_rows != over_rows:
            return  # read from its other side as well: the side that was seen first holds
        block = self._blocks[index]
        rows = inputs.reshape(-1, inputs.shape[-1]).to(computed_in(block.tensor.dtype))
        with torch.no_grad(), full_precision(rows.device):
            vectors, self._sketches[index] = self._dominant(block, rows, self._sketches.get(index))
        self.spans[index] = Span(vectors, over_rows)

    def _dominant(self, block: Block, rows: Tensor, sketch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Basis of the rows and of what the sketch stands for, and the sketch of both."""
        if sketch is not None:
            rows = torch.cat([sketch, rows])
        width = rows.shape[1]
        vectors = factor(block, "activations", self._key, (width, min(self._rank, width)))
        for _ in range(self._iterations):
            vectors = orthonormal(rows.t() @ (rows @ vectors))
        return vectors, torch.linalg.qr(rows @ vectors).R @ vectors.t()
