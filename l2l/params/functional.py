"""The functional engine: stored weights are never perturbed; evaluations read perturbed copies, made as they are needed.

During an evaluation, any function that reads a parameter is given a copy instead. The copy lives for the function's call,
or as long as a view of it does. Interception is by argument, not by module, so it holds for any code: fused projections,
expert tensors that are sliced, heads that use an embedding's weight. Nothing has to be brought back afterwards.

A step's moves are written once, at its end: into float32 masters whose rounded copies the model holds, or into bfloat16
weights with stochastic rounding, which is right on average. Tensors of one dimension (norms, biases) always have a
master: their updates are far below the spacing of bfloat16 around 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, final

import torch
from torch.overrides import TorchFunctionMode

from l2l.interrupts import complete, defer_interrupt
from l2l.models.offload import stream_of
from l2l.noise import Key, NoiseTerm, TensorSlice, add_noise
from l2l.noise.reference import add_noise as reference_add_noise
from l2l.params import engine
from l2l.params.blocks import Block, Blocks
from l2l.params.direction import Direction, Move
from l2l.params.shards import local_part


@final
class CopyCache:
    """Perturbed copies, made several at a time in the order in which the last evaluation read the parameters.

    A traversal per parameter would cost more in calls than in memory traffic: most parameters are small, and on a GPU
    each call is a launch. Memory: two of the largest block at most, beside copies that views hold on to.

    Args:
        fill: writes perturbed copies of the pieces, which belong to the blocks listed, to ``into`` of each piece.
    """

    def __init__(self, pieces: Mapping[int, TensorSlice], fill: Callable[[Sequence[TensorSlice], Sequence[int]], None]) -> None:
        self._pieces = pieces
        self._fill = fill
        self._budget = max((piece.flat.numel() for piece in pieces.values()), default=0)
        self._order: list[int] = []
        self._read: list[int] = []
        self._place = 0
        self._ready: dict[int, torch.Tensor] = {}
        self._lent: list[torch.Tensor] = []
        self._resting: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []
        self._busy = False
        self.absent: set[int] = set()
        """Blocks that are not copied before they are read: they are not where they will be computed with."""

    def begin(self) -> None:
        """An evaluation begins: copies made for another are dropped, and the order of the last one is expected."""
        self._order, self._read, self._place = self._read or self._order, [], 0
        self._free += [*self._lent, *self._resting]
        self._ready, self._lent, self._resting = {}, [], []

    def take(self, index: int) -> torch.Tensor:
        """The copy [count] of a block."""
        self._read.append(index)
        if index not in self._ready:
            self._make(index)
        self._busy = True
        return self._ready.pop(index)

    def give_back(self, result: object) -> None:
        """A function's call is over: memory that its result is a view of is not used again."""
        values = result if isinstance(result, tuple | list) else [result]
        held = {value.untyped_storage().data_ptr() for value in values if isinstance(value, torch.Tensor)}
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

    def _make(self, index: int) -> None:
        """Copies of the block, and of those that were read after it the last time, while they fit."""
        chosen, total = [index], self._pieces[index].flat.numel()
        if index in self._order[self._place :]:
            start = self._order.index(index, self._place)
            for i in self._order[start + 1 :]:
                total += self._pieces[i].flat.numel()
                if i in chosen or i in self.absent or total > self._budget:
                    break
                chosen.append(i)
            self._place = start + len(chosen)
        if self._busy:
            self._resting += self._lent  # until the present call is over
        else:
            self._free += self._lent
        self._ready, self._lent = {}, []
        sizes: dict[Any, int] = {}
        for i in chosen:
            flat = self._pieces[i].flat
            sizes[flat.dtype, flat.device] = sizes.get((flat.dtype, flat.device), 0) + flat.numel()
        rest: dict[Any, torch.Tensor] = {}
        for (dtype, device), size in sizes.items():  # smaller memory is let go before a larger one is taken
            alike = [t for t in self._free if t.dtype == dtype and t.device == device]
            enough = [t for t in alike if t.numel() >= size]
            gone = [min(enough, key=torch.Tensor.numel)] if enough else alike
            self._free = [t for t in self._free if all(t is not other for other in gone)]
            rest[dtype, device] = gone[0] if enough else torch.empty(size, dtype=dtype, device=device)
        self._lent += rest.values()
        for i in chosen:
            flat = self._pieces[i].flat
            kind = flat.dtype, flat.device
            self._ready[i], rest[kind] = rest[kind][: flat.numel()], rest[kind][flat.numel() :]
        self._fill([replace(self._pieces[i], into=self._ready[i]) for i in chosen], chosen)


