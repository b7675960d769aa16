"""Noise in plain torch: the specification that every other backend equals bit for bit.

A keyed 32-bit hash of the element index (three multiplications, in the manner of "triple32") gives four bytes.
``gaussian`` is their sum less 510: mean 0, standard deviation 147.8005, kurtosis 2.7, an exact integer.
``rademacher`` is the sign of the top bit: 1 where it is 0. ``packed_rademacher`` draws by bits: draw d is the sign of
bit 31 - d % 32 of the hash that has draw d // 32 in its key, so that 32 directions cost one hash.

Only integer arithmetic, one exact product and one rounding per add are involved. Neighbouring terms that are bits of one
hash are first added to each other, in turn, and their sum to the element: from a direction to the next by one exact
difference and one rounding, and along N directions by one more. Half precision is computed in float32 and rounded once,
to nearest or stochastically.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from l2l.interrupts import complete
from l2l.noise.key import Distribution, Key, round_scale, standard_deviation
from l2l.noise.slices import WORD, MomentRequest, NoiseTerm, Sums, TensorSlice, computed_in, runs_of_terms

CHUNK = 32768
"""Elements per pass: torch's grain size, so that small operations stay on one thread and in cache. Also the unit of
sums: each chunk of a piece is summed by itself, and the chunks in index order, whatever the number of threads."""

RUN, LANES = 512, 8
"""Within a chunk, runs of 512 elements are added up lane by lane (element i belongs to lane i % 8) in float32, the
runs' lanes in float64."""


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word."""
    word %= WORD
    return word - WORD if word >= WORD // 2 else word


def _xor_shift_(x: torch.Tensor, shift: int) -> torch.Tensor:
    # int32 shifts are arithmetic; the mask makes them logical.
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _hash(start: int, count: int, words: tuple[int, int], device: torch.device) -> torch.Tensor:
    x = torch.arange(count, dtype=torch.int32, device=device)
    return _mixed_(x.add_(_signed(start + words[0])), _signed(words[1]))


def _mixed_(x: torch.Tensor, second: int | torch.Tensor) -> torch.Tensor:
    """The hash of element indices to which the first word is added; ``second``: the second word."""
    _xor_shift_(x, 17).mul_(_signed(0xED5AD4BB)).bitwise_xor_(second)
    _xor_shift_(x, 11).mul_(_signed(0xAC4C1B51))
    _xor_shift_(x, 15).mul_(_signed(0x31848BAB))
    return _xor_shift_(x, 14)


def _integers_of(x: torch.Tensor, distribution: Distribution, shift: int = 0) -> torch.Tensor:
    if distribution != "gaussian":
        return ((x << shift) >> 31).mul_(2).add_(1)
    pairs = x.bitwise_and(0x00FF00FF).add_((x >> 8).bitwise_and_(0x00FF00FF))
    return pairs.bitwise_and(0xFFFF).add_(pairs >> 16).sub_(510)


def chunks(offset: int, count: int, longest: int = CHUNK) -> Iterator[tuple[int, int]]:
    """(start within the tensor, length): at most ``longest``, never across a multiple of 2**32, where key words change."""
    at = 0
    while at < count:
        size = min(longest, count - at, WORD - (offset + at) % WORD)
        yield at, size
        at += size


def _hashed(name: str, key: Key, index: int, size: int, device: torch.device) -> torch.Tensor:
    return _hash(index % WORD, size, key.words(name, index // WORD), device)


def hash_bits(names: Sequence[str], key: Key, count: int, offset: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 32 bits that noise is made of, as int32 [names, count], of elements ``offset .. offset + count`` of each block: for
    noise of another distribution, such as that of sampled tokens."""
    out = torch.empty(len(names), count, dtype=torch.int32, device=device)
    for at, size in chunks(offset, count, max(count, 1)):
        index = offset + at
        words = [key.words(name, index // WORD) for name in names]
        first, second = (
            torch.tensor([_signed(start + pair[i]) for pair in words], dtype=torch.int32, device=device)[:, None]
            for i, start in enumerate((index % WORD, 0))
        )
        out[:, at : at + size] = _mixed_(torch.arange(size, dtype=torch.int32, device=device) + first, second)
    return out


def integers(
    name: str,
    key: Key,
    count: int,
    distribution: Distribution = "gaussian",
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Noise integers [count] int32 of elements ``offset .. offset + count`` of block ``name``."""
    device = torch.device(device)
    out = torch.empty(count, dtype=torch.int32, device=device)
    hash_key, shift = key.hashed_by(distribution)
    for at, size in chunks(offset, count):
        out[at : at + size] = _integers_of(_hashed(name, hash_key, offset + at, size, device), distribution, shift)
    return out


def standard_noise(
    name: str,
    key: Key,
    shape: torch.Size,
    distribution: Distribution = "gaussian",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Materialised noise of mean 0 and variance 1, of ``shape``. For small tensors: training never needs it."""
    values = integers(name, key, shape.numel(), distribution, device=device)
    return (values.to(torch.float64) / standard_deviation(distribution)).to(dtype).view(shape)


def add_noise(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm] = (),
    gather: MomentRequest | None = None,
    rounding: Key | None = None,
    store: bool = True,
) -> Sums | None:
    """One traversal: to every element the terms' scaled noise is added in turn, and the result is written.

    Neighbouring terms of ``packed_rademacher`` that are bits of one hash are summed first, and added as one.

    Args:
        gather: sums to return; they are taken of what is written.
        rounding: key of stochastic rounding to bfloat16, of pieces that have this dtype; None rounds to nearest.
        store: False writes nothing: only sums are wanted.

    Raises:
        ValueError: a scale is not finite, before anything is written.
    """
    lanes = traverse(pieces, terms, gather, rounding, store)
    return None if lanes is None else total(lanes)


def traverse(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm] = (),
    gather: MomentRequest | None = None,
    rounding: Key | None = None,
    store: bool = True,
) -> list[np.ndarray] | None:
    """:func:`add_noise`, with the sums of each piece by chunk: [chunks, 5, LANES], of which :func:`total` makes the sums."""
    scales = {
        id(term): [tuple(round_scale(s, p.flat.dtype) for s in own) for own, p in zip(term.scales, pieces, strict=True)]
        for term in terms
    }

    def added(i: int, at: int, size: int) -> np.ndarray | None:
        """Of one chunk, written last of all; its sums."""
        piece, exact, lanes = pieces[i], computed_in(pieces[i].flat.dtype), None
        span, place = slice(at, at + size), (piece.offset + at, size, piece.flat.device)
        value = (piece.flat if piece.master is None else piece.master)[span].to(exact, copy=True)
        u = torch.zeros_like(value)  # of the first term, for sums
        for packed, run in runs_of_terms(terms):
            common, summed = packed and _hashed(piece.name, packed, *place), None
            for term in run:
                x = _hashed(piece.name, term.key, *place) if common is None else common
                noise = _integers_of(x, term.distribution, term.key.hashed_by(term.distribution)[1]).to(exact)
                u = noise if term is terms[0] else u
                for scale in scales[id(term)][i]:
                    if packed is None:
                        value.add_(noise, alpha=scale)
                    else:
                        summed = noise * scale if summed is None else summed.add_(noise, alpha=scale)
            if summed is not None:
                value.add_(summed)
        stored = value
        if rounding is not None and piece.flat.dtype == torch.bfloat16:
            # Up or down with the probability that makes it right on average; what is not finite stays.
            bits = value.view(torch.int32) + _hashed(piece.name, rounding, *place).bitwise_and(0xFFFF)
            rounded = bits.bitwise_and_(-0x10000).view(torch.float32)
            stored = torch.where(torch.isfinite(value), rounded, value)
        if gather is not None:  # the sums are those of what is written
            seen = stored.to(piece.flat.dtype).to(exact) if piece.master is None else stored
            lanes = _lane_sums(seen, u, round_scale(gather.restoring[i], exact), gather.centre[i])
        if piece.master is not None and store:
            piece.master[span] = value
        if store:
            (piece.flat if piece.into is None else piece.into)[span] = stored
        return lanes

    places = [(i, *span) for i, piece in enumerate(pieces) for span in chunks(piece.offset, piece.flat.numel())]
    lanes = complete(partial(added, *place) for place in places)
    if gather is None:
        return None
    summed = [(i, own) for (i, *_), own in zip(places, lanes, strict=True) if own is not None]
    of_piece = [[own for i, own in summed if i == k] for k in range(len(pieces))]
    return [np.stack(own) if own else np.zeros((0, 5, LANES)) for own in of_piece]


def _lane_sums(value: torch.Tensor, u: torch.Tensor, restoring: float, centre: float) -> np.ndarray:
    """[5, LANES] float64: sums of d, d*d, d*u, u, u*u of a chunk, in the order that RUN and LANES prescribe."""
    d = value.add(u, alpha=restoring).sub_(centre)
    padded = -value.numel() % RUN
    stacked = torch.stack([d, d * d, d * u, u, u * u])
    rows = torch.nn.functional.pad(stacked, (0, padded)).view(5, -1, RUN // LANES, LANES).permute(2, 1, 0, 3).contiguous()
    lanes = torch.zeros_like(rows[0])
    for row in rows:
        lanes += row
    out = torch.zeros(5, LANES, dtype=torch.float64, device=value.device)
    for run in lanes.double():
        out += run
    return out.cpu().numpy()


def total(partials: Sequence[np.ndarray]) -> Sums:
    """Sums per piece from its chunks' lanes [chunks, 5, LANES], added in index order."""
    # Along the first axis numpy adds row after row; accumulate leaves it no choice.
    whole = [
        np.add.accumulate(p.reshape(len(p), -1))[-1].reshape(5, LANES) if len(p) else np.zeros((5, LANES)) for p in partials
    ]
    lanes = np.stack(whole) if whole else np.zeros((0, 5, LANES))
    columns = np.add.accumulate(lanes, axis=2)[:, :, -1]
    return Sums(*(columns[:, k].copy() for k in range(5)))
