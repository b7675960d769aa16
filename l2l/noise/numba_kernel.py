"""Loops that numba compiles, once for every shape of traversal. Imported only where numba is installed.

No fast maths: LLVM then neither fuses nor reorders, and the bits are those of the reference.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from l2l.noise.reference import CHUNK, LANES, RUN
from l2l.noise.table import TASK, Shape

numba: Any = import_module("numba")
extending: Any = import_module("numba.extending")
cgutils: Any = import_module("numba.core.cgutils")
njit: Any = numba.njit(error_model="numpy")


@extending.intrinsic
def _pointer(_context: Any, _address: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.uint64), generate


@njit
def _hash(x: Any, words: Any) -> Any:
    x = np.uint32(x + words[0])
    x = np.uint32(np.uint32((x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB)) ^ words[1])
    x = np.uint32((x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB))
    return np.uint32(x ^ (x >> np.uint32(14)))


@njit
def _widen(half: Any) -> Any:
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@njit
def _narrow(value: Any, up: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    moved = np.uint32(np.uint32(bits + up) >> np.uint32(16))
    return np.uint16(0x7FC0) if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else np.uint16(moved)


@njit
def _nearest(value: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    return _narrow(value, np.uint32(np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))))


@lru_cache(maxsize=64)
def _values(shape: Shape) -> tuple[Any, Any, Any]:
    """Functions of one element: its noise, its new value, and that value as bfloat16."""
    first, second, rademacher, stochastic = shape.first, shape.second, shape.rademacher, shape.stochastic
    packed = shape.packed

    @njit
    def sign(x: Any, shift: Any) -> Any:
        return np.float32(np.int32(1) - np.int32(2) * np.int32(np.uint32(x << shift) >> np.uint32(31)))

    @njit
    def noise(at: Any, words: Any, shift: Any) -> Any:
        x = _hash(at, words)
        if rademacher:
            return sign(x, shift)
        pairs = np.uint32((x & np.uint32(0x00FF00FF)) + ((x >> np.uint32(8)) & np.uint32(0x00FF00FF)))
        return np.float32(np.int32((pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))) - np.int32(510))

    @njit
    def moved(value: Any, at: Any, words: Any, scales: Any, shift: Any, shifts: Any, amounts: Any) -> Any:
        if packed:
            x = _hash(at, words[0])
            total = amounts[0] * sign(x, shifts[0])
            for k in range(1, len(shifts)):
                total = total + amounts[k] * sign(x, shifts[k])
            value = value + total
        if first > 0:
            u = noise(at, words[0], shift)
            value = value + scales[0][0] * u
            if first > 1:
                value = value + scales[0][1] * u
        if second > 0:
            value = value + scales[1][0] * noise(at, words[1], np.uint32(0))
        return value

    @njit
    def rounded(value: Any, at: Any, rounding: Any) -> Any:
        if stochastic:
            finite = (np.float32(value).view(np.uint32) & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
            return _narrow(value, np.uint32(_hash(at, rounding) & np.uint32(0xFFFF)) if finite else np.uint32(0))
        return _nearest(value)

    return noise, moved, rounded


@lru_cache(maxsize=64)
def adding(shape: Shape, apart: bool) -> Any:
    """A traversal without sums: takes the columns of the table and the number of tasks.

    Args:
        apart: whether the target is other memory than the source. In place, one array serves, or loops would not be vector.
    """
    half, copied = shape.half, shape.copied
    dtype = np.uint16 if half else np.float32
    size = np.uint64(2 if half else 4)
    _, moved, rounded = _values(shape)

    @njit
    def part(
        source: Any, target: Any, copy: Any, count: Any, start: Any, rounding: Any, w: Any, s: Any, h: Any, bits: Any, a: Any
    ) -> None:
        to = numba.carray(_pointer(target), (count,), dtype)
        of = numba.carray(_pointer(source), (count,), dtype) if apart else to
        short = numba.carray(_pointer(copy), (count,), np.uint16)
        for i in range(count):
            at = np.uint32(start + np.uint32(i))
            if half:
                to[i] = rounded(moved(_widen(of[i]), at, w, s, h, bits, a), at, rounding)
            else:
                value = moved(of[i], at, w, s, h, bits, a)
                to[i] = value
                if copied:
                    short[i] = rounded(value, at, rounding)

    @numba.njit(parallel=True, error_model="numpy")
    def run(
        source,
        target,
        copy,
        counts,
        first_task,
        first_chunk,
        start,
        shift,
        words,
        rounding,
        scales,
        restoring,
        centre,
        tasks,
        bits,
        amounts,
    ):
        for task in numba.prange(tasks):
            p = np.searchsorted(first_task, task, side="right") - 1
            at = (task - first_task[p]) * TASK
            count = min(TASK, counts[p] - at)
            w = ((words[p, 0, 0], words[p, 0, 1]), (words[p, 1, 0], words[p, 1, 1]))
            s = ((scales[p, 0, 0], scales[p, 0, 1]), (scales[p, 1, 0], scales[p, 1, 1]))
            r = (rounding[p, 0], rounding[p, 1])
            byte, short = np.uint64(at) * size, np.uint64(at) * np.uint64(2)
            memory = source[p] + byte, target[p] + byte, copy[p] + short
            part(*memory, count, np.uint32(start[p] + at), r, w, s, shift[p], bits, amounts[p])

    return run


@njit
def _add_lanes(x: Any, y: Any, out: Any) -> None:
    """The products of one run added up lane by lane. Eight variables: an array would be stored at every step."""
    a = b = c = d = e = f = g = h = np.float32(0)
    for i in range(0, RUN, LANES):
        a += x[i] * y[i]
        b += x[i + 1] * y[i + 1]
        c += x[i + 2] * y[i + 2]
        d += x[i + 3] * y[i + 3]
        e += x[i + 4] * y[i + 4]
        f += x[i + 5] * y[i + 5]
        g += x[i + 6] * y[i + 6]
        h += x[i + 7] * y[i + 7]
    for lane, total in enumerate((a, b, c, d, e, f, g, h)):
        out[lane] += np.float64(total)


@lru_cache(maxsize=64)
def gathering(shape: Shape, apart: bool) -> Any:
    """A traversal with sums: takes the columns of the table, the number of tasks and the sums [chunks, 5, LANES]."""
    half, copied, stored, first = shape.half, shape.copied, shape.store, shape.first
    dtype = np.uint16 if half else np.float32
    size = np.uint64(2 if half else 4)
    noise, moved, _ = _values(shape)

    @njit
    def fill(
        of: Any, to: Any, short: Any, start: Any, w: Any, s: Any, h: Any, restoring: Any, centre: Any, d: Any, u: Any
    ) -> None:
        """The d and u of one run, and what is stored of it."""
        of = of if apart else to
        for i in range(len(of)):
            at = np.uint32(start + np.uint32(i))
            value = moved(_widen(of[i]) if half else of[i], at, w, s, h, u, u)
            if half and first > 0:
                value = _widen(_nearest(value))
            noisy = noise(at, w[0], h) if first > 0 else np.float32(0)
            u[i] = noisy
            d[i] = (value + restoring * noisy) - centre
            if stored:
                to[i] = _nearest(value) if half else value
            if copied:
                short[i] = _nearest(value)
        d[len(of) :] = np.float32(0)
        u[len(of) :] = np.float32(0)

    @njit
    def chunk(
        source: Any, target: Any, copy: Any, count: Any, start: Any, w: Any, s: Any, h: Any, back: Any, c: Any, out: Any
    ) -> None:
        of = numba.carray(_pointer(source), (count,), dtype)
        to = numba.carray(_pointer(target if apart else source), (count,), dtype)
        short = numba.carray(_pointer(copy), (count,), np.uint16)
        d, u = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
        ones = np.ones(RUN, np.float32)
        out[:] = 0.0
        for at in range(0, count, RUN):
            end = min(at + RUN, count)
            fill(of[at:end], to[at:end], short[at:end], np.uint32(start + at), w, s, h, back, c, d, u)
            _add_lanes(d, ones, out[0])
            _add_lanes(d, d, out[1])
            _add_lanes(d, u, out[2])
            _add_lanes(u, ones, out[3])
            _add_lanes(u, u, out[4])

    @numba.njit(parallel=True, error_model="numpy")
    def run(
        source,
        target,
        copy,
        counts,
        first_task,
        first_chunk,
        start,
        shift,
        words,
        rounding,
        scales,
        restoring,
        centre,
        tasks,
        out,
    ):
        for task in numba.prange(tasks):
            p = np.searchsorted(first_task, task, side="right") - 1
            begin = (task - first_task[p]) * TASK
            w = ((words[p, 0, 0], words[p, 0, 1]), (words[p, 1, 0], words[p, 1, 1]))
            s = ((scales[p, 0, 0], scales[p, 0, 1]), (scales[p, 1, 0], scales[p, 1, 1]))
            for at in range(begin, min(begin + TASK, counts[p]), CHUNK):
                byte, short = np.uint64(at) * size, np.uint64(at) * np.uint64(2)
                count, row = min(CHUNK, counts[p] - at), first_chunk[p] + at // CHUNK
                chunk(
                    *(source[p] + byte, target[p] + byte, copy[p] + short, count, np.uint32(start[p] + at)),
                    *(w, s, shift[p], restoring[p], centre[p], out[row]),
                )

    return run
