"""Pieces laid out as a table of numbers, which the fast backends walk in one call however many tensors there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from l2l.noise.key import Key, round_scale
from l2l.noise.reference import CHUNK, LANES, total
from l2l.noise.slices import WORD, MomentRequest, NoiseTerm, Sums, TensorSlice, rounded_scales

TASK = 8 * CHUNK
"""Elements that a CPU thread takes at a time: TASK chunks in ``native.c``."""

PART = np.dtype(
    [
        ("source", np.uint64),
        ("target", np.uint64),
        ("copy", np.uint64),
        ("count", np.int64),
        ("first_task", np.int64),
        ("first_chunk", np.int64),
        ("start", np.uint32),
        ("words", np.uint32, (2, 2)),
        ("rounding", np.uint32, 2),
        ("scales", np.float32, (2, 2)),
        ("home", np.float32),
        ("centre", np.float32),
    ],
    align=True,
)
"""A piece, or the part of it between two multiples of 2**32: the struct ``piece`` of ``native.c``.

``source`` is read and ``target`` written, in one type; ``copy`` receives bfloat16; 0 where there is none."""

PLACES = {name: place for name, (_, place, *_) in (PART.fields or {}).items()}
"""Byte at which each field of a part lies."""


@dataclass(frozen=True, eq=False)
class Plan:
    """One traversal, for pieces of one device and dtype."""

    table: np.ndarray
    """[parts] of PART, at least one."""
    ends: np.ndarray
    """[pieces] number of chunks up to the end of each piece."""
    half: bool
    """Whether ``source`` and ``target`` are bfloat16, not float32."""
    first: int
    """How often the first stream is added: 0, 1 or 2."""
    second: int
    """How often the second stream is added: 0 or 1."""
    rademacher: bool
    stochastic: bool
    """Whether what is written as bfloat16 is rounded stochastically."""
    gather: bool

    @property
    def tasks(self) -> int:
        """Number of tasks of all parts."""
        return int(self.table["first_task"][-1] + -(-self.table["count"][-1] // TASK))

    @property
    def chunks(self) -> int:
        """Number of chunks of all parts."""
        return int(self.ends[-1])


def by_plan(
    run: Callable[[Plan], np.ndarray | None],
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm],
    gather: MomentRequest | None,
    rounding: Key | None,
    store: bool,
) -> Sums | None:
    """A traversal that ``run`` carries out; it returns the chunks' lane sums [chunks, 5, LANES] where any are wanted.

    Raises:
        ValueError: a scale is not finite, before anything is written.
    """
    made = plan(pieces, terms, gather, rounding, store)
    if not store and gather is None:
        return None
    if made.chunks == 0:
        return total([np.zeros((0, 5, LANES))] * len(pieces)) if gather is not None else None
    sums = run(made)
    return None if sums is None else total(np.split(sums, made.ends[:-1]))


def plan(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm],
    gather: MomentRequest | None,
    rounding: Key | None,
    store: bool,
) -> Plan:
    """The table of a traversal; see :class:`Plan`."""
    scales = [rounded_scales(term, pieces) for term in terms]
    parts = list(_parts(pieces))
    owners, at, counts = (np.array([part[k] for part in parts], dtype=np.int64) for k in range(3))
    half = bool(pieces) and pieces[0].flat.dtype == torch.bfloat16
    table = np.zeros(len(parts), PART)
    table["count"] = counts
    _fill_places(table, pieces, owners, at, store)
    for name, size in (("first_task", TASK), ("first_chunk", CHUNK)):
        table[name][1:] = np.cumsum(-(-counts // size))[:-1]
    highs = [(pieces[owner].name, (pieces[owner].offset + start) // WORD) for owner, start, _ in parts]
    for t, term in enumerate(terms):
        table["words"][:, t] = [term.key.words(*high) for high in highs] or np.zeros((0, 2))
        used = len(scales[t][0]) if scales[t] else 0
        table["scales"][:, t, :used] = np.array(scales[t], dtype=np.float32).reshape(len(pieces), used)[owners]
    if rounding is not None:
        table["rounding"] = [rounding.words(*high) for high in highs] or np.zeros((0, 2))
    if gather is not None:
        homes = [round_scale(home, torch.float32) for home in gather.home]
        table["home"] = np.array(homes, dtype=np.float32)[owners]
        table["centre"] = np.array(gather.centre, dtype=np.float32)[owners]
    return Plan(
        table,
        ends=np.cumsum(np.bincount(owners, -(-counts // CHUNK), len(pieces))).astype(np.int64),
        half=half and pieces[0].master is None,
        first=len(scales[0][0]) if scales and pieces else 0,
        second=len(scales[1][0]) if len(scales) > 1 and pieces else 0,
        rademacher=any(term.distribution == "rademacher" for term in terms),
        stochastic=half and rounding is not None,
        gather=gather is not None,
    )


def _parts(pieces: Sequence[TensorSlice]) -> Iterator[tuple[int, int, int]]:
    """(index of the piece, start within it, length), cut where a multiple of 2**32 is crossed."""
    for owner, piece in enumerate(pieces):
        at, count = 0, piece.flat.numel()
        while at < count:
            size = min(count - at, WORD - (piece.offset + at) % WORD)
            yield owner, at, size
            at += size


def _fill_places(
    table: np.ndarray, pieces: Sequence[TensorSlice], owners: np.ndarray, at: np.ndarray, store: bool
) -> None:
    """Addresses in memory, and where each part starts within the stream."""
    exact = [piece.flat if piece.master is None else piece.master for piece in pieces]
    shown = [piece.flat if piece.into is None else piece.into for piece in pieces]
    size = exact[0].element_size() if exact else 4
    source, target = ([tensor.data_ptr() for tensor in tensors] for tensors in (exact, shown))
    mastered = bool(pieces) and pieces[0].master is not None
    table["source"] = np.array(source, dtype=np.uint64)[owners] + (at * size).astype(np.uint64)
    if store and mastered:
        table["target"] = table["source"]
        table["copy"] = np.array(target, dtype=np.uint64)[owners] + (at * 2).astype(np.uint64)
    elif store:
        table["target"] = np.array(target, dtype=np.uint64)[owners] + (at * size).astype(np.uint64)
    offsets = np.array([piece.offset % WORD for piece in pieces], dtype=np.int64)
    table["start"] = (offsets[owners] + at) % WORD