_ATTRIBUTES = (
    "shape dtype device ndim layout is_cuda is_cpu requires_grad grad grad_fn is_leaf is_sparse is_quantized is_meta "
    "is_nested itemsize nbytes names _version output_nr"
)
_METHODS = (
    "size dim numel nelement stride is_contiguous is_floating_point is_complex __hash__ element_size storage_offset "
    "get_device data_ptr type __len__ ndimension requires_grad_ untyped_storage is_set_to is_same_size is_pinned is_shared"
)
PASSIVE = {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split() if hasattr(torch.Tensor, name)} | {
    getattr(torch.Tensor, name) for name in _METHODS.split()
}
"""Functions that ask about a tensor and do not read its values."""


@final
class Substitution:
    """Which parameters are replaced, by what, and which rows of sparse ones were read."""

    def __init__(self, blocks: Blocks, pieces: Mapping[int, TensorSlice], sparse: frozenset[int] = frozenset()) -> None:
        self._blocks = blocks
        self.pieces = dict(pieces)
        self.sparse = sparse
        self.index = {id(blocks[i].tensor): i for i in pieces}
        self._move: Move | None = None
        self._scales: list[float] = []
        self._touched: dict[int, list[torch.Tensor]] = {}
        self.copies = CopyCache(self.pieces, self._fill)

    def perturb(self, at: engine.Perturbation | None) -> None:
        """Give copies perturbed so from now on; None: the parameters themselves."""
        self._move = None if at is None else at.move(len(self._blocks))
        self._scales = [] if self._move is None else self._move.direction.scales(self._move.amounts)

    def active(self) -> AbstractContextManager[Any]:
        """The context in which parameters are replaced."""
        if self._move is None or not self.index:
            return nullcontext()
        self.copies.begin()
        return _Mode(self)

    def take_touched(self) -> dict[int, torch.Tensor]:
        """For each sparse block, rows that were looked up since the last call, sorted, each once."""
        if not self.sparse:
            return {}
        nothing = torch.zeros(0, dtype=torch.long)
        found = {i: torch.unique(torch.cat(self._touched.get(i, [nothing]))) for i in self.sparse}
        self._touched = {}
        return found

    def weight(self, index: int, reader: str) -> torch.Tensor:
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
        return self.copies.take(index).view(block.tensor.shape)

    def rows(self, index: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Perturbed copies [n, width] of the rows that ``ids`` names, and where in them each id is found."""
        distinct, where = torch.unique(ids, return_inverse=True)
        width = self._blocks[index].numel // self._blocks[index].tensor.shape[0]
        whole, move, rows = self.pieces[index], self._move, distinct.tolist()
        assert move is not None, "only perturbed weights are replaced"
        out = torch.empty(len(rows), width, dtype=whole.flat.dtype, device=whole.flat.device)
        with torch.no_grad():
            part = None if move.direction.only_noise else engine.rows_part(self._blocks, index, move, distinct)
            if part is None:
                # Neighbouring rows are one piece: positions, for example, are all read in order.
                starts = [k for k, row in enumerate(rows) if k == 0 or row != rows[k - 1] + 1]
                runs = zip(starts, [*starts[1:], len(rows)], strict=True)
                pieces = [engine.rows_piece(whole, rows[k], end - k, width, out[k:end].view(-1)) for k, end in runs]
                add_noise(pieces, [self._term([index] * len(pieces))])
            else:
                pieces = [engine.rows_piece(whole, row, 1, width, out[k]) for k, row in enumerate(rows)]
                terms = [self._term([index])] if move.dense(index) else []
                engine.add_part(whole, pieces, part, terms, into=out.view(-1))
        if index in self.sparse:
            self._touched.setdefault(index, []).append(distinct)
        return out, where

    def _fill(self, pieces: Sequence[TensorSlice], indices: Sequence[int]) -> None:
        assert self._move is not None, "only perturbed weights are replaced"
        term = self._term(indices)
        if self._move.direction.only_noise:
            add_noise(pieces, [term])
            return
        with torch.no_grad():
            parts = engine.parts_of(self._blocks, [self._move], indices)
        with torch.inference_mode():  # memory from an evaluation in inference mode is written again in another
            engine.copy_blocks(pieces, term, {k: parts[i] for k, i in enumerate(indices) if i in parts})

    def _term(self, indices: Sequence[int]) -> NoiseTerm:
        assert self._move is not None, "only perturbed weights are replaced"
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
        own, kwargs = self._own, kwargs or {}
        values: Sequence[Any] = (*args, *kwargs.values()) if kwargs else args
        if any(type(value) in (tuple, list) for value in values):
            values = list(flat(values))
        found = [value for value in values if id(value) in own.index]
        if not found or func in PASSIVE:
            return func(*args, **kwargs)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients can only be taken of unperturbed weights: leave backward() and enable_grad() out of the closure "
                "(in Lightning: automatic_optimization = False), or call theta.restore() before"
            )
        if func is torch.nn.functional.embedding and len(args) > 1 and not renormalises(args, kwargs):
            looked_up = own.index.get(id(args[1]))
            if looked_up is not None:
                rows, where = own.rows(looked_up, args[0])
                return torch.nn.functional.embedding(where, rows)
        try:
            name = getattr(func, "__name__", str(func))
            copies = {id(value): own.weight(own.index[id(value)], name) for value in found}
            result = _call(func, copies, {id(v): v.dtype for v in found}, args, kwargs)
        except BaseException:
            own.copies.clear()
            raise
        own.copies.give_back(result)
        return result


def renormalises(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an embedding lookup also rescales the rows it reads."""
    return kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None)


