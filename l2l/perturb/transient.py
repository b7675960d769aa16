"""Transient weights: during an evaluation, whatever function reads a parameter is given a perturbed copy instead.

The copy lives for the function's call (or as long as a view of it does). The stored weights are not touched, so
nothing has to be brought back, whatever happens in between. Interception is by argument, not by module, so it holds
for any code: fused projections, expert tensors that are sliced, heads that use an embedding's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from l2l.blocks import Blocks
from l2l.noise import TensorSlice, NoiseTerm, add_noise
from l2l.perturb.adding import copy_blocks, copy_rows, parts_of, rows_part
from l2l.perturb.ahead import CopyCache
from l2l.perturb.direction import Move
from l2l.perturb.walker import Perturbation, row_piece

_ASKS = (
    *("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "requires_grad", "grad", "grad_fn", "is_leaf"),
    *("is_sparse", "is_quantized", "is_meta", "is_nested", "itemsize", "nbytes", "names", "_version", "output_nr"),
)
PASSIVE = {getattr(Tensor, name).__get__ for name in _ASKS if hasattr(Tensor, name)} | {
    getattr(Tensor, name)
    for name in (
        *("size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "__hash__"),
        *(
            "element_size",
            "storage_offset",
            "get_device",
            "data_ptr",
            "type",
            "__len__",
            "ndimension",
            "requires_grad_",
        ),
        *("untyped_storage", "is_set_to", "is_same_size", "is_pinned", "is_shared"),
    )
}
"""Functions that ask about a tensor and do not read its values."""


@final
class Substitution:
    """Which parameters are replaced, by what, and which rows of sparse ones were read."""

    def __init__(self, blocks: Blocks, pieces: Mapping[int, TensorSlice], sparse: frozenset[int] = frozenset()) -> None:
        self._blocks = blocks
        self.pieces = dict(pieces)
        self.sparse = sparse
        self._index = {id(blocks[i].tensor): i for i in pieces}
        self._move: Move | None = None
        self._scales: list[float] = []
        self._touched: dict[int, list[Tensor]] = {}
        self.ahead = CopyCache(self.pieces, self._perturb)

    def stand(self, look: Perturbation | None) -> None:
        """Perturb by this look from now on."""
        self._move = None if look is None else look.move(len(self._blocks))
        self._scales = [] if self._move is None else self._move.direction.scales(self._move.amounts)

    def active(self) -> AbstractContextManager[Any]:
        """The context in which parameters are replaced."""
        if self._move is None or not self._index:
            return nullcontext()
        self.ahead.begin()
        return _Mode(self)

    def take_touched(self) -> dict[int, Tensor]:
        """For each sparse block, rows that were looked up since this was last asked, sorted, each once."""
        nothing = torch.zeros(0, dtype=torch.long)
        found = {i: torch.unique(torch.cat(self._touched.get(i, [nothing]))) for i in self.sparse}
        self._touched = {}
        return found

    def index_of(self, value: object) -> int | None:
        """The block whose parameter this object is."""
        return self._index.get(id(value))

    def weight(self, index: int, reader: str) -> Tensor:
        """A perturbed copy of a whole block.

        Raises:
            ValueError: the block is sparse: more than an embedding lookup reads it.
        """
        block = self._blocks[index]
        if index in self.sparse:
            raise ValueError(
                f"sparse_embeddings: block {block.name!r} is also read whole, by {reader}, so every row carries signal "
                "(an embedding tied to the head?); leave sparse_embeddings off for this model"
            )
        return self.ahead.take(index).view(block.tensor.shape)

    def rows(self, index: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Perturbed copies [n, width] of the rows that ``ids`` names, and where in them each id is found."""
        distinct, where = torch.unique(ids, return_inverse=True)
        width = self._blocks[index].numel // self._blocks[index].tensor.shape[0]
        whole = self.pieces[index]
        out = torch.empty(len(distinct), width, dtype=whole.flat.dtype, device=whole.flat.device)
        pieces = [row_piece(whole, row, width, out[k]) for k, row in enumerate(distinct.tolist())]
        self._perturb_rows(pieces, index, distinct, out)
        if index in self.sparse:
            self._touched.setdefault(index, []).append(distinct)
        return out, where

    def _perturb(self, pieces: Sequence[TensorSlice], indices: Sequence[int]) -> None:
        assert self._move is not None, "nothing is replaced at home"
        term = self._term(indices)
        with torch.no_grad():
            parts = parts_of(self._blocks, [self._move], indices)
            if not parts:
                add_noise(pieces, [term])
                return
        with torch.inference_mode():  # memory from an evaluation in inference mode is written again in another
            copy_blocks(pieces, term, {k: parts[i] for k, i in enumerate(indices) if i in parts})

    def _perturb_rows(self, pieces: Sequence[TensorSlice], index: int, rows: Tensor, out: Tensor) -> None:
        assert self._move is not None, "nothing is replaced at home"
        with torch.no_grad():
            part = rows_part(self._blocks, index, self._move, rows)
            if part is None:
                add_noise(pieces, [self._term([index] * len(pieces))])
                return
            terms = [self._term([index])] if self._move.dense(index) else []
            copy_rows(self.pieces[index], pieces, out.view(-1), part, terms)

    def _term(self, indices: Sequence[int]) -> NoiseTerm:
        assert self._move is not None, "nothing is replaced at home"
        direction = self._move.direction
        return NoiseTerm(direction.key, [(self._scales[i],) for i in indices], direction.distribution)


