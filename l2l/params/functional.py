"""Perturbed copies of whole parameters, made many at a time.

A traversal per parameter costs more in calls than in memory where parameters are small, and on a GPU everywhere. The
order in which an evaluation reads parameters is nearly always that of the one before, so the copies that come next are
made together, as many as fit into the size of the largest block.

Transient weights: during an evaluation, whatever function reads a parameter is given a perturbed copy instead.

The copy lives for the function's call (or as long as a view of it does). The stored weights are not touched, so
nothing has to be brought back, whatever happens in between. Interception is by argument, not by module, so it holds
for any code: fused projections, expert tensors that are sliced, heads that use an embedding's weight.

Walking exactly: the stored weights are never perturbed, and an update is not lost in their precision.

Evaluations read transient copies (see :mod:`l2l.params.functional`). A step's moves are written once, at its end: into
float32 masters whose rounded copies the model holds, or into bfloat16 weights with stochastic rounding, which is right
on average. Tensors of one dimension (norms, biases) always have a master: rounding would eat their updates whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from l2l.noise import Key, NoiseTerm, TensorSlice, add_noise
from l2l.noise.reference import add_noise as eager_traverse
from l2l.params.blocks import Blocks
from l2l.params.direction import Direction, Move
from l2l.params.engine import (
    Moments,
    Perturbation,
    PerturbEngine,
    apply_moves,
    copy_blocks,
    copy_rows,
    defer_interrupt,
    measure,
    parts_of,
    row_piece,
    rows_part,
)

Fill = Callable[[Sequence[TensorSlice], Sequence[int]], None]
"""Writes perturbed copies of the pieces, which belong to the blocks given, into where the pieces say."""


@final
class CopyCache:
    """Copies that wait to be taken. Memory: two of the largest block at most, beside copies that views hold on to."""

    def __init__(self, pieces: Mapping[int, TensorSlice], fill: Fill) -> None:
        self._pieces = pieces
        self._fill = fill
        self._budget = max((piece.flat.numel() for piece in pieces.values()), default=0)
        self._order: list[int] = []
        self._read: list[int] = []
        self._place = 0
        self._ready: dict[int, Tensor] = {}
        self._lent: list[Tensor] = []
        self._resting: list[Tensor] = []
        self._free: list[Tensor] = []
        self._busy = False

    def begin(self) -> None:
        """An evaluation begins: what was made for another is dropped, and the order of the last one is expected."""
        self._order, self._read, self._place = self._read or self._order, [], 0
        self._free += [*self._lent, *self._resting]
        self._ready, self._lent, self._resting = {}, [], []

    def take(self, index: int) -> Tensor:
        """The copy [count] of a block."""
        self._read.append(index)
        if index not in self._ready:
            self._make(self._following(index))
        self._busy = True
        return self._ready.pop(index)

    def give_back(self, result: object) -> None:
        """A function's call is over: memory that its result is a view of is not used again."""
        values = result if isinstance(result, tuple | list) else [result]
        held = {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}
        self._free += [t for t in self._resting if t.untyped_storage().data_ptr() not in held]
        self._lent = [t for t in self._lent if t.untyped_storage().data_ptr() not in held]
        self._resting, self._busy = [], False

    def clear(self) -> None:
        """Let go of all memory."""
        self._ready, self._lent, self._resting, self._free, self._busy = {}, [], [], [], False

    @property
    def held(self) -> int:
        """Elements of all memory that is kept for copies."""
        return sum(tensor.numel() for tensor in (*self._lent, *self._resting, *self._free))

    def _following(self, index: int) -> list[int]:
        """The block, and those that were read after it the last time, while they fit."""
        if index not in self._order[self._place :]:
            return [index]
        start = self._order.index(index, self._place)
        chosen, total = [], 0
        for i in self._order[start:]:
            total += self._pieces[i].flat.numel()
            if i in chosen or (chosen and total > self._budget):
                break
            chosen.append(i)
        self._place = start + len(chosen)
        return chosen

    def _make(self, chosen: Sequence[int]) -> None:
        if self._busy:
            self._resting += self._lent  # until the present call is over
        else:
            self._free += self._lent
        self._ready, self._lent = {}, []
        sizes: dict[Any, int] = {}
        for i in chosen:
            flat = self._pieces[i].flat
            sizes[flat.dtype, flat.device] = sizes.get((flat.dtype, flat.device), 0) + flat.numel()
        rest = {kind: self._memory(size, *kind) for kind, size in sizes.items()}
        for i in chosen:
            flat = self._pieces[i].flat
            kind = flat.dtype, flat.device
            self._ready[i], rest[kind] = rest[kind][: flat.numel()], rest[kind][flat.numel() :]
        self._fill([replace(self._pieces[i], into=self._ready[i]) for i in chosen], chosen)

    def _memory(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The smallest memory that is free and large enough; smaller ones are let go before a larger one is taken."""
        alike = [t for t in self._free if t.dtype == dtype and t.device == device]
        enough = [t for t in alike if t.numel() >= size]
        gone = [min(enough, key=Tensor.numel)] if enough else alike
        self._free = [t for t in self._free if all(t is not other for other in gone)]
        self._lent.append(gone[0] if enough else torch.empty(size, dtype=dtype, device=device))
        return self._lent[-1]


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
            raise RuntimeError("gradients can only be taken where theta is at home: call theta.restore() before")
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


HALF = (torch.bfloat16, torch.float16)
ROUNDING, SHRINKING = -1, -2
"""Draws of the rounding noise: no direction's draw is negative."""


@final
class FunctionalEngine(PerturbEngine):
    """Extra memory: two of the largest block while evaluating; with ``master``, four bytes per coordinate of a block.

    Along a basis [n, r], r numbers for each row of the blocks that are copied or moved together, and a few MiB.

    Args:
        update: ``master`` or ``stochastic``, for half-precision blocks of two dimensions or more.
        sparse: blocks of which only the rows looked up move.

    Raises:
        ValueError: stochastic rounding is asked for a float16 matrix.
    """

    def __init__(self, blocks: Blocks, update: Literal["master", "stochastic"], sparse: Sequence[int] = ()) -> None:
        self._blocks = blocks
        half = [i for i, block in enumerate(blocks) if block.tensor.dtype in HALF]
        narrow = [i for i in half if blocks[i].tensor.ndim < 2]
        refused = [blocks[i].name for i in half if i not in narrow and blocks[i].tensor.dtype == torch.float16]
        if update == "stochastic" and refused:
            raise ValueError(
                f"update='stochastic' rounds to bfloat16, but block {refused[0]!r} is float16: use update='master'"
            )
        with_master = half if update == "master" else narrow
        self._masters = {i: blocks[i].flat.float() for i in with_master}
        self._stochastic = [i for i in half if i not in self._masters]
        pieces = {i: TensorSlice(self._masters[i] if i in narrow else b.flat, b.name) for i, b in enumerate(blocks)}
        self._substitution = Substitution(blocks, pieces, frozenset(sparse))
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._last_key = Key(0)
        self._seen = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        return [(block.tensor._version, block.tensor.data_ptr()) for block in self._blocks]

    def begin(self) -> None:
        now = self._versions()
        for i, (before, after) in enumerate(zip(self._seen, now, strict=True)):
            if before != after and i in self._masters:
                self._masters[i].copy_(self._blocks[i].flat)
            if before[1] != after[1] and self._blocks[i].tensor.dtype == self._substitution.pieces[i].flat.dtype:
                self._substitution.pieces[i] = TensorSlice(self._blocks[i].flat, self._blocks[i].name)
        self._seen = now

    def _piece(self, index: int) -> TensorSlice:
        block = self._blocks[index]
        return TensorSlice(block.flat, block.name, 0, None, self._masters.get(index))

    def stand(self, look: Perturbation | None, moves: Sequence[Move]) -> None:
        self.commit(moves, True)
        self._substitution.stand(look)

    def commit(self, moves: Sequence[Move], undoable: bool) -> None:
        self._substitution.stand(None)
        if moves:
            self._last_key = moves[0].direction.key
        moving = [move for move in moves if not move.nowhere]
        if not moving:
            return
        everything = range(len(self._blocks))
        with torch.no_grad(), defer_interrupt():
            if undoable:
                self._keep(everything)
            nearest = [i for i in everything if i not in self._stochastic]
            apply_moves(self._blocks, moving, self._piece, nearest)
            rounding = self._last_key.with_draw(ROUNDING)
            apply_moves(self._blocks, moving, self._piece, self._stochastic, rounding=rounding)
            self._seen = self._versions()

    def _keep(self, indices: Sequence[int]) -> None:
        for i in indices:
            if i not in self._kept:
                master = self._masters.get(i)
                self._kept[i] = (self._blocks[i].flat.clone(), None if master is None else master.clone())

    def revert(self, moves: Sequence[Move]) -> None:
        with torch.no_grad(), defer_interrupt():
            for i, (weights, master) in self._kept.items():
                self._blocks[i].flat.copy_(weights)
                if master is not None:
                    self._masters[i].copy_(master)
            self._kept = {}
            self._seen = self._versions()

    def finish(self) -> None:
        self._kept = {}

    def evaluating(self) -> AbstractContextManager[Any]:
        return self._substitution.active()

    def touched(self) -> dict[int, Tensor]:
        return self._substitution.take_touched()

    def moments(self, direction: Direction, moves: Sequence[Move]) -> Moments | None:
        count = len(self._blocks)
        pieces = [TensorSlice(self._masters.get(i, block.flat), block.name) for i, block in enumerate(self._blocks)]
        whole = [
            Move(move.direction, tuple(0.0 if i in move.rows else a for i, a in enumerate(move.amounts)))
            for move in moves
        ]
        parts = parts_of(self._blocks, whole, range(count))
        return measure(pieces, direction.centre or (0.0,) * count, [move.term(range(count)) for move in whole], parts)

    def value(self, index: int) -> Tensor:
        block = self._blocks[index]
        return self._masters[index].view(block.tensor.shape) if index in self._masters else block.tensor.detach()

    def rewrite(self, index: int, change: Callable[[Tensor], Any]) -> None:
        block, kept = self._blocks[index], self.value(index)
        if index in self._stochastic:
            wide = kept.float()
            change(wide)
            rounding = self._last_key.with_draw(SHRINKING)
            eager_traverse([TensorSlice(block.flat, block.name, 0, None, wide.view(-1))], rounding=rounding)
        else:
            change(kept)
            if index in self._masters:
                block.flat.copy_(self._masters[index])
        self._seen = self._versions()

    def extra_state(self) -> dict[str, Tensor]:
        return {self._blocks[i].name: master for i, master in self._masters.items()}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        names = {self._blocks[i].name for i in self._masters}
        if names != set(state):
            raise ValueError(
                f"this state has {len(state)} float32 master weights where {len(names)} are needed: it was saved with "
                "another choice of walk or update"
            )
        with torch.no_grad():
            for i, master in self._masters.items():
                master.copy_(state[self._blocks[i].name])
                self._blocks[i].flat.copy_(master)
        self._seen = self._versions()


def check_perturb_mode(blocks: Blocks, perturb: str, update: str) -> bool:
    """Whether a block is of half precision.

    Raises:
        ValueError: in-place walking is asked for such a block, or a value is none that there is.
    """
    half = next((block for block in blocks if block.tensor.dtype in HALF), None)
    if perturb == "in_place" and half is not None:
        raise ValueError(
            f"perturb='in_place', but block {half.name!r} is {half.tensor.dtype}: walking half-precision weights in "
            "place makes them drift; use perturb='functional' or load the model with dtype float32"
        )
    if perturb not in ("auto", "in_place", "functional"):
        raise ValueError(f"perturb={perturb!r} must be 'auto', 'in_place' or 'functional'")
    if update not in ("master", "stochastic"):
        raise ValueError(f"update={update!r} must be 'master' or 'stochastic'")
    return half is not None