_CONVERSIONS = {
    torch.Tensor.to,
    torch.Tensor.float,
    torch.Tensor.double,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.type_as,
}


def _call(
    func: Callable[..., Any], copies: dict[int, torch.Tensor], dtypes: dict[int, torch.dtype], args: Any, kwargs: Any
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
    widened = {id(v): v.float() for v in flat((*args, *kwargs.values())) if isinstance(v, torch.Tensor) and v.dtype == half}
    result = func(*mapped(args, widened | copies), **mapped(kwargs, widened | copies))
    return result.to(half) if isinstance(result, torch.Tensor) and result.dtype == torch.float32 else result


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, those in lists and tuples one by one."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value


def mapped(values: Any, copies: Mapping[int, torch.Tensor]) -> Any:
    """Arguments with the copies, which are known by their originals' identities, in their place."""
    if isinstance(values, dict):
        return {name: mapped(value, copies) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(mapped(value, copies) for value in values)
    return copies.get(id(values), values)


class PerturbEngine(ABC):
    """Makes evaluations see perturbed weights, and brings moves into the stored weights.

    Args:
        pieces: the memory of the blocks that are replaced while an evaluation reads them.
        sparse: blocks of which only the rows looked up move.
    """

    def __init__(self, blocks: Blocks, pieces: Mapping[int, TensorSlice], sparse: Sequence[int]) -> None:
        self._blocks = blocks
        self._substitution = Substitution(blocks, pieces, frozenset(sparse))

    @abstractmethod
    def perturb(self, at: engine.Perturbation | None, moves: Sequence[Move]) -> None:
        """Make the moves; from now on evaluations see the weights perturbed as told, or unperturbed."""

    @property
    def lazy(self) -> bool:
        """Whether, inside fused steps, memory may hold something else than theta between steps."""
        return True

    def commit(self, moves: Sequence[Move], defer: bool = False) -> None:
        """As ``perturb(None, moves)``, but the moves will not be reverted.

        Args:
            defer: they may be written later: where a block is next read, or in :meth:`settle`.
        """
        self.perturb(None, moves)

    def wait(self) -> None:
        """From now on, writing the weights may wait for :meth:`settle`: no evaluation reads them."""
        return None

    def settle(self) -> None:
        """Write what waits: something else than an evaluation is about to read the weights."""
        return None

    @abstractmethod
    def revert(self, moves: Sequence[Move]) -> None:
        """Take back moves that :meth:`perturb` made in this step, the last first."""

    def _versions(self) -> list[tuple[int, int]]:
        held = [local_part(block.tensor) if block.sharded else block.tensor for block in self._blocks]
        return [(tensor._version, tensor.data_ptr()) for tensor in held]

    def begin(self) -> None:
        """A step begins: weights that were written from outside are taken as they are, and from where they are."""
        for i, piece in self._substitution.pieces.items():
            block = self._blocks[i]
            if piece.flat.dtype == block.tensor.dtype and piece.flat.data_ptr() != block.tensor.data_ptr():
                self._substitution.pieces[i] = replace(piece, flat=block.flat)

    def written(self) -> str | None:
        """The first block whose memory was perturbed and has been written from outside since; None: there is none."""
        return None

    def finish(self) -> None:
        """A step has ended well: nothing of it will be reverted."""
        return None

    def evaluating(self) -> AbstractContextManager[Any]:
        """Inside it, whatever reads a parameter reads its perturbed value."""
        return self._substitution.active()

    def touched(self) -> dict[int, torch.Tensor]:
        """For each sparse block, the rows that evaluations have looked up since the last call, sorted, each once."""
        return self._substitution.take_touched()

    @abstractmethod
    def moments(self, direction: Direction, moves: Sequence[Move]) -> engine.Moments | None:
        """Of the unperturbed blocks once the moves are made; None where that can only be measured after them."""

    def value(self, index: int) -> torch.Tensor:
        """The weights of a block in the precision they are kept in, sharing memory with them."""
        return self._blocks[index].tensor.detach()

    def rewrite(self, index: int, change: Callable[[torch.Tensor], Any]) -> None:
        """Let ``change`` write the weights of a block in place, in the precision they are kept in."""
        change(self.value(index))

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Tensors by block name that resuming needs beside the model's own weights."""
        return {}

    @abstractmethod
    def check_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError unless :meth:`load_extra_state` takes the state."""

    def load_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from :meth:`extra_state`."""
        self.check_extra_state(state)


HALF = (torch.bfloat16, torch.float16)
ROUNDING, SHRINKING = -1, -2
"""Draws of the rounding noise: no direction's draw is negative."""


@final
class FunctionalEngine(PerturbEngine):
    """Extra memory: two of the largest block while evaluating; with ``master``, four bytes per coordinate of a block.

    While moving along a basis [n, r], r numbers for each row of the blocks that are copied or moved together, and a few MiB.

    Of an offloaded model (:mod:`l2l.models.offload`), blocks and masters of layers lie in the host's memory. Deferred moves of
    a layer are made on the device when it arrives there; whatever else is done with its weights is done in the host's memory.
    The noise has the same bits on both.

    Args:
        update: ``master`` or ``stochastic``, for half-precision blocks of two dimensions or more.

    Raises:
        ValueError: stochastic rounding is asked for a float16 matrix.
    """

    def __init__(self, blocks: Blocks, update: Literal["master", "stochastic"], sparse: Sequence[int] = ()) -> None:
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
        self._narrow = frozenset(narrow)
        super().__init__(blocks, {i: self._source(i, block) for i, block in enumerate(blocks)}, sparse)
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._last_key = Key(0)
        self._seen = self._versions()
        self._stream = stream_of(blocks.model)
        self._here: dict[int, torch.Tensor] = {}
        """Masters on the device, of the layer that is there."""
        self._layers: list[list[int]] = []
        """Blocks of each offloaded layer."""
        self._owed: list[list[tuple[Sequence[Move], Key]]] = []
        """For each of them the moves that wait for it, with the keys of their rounding."""
        if self._stream is not None:
            places = [{id(p) for p in layer.parameters()} for layer in self._stream.layers]
            self._layers = [[i for i, block in enumerate(blocks) if id(block.tensor) in own] for own in places]
            self._owed = [[] for _ in self._layers]
            self._substitution.copies.absent = {i for own in self._layers for i in own}
            self._stream.watch(self)

    def _source(self, index: int, block: Block) -> TensorSlice:
        """What perturbed copies of a block are made from."""
        return TensorSlice(self._masters[index] if index in self._narrow else block.flat, block.name)

    @property
    def lazy(self) -> bool:
        return self._stream is not None

    def begin(self) -> None:
        super().begin()
        now = self._versions()
        for i, master in self._masters.items():
            weights = self._blocks[i].flat
            if self._seen[i] != now[i] and not torch.equal(master.to(weights.dtype), weights):
                master.copy_(weights)  # else the values are the master's own: a checkpoint was loaded beside its state
        self._seen = now

    def _piece(self, index: int) -> TensorSlice:
        block = self._blocks[index]
        return TensorSlice(block.flat, block.name, 0, None, self._here.get(index, self._masters.get(index)))

    def perturb(self, at: engine.Perturbation | None, moves: Sequence[Move]) -> None:
        self._write(moves, revertible=True)
        self._substitution.perturb(at)

    def commit(self, moves: Sequence[Move], defer: bool = False) -> None:
        self._write(moves, revertible=False, defer=defer)
        self._substitution.perturb(None)

    def _write(self, moves: Sequence[Move], revertible: bool, defer: bool = False) -> None:
        if moves:
            self._last_key = moves[0].direction.key
        moving = [move for move in moves if any(move.amounts)]
        if not moving:
            return
        chosen: Sequence[int] = range(len(self._blocks))
        if defer:
            for owed in self._owed:
                owed.append((moving, self._last_key))
            chosen = [i for i in chosen if i not in self._substitution.copies.absent]
        else:
            self.settle()
        with torch.no_grad():
            for i, block in enumerate(self._blocks if revertible else ()):
                if i not in self._kept:
                    master = self._masters.get(i)
                    self._kept[i] = (block.flat.clone(), None if master is None else master.clone())
        self._make(moving, self._last_key, chosen)
        self._seen = self._versions()

    def _make(self, moves: Sequence[Move], key: Key, chosen: Sequence[int]) -> None:
        """Write moves of the chosen blocks, where these are now; ``key`` is that of stochastic rounding."""
        nearest, others = ([i for i in chosen if (i in self._stochastic) == rest] for rest in (False, True))
        written = partial(engine.apply_moves, self._blocks, moves, self._piece)
        with torch.no_grad():
            complete([partial(written, nearest), partial(written, others, rounding=key.with_draw(ROUNDING))])

    def arrived(self, layer: int, write_back: Callable[[], None]) -> None:
        """An offloaded layer is on the device: the moves that wait for it are made there, and written back."""
        assert self._stream is not None, "the stream tells"
        indices, owed = self._layers[layer], self._owed[layer]
        needed = [i for i in indices if i in self._masters and (owed or i in self._narrow)]
        self._here = {i: self._masters[i].to(self._stream.device, copy=True) for i in needed}
        if owed:
            with defer_interrupt():
                for moves, key in owed:
                    self._make(moves, key, indices)
                write_back()
                for i, master in self._here.items():
                    self._masters[i].copy_(master)
                owed.clear()
        pieces, copies = self._substitution.pieces, self._substitution.copies
        for i in indices:
            flat = self._here[i] if i in self._narrow else self._blocks[i].flat
            pieces[i] = replace(pieces[i], flat=flat)
        copies.absent = copies.absent - set(indices)

    def left(self, layer: int) -> None:
        """Its parameters are in the host's memory again."""
        self._here = {}
        for i in self._layers[layer]:
            self._substitution.pieces[i] = self._source(i, self._blocks[i])
            self._seen[i] = (self._blocks[i].tensor._version, self._blocks[i].tensor.data_ptr())
        self._substitution.copies.absent |= set(self._layers[layer])

    def settle(self) -> None:
        if self._stream is None:
            return
        self._stream.settle()
        with defer_interrupt():
            for indices, owed in zip(self._layers, self._owed, strict=True):
                for moves, key in owed:
                    self._make(moves, key, indices)
                owed.clear()
            self._seen = self._versions()

    def revert(self, moves: Sequence[Move]) -> None:
        with torch.no_grad():
            for i, (weights, master) in self._kept.items():
                self._blocks[i].flat.copy_(weights)
                if master is not None:
                    self._masters[i].copy_(master)
            self._kept = {}
            self._seen = self._versions()

    def finish(self) -> None:
        self._kept = {}

    def moments(self, direction: Direction, moves: Sequence[Move]) -> engine.Moments | None:
        self.settle()
        count = len(self._blocks)
        pieces = [TensorSlice(self._masters.get(i, block.flat), block.name) for i, block in enumerate(self._blocks)]
        whole = [
            Move(move.direction, tuple(0.0 if i in move.rows else a for i, a in enumerate(move.amounts))) for move in moves
        ]
        parts = engine.parts_of(self._blocks, whole, range(count))
        return engine.measure(pieces, direction.centre or (0.0,) * count, [move.term(range(count)) for move in whole], parts)

    def value(self, index: int) -> torch.Tensor:
        kept = super().value(index)
        return self._masters[index].view(kept.shape) if index in self._masters else kept

    def rewrite(self, index: int, change: Callable[[torch.Tensor], Any]) -> None:
        block, kept = self._blocks[index], self.value(index)
        if index in self._stochastic:
            wide = kept.float()
            change(wide)
            rounding = self._last_key.with_draw(SHRINKING)
            reference_add_noise([TensorSlice(block.flat, block.name, 0, None, wide.view(-1))], rounding=rounding)
        else:
            change(kept)
            if index in self._masters:
                block.flat.copy_(self._masters[index])
        self._seen = self._versions()

    def extra_state(self) -> dict[str, torch.Tensor]:
        self.begin()
        return {self._blocks[i].name: master for i, master in self._masters.items()}

    def check_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        sizes = {self._blocks[i].name: master.numel() for i, master in self._masters.items()}
        if sizes != {name: master.numel() for name, master in state.items()}:
            raise ValueError(
                f"this state has {len(state)} float32 master weights where {len(sizes)} are needed: it was saved with "
                "another choice of perturb or update, or of another model"
            )

    def load_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load_extra_state(state)
        with torch.no_grad():
            for i, master in self._masters.items():
                master.copy_(state[self._blocks[i].name])
                self._blocks[i].flat.copy_(master)
        self._seen = self._versions()
