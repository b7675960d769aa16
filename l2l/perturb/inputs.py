"""How large the inputs are that each weight of a matrix is multiplied by, seen during one evaluation.

As with transient weights, interception is by argument, not by module: linear maps and embedding lookups, in any code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from l2l.blocks import Blocks

_PRODUCTS = (torch.addmm, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__)
"""Of inputs that meet the rows of a weight matrix."""


@final
class InputNorms(TorchFunctionMode):
    """While it is active, adds up squares of what weight matrices are given; only sums are kept."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self._index = {id(block.tensor): i for i, block in enumerate(blocks) if block.tensor.ndim == 2}
        self._rows: dict[int, Tensor] = {}
        self._columns: dict[int, Tensor] = {}

    def of(self, index: int) -> Tensor | None:
        """Norm of the inputs of each weight of block ``index``, [rows, columns] or with 1 in place of one of them.

        A weight that is read in two ways has the inputs of both. None: no linear map or lookup has read the block.
        """
        rows, columns = self._rows.get(index), self._columns.get(index)
        sides = [side for side in (rows if rows is None else rows[:, None], columns) if side is not None]
        return sum(sides[1:], start=sides[0]).sqrt() if sides else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = [*args, *(kwargs[name] for name in ("input", "weight") if name in kwargs)]
        first = 1 if func is torch.addmm else 0
        index = self._index.get(id(values[first + 1])) if len(values) > first + 1 else None
        if index is not None and func is functional.linear:
            _add(self._columns, index, _squares(values[0]))
        elif index is not None and func is functional.embedding:
            counts = torch.bincount(values[0].reshape(-1), minlength=len(values[1]))
            _add(self._rows, index, counts.float())
        elif index is not None and func in _PRODUCTS:
            _add(self._rows, index, _squares(values[first]))
        return func(*args, **kwargs)


def _squares(inputs: Tensor) -> Tensor:
    """[width]: sums over all rows."""
    return inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0)


def _add(sums: dict[int, Tensor], index: int, more: Tensor) -> None:
    sums[index] = sums[index] + more if index in sums else more
