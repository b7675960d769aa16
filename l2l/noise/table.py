"""The arguments of a traversal as one table of numbers.

A fast backend reads it in a single call: with a call per tensor, Python and launch overhead would cost more than the
noise of a small tensor, and most tensors of a model are small.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from l2l.noise.key import Key, round_scale, round_scales
from l2l.noise.reference import CHUNK, chunks
from l2l.noise.slices import WORD, MomentRequest, NoiseTerm, TensorSlice

TASK = 8 * CHUNK
"""Elements that a CPU thread takes at a time: TASK chunks in ``native.c``."""

PART = np.dtype(
    [
        *((name, np.uint64) for name in ("source", "target", "copy")),
        *((name, np.int64) for name in ("count", "first_task", "first_chunk")),
        ("start", np.uint32),
        ("shift", np.uint32),
        ("words", np.uint32, (2, 2)),
        ("rounding", np.uint32, 2),
        ("scales", np.float32, (2, 2)),
        *((name, np.float32) for name in ("restoring", "centre")),
    ],
    align=True,
)
"""A piece, or the part of it between two multiples of 2**32: the struct ``piece`` of ``native.c``.

``source`` is read and ``target`` written, in one type; ``copy`` receives bfloat16; 0 where there is none. ``shift`` is that
of the first stream's hash."""

PLACES = {name: place for name, (_, place, *_) in (PART.fields or {}).items()}
"""Byte at which each field of a part lies."""


@dataclass(frozen=True)
class Shape:
    """What is constant within a compiled loop or kernel."""

    half: bool
    """Whether ``source`` and ``target`` are bfloat16, not float32."""
    first: int
    """How often the first stream is added: 0, 1 or 2."""
    second: int
    """How often the second stream is added: 0 or 1."""
    rademacher: bool
    stochastic: bool
    """Whether what is written as bfloat16 is rounded stochastically."""
    store: bool
    copied: bool
    """Whether ``copy`` is written."""
    packed: bool
    """Whether the noise is the sum of a plan's ``amounts``, and no stream."""