class _Mode(TorchFunctionMode):
    """Replaces the parameters among a function's arguments."""

    def __init__(self, substitution: Substitution) -> None:
        super().__init__()
        self._own = substitution

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [value for value in flat((*args, *kwargs.values())) if self._own.index_of(value) is not None]
        if not found or func in PASSIVE:
            return func(*args, **kwargs)
        if torch.is_grad_enabled():
            raise RuntimeError("gradients can only be taken where theta is at home: call theta.home() before")
        if func is functional.embedding and len(args) > 1 and not renormalises(args, kwargs):
            ids, looked_up = args[0], self._own.index_of(args[1])
            if looked_up is not None:
                rows, where = self._own.rows(looked_up, ids)
                return functional.embedding(where, rows)
        try:
            copies = {id(value): self._copy(value, func) for value in found}
            result = _call(func, copies, {id(v): v.dtype for v in found}, args, kwargs)
        except BaseException:
            self._own.ahead.clear()
            raise
        self._own.ahead.give_back(result)
        return result

    def _copy(self, parameter: Tensor, func: Callable[..., Any]) -> Tensor:
        index = self._own.index_of(parameter)
        assert index is not None, "found among the blocks"
        return self._own.weight(index, getattr(func, "__name__", str(func)))


def renormalises(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an embedding lookup also rescales the rows it reads."""
    return kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None)


_CONVERSIONS = {Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as}


def _call(
    func: Callable[..., Any], copies: dict[int, Tensor], dtypes: dict[int, torch.dtype], args: Any, kwargs: Any
) -> Any:
    """The function on copies. Where one is kept in float32 for a parameter of half precision (a norm's weight, a bias),
    the function computes in float32, unless a half-precision matrix takes part: then the copy is rounded."""
    promoted = {key for key, copy in copies.items() if copy.dtype != dtypes[key]}
    if not promoted or func in _CONVERSIONS:
        return func(*mapped(args, copies), **mapped(kwargs, copies))
    half = dtypes[next(iter(promoted))]
    if len(promoted) < len(copies):
        copies = {key: copy.to(dtypes[key]) for key, copy in copies.items()}
        return func(*mapped(args, copies), **mapped(kwargs, copies))
    widened = {id(v): v.float() for v in flat((*args, *kwargs.values())) if isinstance(v, Tensor) and v.dtype == half}
    result = func(*mapped(args, widened | copies), **mapped(kwargs, widened | copies))
    return result.to(half) if isinstance(result, Tensor) and result.dtype == torch.float32 else result


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, those in lists and tuples one by one."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value


def mapped(values: Any, copies: Mapping[int, Tensor]) -> Any:
    """Arguments with the copies, which are known by their originals' identities, in their place."""
    if isinstance(values, dict):
        return {name: mapped(value, copies) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(mapped(value, copies) for value in values)
    return copies.get(id(values), values)
