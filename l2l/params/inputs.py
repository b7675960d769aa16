"""Inputs of weight matrices, observed during an evaluation: their norms, and a basis of the span of most of them.

Interception is by argument, not by module: linear maps and embedding lookups, in any code. The gradient of a linear map's
matrix is a sum of outer products with its inputs: outside their span it is zero. Inputs are not stored: of each call a
sketch of few rows is kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.overrides import TorchFunctionMode

from l2l.noise import Key, computed_in
from l2l.params.blocks import Blocks
from l2l.params.direction import full_precision
from l2l.params.operators import factor, orthonormal

_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
_SUMS = (torch.addmm, torch.Tensor.addmm)
_TURNS = (torch.Tensor.t, torch.t, *(getattr(torch.Tensor, name).__get__ for name in ("T", "mT")))


class Watch(TorchFunctionMode, ABC):
    """While it is active, watches what blocks that are matrices are given, transposed views of them too."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self._index = {id(block.tensor): i for i, block in enumerate(blocks) if block.tensor.ndim == 2}
        self._turned: dict[int, tuple[torch.Tensor, int]] = {}  # transposed views, held so that their identity stays theirs

    @abstractmethod
    def multiplied(self, index: int, inputs: torch.Tensor, over_rows: bool) -> None:
        """Block ``index`` has been multiplied.

        Args:
            inputs: [..., width], floating point.
            over_rows: whether they meet the matrix's rows, as in ``x @ weight``; else its columns, as in
                ``linear(x, weight)``.
        """

    def looked_up(self, index: int, rows: torch.Tensor) -> None:
        """Rows of block ``index``, integers of any shape, have been looked up."""

    def __exit__(self, *error: Any) -> None:
        self._turned.clear()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _TURNS and id(args[0]) in self._index:
            self._turned[id(result)] = (result, self._index[id(args[0])])
            return result
        values = [*args, *(kwargs[name] for name in ("input", "weight") if name in kwargs)]
        first = 1 if func in _SUMS else 0
        if len(values) < first + 2:
            return result
        given, weight = values[first], values[first + 1]
        index, turned = self._index.get(id(weight)), False
        if index is None and id(weight) in self._turned:
            index, turned = self._turned[id(weight)][1], True
        if index is None:
            return result
        if func is torch.nn.functional.embedding and not turned:
            self.looked_up(index, given)
        linear = func is torch.nn.functional.linear
        if (linear or func in _PRODUCTS or func in _SUMS) and given.is_floating_point() and given.numel():
            self.multiplied(index, given.detach(), over_rows=turned == linear)
        return result


@final
class InputNorms(Watch):
    """While it is active, adds up squares of what weight matrices are given; only sums are kept."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__(blocks)
        self._rows: dict[int, torch.Tensor] = {}
        self._columns: dict[int, torch.Tensor] = {}
        self._heights = [len(block.tensor) if block.tensor.ndim else 1 for block in blocks]

    def of(self, index: int) -> torch.Tensor | None:
        """Norm of the inputs of each weight of block ``index``, [rows, columns] or with 1 in place of one of them.

        A weight that is read in two ways has the inputs of both. None: no linear map or lookup has read the block.
        """
        rows, columns = self._rows.get(index), self._columns.get(index)
        sides = [side for side in (rows if rows is None else rows[:, None], columns) if side is not None]
        return sum(sides[1:], start=sides[0]).sqrt() if sides else None

    def multiplied(self, index: int, inputs: torch.Tensor, over_rows: bool) -> None:
        squares = inputs.reshape(-1, inputs.shape[-1]).float().square().sum(0)
        sums = self._rows if over_rows else self._columns
        sums[index] = sums[index] + squares if index in sums else squares

    def looked_up(self, index: int, rows: torch.Tensor) -> None:
        counts = torch.bincount(rows.reshape(-1), minlength=self._heights[index]).float()
        self._rows[index] = self._rows[index] + counts if index in self._rows else counts


@dataclass(frozen=True)
class Span:
    """Where the inputs of one weight matrix mostly lie."""

    vectors: torch.Tensor
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
        self._sketches: dict[int, torch.Tensor] = {}  # [at most r, d]: what stands for the inputs seen so far when more come
        self._blocks, self._rank, self._iterations, self._key = blocks, rank, iterations, key

    def during(self, closure: Callable[[], Any]) -> Any:
        """The closure's value, watched."""
        with self:
            value = closure()
        self._sketches.clear()
        return value

    def multiplied(self, index: int, inputs: torch.Tensor, over_rows: bool) -> None:
        known = self.spans.get(index)
        if known is not None and known.over_rows != over_rows:
            return  # read from its other side as well: the side that was seen first holds
        block = self._blocks[index]
        rows = inputs.reshape(-1, inputs.shape[-1]).to(computed_in(block.tensor.dtype))
        with torch.no_grad(), full_precision(rows.device):
            if index in self._sketches:
                rows = torch.cat([self._sketches[index], rows])
            width = rows.shape[1]
            vectors = factor(block, "activations", self._key, (width, min(self._rank, width)))
            for _ in range(self._iterations):
                vectors = orthonormal(rows.t() @ (rows @ vectors))
            self._sketches[index] = torch.linalg.qr(rows @ vectors).R @ vectors.t()
        self.spans[index] = Span(vectors, over_rows)