@dataclass(frozen=True, eq=False)
class Plan:
    """One traversal, for pieces of one device and dtype."""

    table: np.ndarray
    """[parts] of PART, at least one."""
    ends: np.ndarray
    """[pieces] number of chunks up to the end of each piece."""
    shape: Shape
    gather: bool
    device: torch.device
    shifts: np.ndarray
    """uint32 [terms] of a packed plan: which bit of the hash, of the first stream's words, is each term's sign."""
    amounts: np.ndarray
    """float32 [parts, terms]: what is added of each term, or taken away where its sign is -1."""
    keys: np.ndarray | None = None
    """uint32 [parts, streams, 2] words of the streams of :func:`plan_many`, where ``shifts`` are the numbers of adds."""

    @property
    def tasks(self) -> int:
        """Number of tasks of all parts."""
        return int(self.table["first_task"][-1] + -(-self.table["count"][-1] // TASK))

    @property
    def chunks(self) -> int:
        """Number of chunks of all parts."""
        return int(self.ends[-1])


def plan(
    pieces: Sequence[TensorSlice], terms: Sequence[NoiseTerm], gather: MomentRequest | None, rounding: Key | None, store: bool
) -> Plan:
    """The table of a traversal of at least one piece; see :class:`Plan`.

    Raises:
        ValueError: a scale is not finite.
    """
    dtype, mastered = pieces[0].flat.dtype, pieces[0].master is not None
    adds = sum(len(term.scales[0]) for term in terms)
    packed = adds > 1 and terms[0].distribution == "packed_rademacher"  # a single one is a stream
    scales = [
        [[round_scale(scale, dtype) for scale in own] for _, own in zip(pieces, term.scales, strict=True)] for term in terms
    ]
    parts = [(i, *part) for i, piece in enumerate(pieces) for part in chunks(piece.offset, piece.flat.numel(), WORD)]
    owners, at, counts = np.array(parts, dtype=np.int64).reshape(-1, 3).T
    table = np.zeros(len(owners), PART)
    table["count"] = counts
    for name, size in (("first_task", TASK), ("first_chunk", CHUNK)):
        table[name][1:] = np.cumsum(-(-counts // size))[:-1]
    offsets = np.array([piece.offset % WORD for piece in pieces], dtype=np.int64)
    table["start"] = (offsets[owners] + at) % WORD
    source = [piece.flat if piece.master is None else piece.master for piece in pieces]
    written = [piece.flat if piece.into is None else piece.into for piece in pieces]
    table["source"] = _addresses(source, owners, at)
    if store and mastered:
        table["target"] = table["source"]
        table["copy"] = _addresses(written, owners, at)
    elif store:
        table["target"] = _addresses(written, owners, at)
    places = [(pieces[k].name, (pieces[k].offset + start) // WORD) for k, start in zip(owners, at.tolist(), strict=True)]
    hashes = [term.key.hashed_by(term.distribution) for term in terms]
    for t, (key, _) in enumerate(hashes[:1] if packed else hashes):
        table["words"][:, t] = _words(key, places)
    table["shift"] = hashes[0][1] if hashes else 0
    for t, own in enumerate([] if packed else scales):
        table["scales"][:, t, : len(own[0])] = np.array(own, dtype=np.float32)[owners]
    shifts = [shift for (_, shift), own in zip(hashes, scales, strict=True) for _ in own[0]] if packed else []
    amounts = [[scale for own in scales for scale in own[i]] if packed else [] for i in range(len(pieces))]
    if rounding is not None:
        table["rounding"] = _words(rounding, places)
    if gather is not None:
        restoring = [round_scale(scale, torch.float32) for scale in gather.restoring]
        table["restoring"] = np.array(restoring, dtype=np.float32)[owners]
        table["centre"] = np.array(gather.centre, dtype=np.float32)[owners]
    half = dtype == torch.bfloat16
    ends = np.cumsum(np.bincount(owners, -(-counts // CHUNK), len(pieces))).astype(np.int64)
    first, second = (len(scales[t][0]) if len(scales) > t and not packed else 0 for t in (0, 1))
    rademacher = any(term.distribution != "gaussian" for term in terms)
    stochastic = half and rounding is not None
    shape = Shape(half and not mastered, first, second, rademacher, stochastic, store, store and mastered, packed)
    drawn = np.array(shifts, dtype=np.uint32), np.array(amounts, dtype=np.float32)[owners]
    return Plan(table, ends, shape, gather is not None, pieces[0].flat.device, *drawn)


def plan_many(pieces: Sequence[TensorSlice], terms: Sequence[NoiseTerm]) -> Plan:
    """The plan of many terms of one distribution, each with one scale: neighbours of one key share a stream.

    Raises:
        ValueError: a scale is not finite.
    """
    bare = plan(pieces, [], None, None, True)
    parts = [(i, *part) for i, piece in enumerate(pieces) for part in chunks(piece.offset, piece.flat.numel(), WORD)]
    places = [(pieces[i].name, (pieces[i].offset + at) // WORD) for i, at, _ in parts]
    runs = [(key, len(list(run))) for key, run in groupby(term.key for term in terms)]
    keys = np.ascontiguousarray(np.stack([_words(key, places) for key, _ in runs], 1))
    scales = round_scales(np.array([term.scales for term in terms], dtype=np.float64)[:, :, 0].T)
    amounts = np.ascontiguousarray(scales.astype(np.float32)[[i for i, *_ in parts]])
    shape = replace(bare.shape, rademacher=terms[0].distribution != "gaussian")
    return replace(
        bare, shape=shape, shifts=np.array([count for _, count in runs], dtype=np.uint32), amounts=amounts, keys=keys
    )


def _addresses(tensors: Sequence[torch.Tensor], owners: np.ndarray, at: np.ndarray) -> np.ndarray:
    begin = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)
    return begin[owners] + (at * tensors[0].element_size()).astype(np.uint64)


def _words(key: Key, places: Sequence[tuple[str, int]]) -> np.ndarray:
    return np.array([key.words(*place) for place in places], dtype=np.uint32).reshape(-1, 2)
