"""Triton kernels. Imported only where triton is installed; under ``TRITON_INTERPRET=1`` they run on the CPU.

A program walks one chunk in tiles. With sums, a tile is one row of all the chunk's runs, so that every lane of every
run is added up in order by itself; another kernel then adds the runs, and the chunks, in order in float64.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from l2l.noise.reference import CHUNK, LANES, RUN
from l2l.noise.table import PART, PLACES

triton: Any = import_module("triton")
tl: Any = import_module("triton.language")
if TYPE_CHECKING:
    constexpr: TypeAlias = Any
else:
    constexpr = tl.constexpr  # triton reads the annotations


def _place(field: str, size: int) -> Any:
    """Where a field lies within a part, counted in elements of ``size`` bytes."""
    return tl.constexpr(PLACES[field] // size)


TILE = tl.constexpr(1024)
ROWS = tl.constexpr(CHUNK // RUN * LANES)
CHUNK_SIZE, RUN_SIZE, WIDTH = tl.constexpr(CHUNK), tl.constexpr(RUN), tl.constexpr(LANES)
PART_SIZE = tl.constexpr(PART.itemsize)
SOURCE, TARGET, COPY = (_place(field, 8) for field in ("source", "target", "copy"))
COUNT, FIRST_CHUNK = _place("count", 8), _place("first_chunk", 8)
START, SHIFT, WORDS, ROUNDING = (_place(field, 4) for field in ("start", "shift", "words", "rounding"))
SCALES, RESTORING, CENTRE = (_place(field, 4) for field in ("scales", "restoring", "centre"))


@triton.jit
def _word(table, part, field: constexpr):
    """A 32-bit unsigned field of a part."""
    return tl.load(table.to(tl.pointer_type(tl.uint32)) + part * (PART_SIZE // 4) + field)


@triton.jit
def _number(table, part, field: constexpr):
    """A float32 field of a part."""
    return tl.load(table.to(tl.pointer_type(tl.float32)) + part * (PART_SIZE // 4) + field)


@triton.jit
def _hash(x, first, second):
    x = x + first
    x = ((x ^ (x >> 17)) * 0xED5AD4BB) ^ second
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def _integer(x, shift, rademacher: constexpr):
    if rademacher:
        whole = 1 - 2 * ((x << shift) >> 31).to(tl.int32)
    else:
        pairs = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
        whole = ((pairs & 0xFFFF) + (pairs >> 16)).to(tl.int32) - 510
    return whole.to(tl.float32)


@triton.jit
def _widen(half):
    return (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(value, random, stochastic: constexpr):
    """The bits of the bfloat16 that a float32 is rounded to: to nearest, or by 16 random bits."""
    bits = value.to(tl.uint32, bitcast=True)
    up = 0x7FFF + ((bits >> 16) & 1)
    if stochastic:
        up = tl.where((bits & 0x7F800000) != 0x7F800000, random & 0xFFFF, 0)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(nan, 0x7FC0, (bits + up) >> 16).to(tl.uint16)


@triton.jit
def _address(table, part, field: constexpr, at, half: constexpr, aligned: constexpr):
    """Pointer to element ``at`` of a part."""
    base = tl.load(table + part * (PART_SIZE // 8) + field)
    start = base.to(tl.pointer_type(tl.uint16 if half else tl.float32))
    if aligned:
        start = tl.multiple_of(start, 16)
    return start + at


@triton.jit
def _store(target, i, count, value, masked: constexpr):
    if masked:
        tl.store(target + i, value, mask=i < count)
    else:
        tl.store(target + i, value)


@triton.jit
def _visit(
    table,
    part,
    begin,
    i,
    count,
    shifts,
    amounts,
    terms,
    half: constexpr,
    first: constexpr,
    second: constexpr,
    rademacher: constexpr,
    stochastic: constexpr,
    store: constexpr,
    copied: constexpr,
    packed: constexpr,
    aligned: constexpr,
    masked: constexpr,
):
    """One tile: elements ``begin + i`` of a part are moved and stored. Returns their d and u, see MomentRequest."""
    at = _word(table, part, START) + begin.to(tl.uint32) + i.to(tl.uint32)
    source = _address(table, part, SOURCE, begin, half, aligned) + i
    value = tl.load(source, mask=i < count, other=0) if masked else tl.load(source)
    if half:
        value = _widen(value)
    u = tl.zeros(i.shape, tl.float32)
    if first > 0:  # one exact product and one rounding each time
        x = _hash(at, _word(table, part, WORDS), _word(table, part, WORDS + 1))
        u = _integer(x, _word(table, part, SHIFT), rademacher)
        value = value + _number(table, part, SCALES) * u
    if first > 1:
        value = value + _number(table, part, SCALES + 1) * u
    if second > 0:
        other = _hash(at, _word(table, part, WORDS + 2), _word(table, part, WORDS + 3))
        value = value + _number(table, part, SCALES + 2) * _integer(other, 0, rademacher)
    if packed:
        x = _hash(at, _word(table, part, WORDS), _word(table, part, WORDS + 1))
        own = amounts + part * terms
        total = tl.load(own) * _integer(x, tl.load(shifts), True)
        for k in range(1, terms):
            total = total + tl.load(own + k) * _integer(x, tl.load(shifts + k), True)
        value = value + total
    random = at
    if stochastic:
        random = _hash(at, _word(table, part, ROUNDING), _word(table, part, ROUNDING + 1))
    written = value
    if half:
        written = _narrow(value, random, stochastic)
        value = _widen(written)
    if store:
        _store(_address(table, part, TARGET, begin, half, aligned), i, count, written, masked)
    if copied:
        short = _narrow(value, random, stochastic)
        _store(_address(table, part, COPY, begin, True, aligned), i, count, short, masked)
    d = value + _number(table, part, RESTORING) * u
    d = d - _number(table, part, CENTRE)
    if masked:
        d = tl.where(i < count, d, 0.0)
        u = tl.where(i < count, u, 0.0)
    return d, u


@triton.jit
def _chunk_of(table, owners, chunk):
    """The part of a chunk, where the chunk begins within it, and its length."""
    part = tl.load(owners + chunk)
    begin = (chunk - tl.load(table + part * (PART_SIZE // 8) + FIRST_CHUNK)) * CHUNK_SIZE
    count = tl.load(table + part * (PART_SIZE // 8) + COUNT) - begin
    return part, begin, tl.minimum(count, CHUNK_SIZE).to(tl.int32)


@triton.jit
def add(
    table,  # int64: the parts, as rows of PART
    owners,  # int32 [chunks]: the part of each chunk
    shifts,  # int32 [terms], of a packed plan
    amounts,  # float32 [parts, terms]
    terms,
    half: constexpr,
    first: constexpr,
    second: constexpr,
    rademacher: constexpr,
    stochastic: constexpr,
    store: constexpr,
    copied: constexpr,
    packed: constexpr,
    aligned: constexpr,
):
    """One chunk, without sums."""
    part, begin, count = _chunk_of(table, owners, tl.program_id(0).to(tl.int64))
    i = tl.arange(0, TILE)
    full = count // TILE * TILE
    for at in range(0, full, TILE):
        _visit(
            *(table, part, begin, at + i, count, shifts, amounts, terms),
            *(half, first, second, rademacher, stochastic, store, copied, packed, aligned, False),
        )
    # A mask would keep the loads above from being wide.
    if full < count:
        _visit(
            *(table, part, begin, full + i, count, shifts, amounts, terms),
            *(half, first, second, rademacher, stochastic, store, copied, packed, aligned, True),
        )


@triton.jit
def add_and_sum(
    table,
    owners,
    lanes,  # float32 [chunks of this launch, runs, 5, LANES]
    skipped,  # chunks that earlier launches served
    half: constexpr,
    first: constexpr,
    second: constexpr,
    rademacher: constexpr,
    stochastic: constexpr,
    store: constexpr,
    copied: constexpr,
    packed: constexpr,
    aligned: constexpr,
):
    """One chunk, and the sums of every lane of every run in it."""
    part, begin, count = _chunk_of(table, owners, tl.program_id(0).to(tl.int64) + skipped)
    run, lane = tl.arange(0, ROWS) // WIDTH, tl.arange(0, ROWS) % WIDTH
    i = run * RUN_SIZE + lane
    dd, du, uu = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    all_d, all_u = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    full = count // CHUNK_SIZE * RUN_SIZE
    for at in range(0, full, WIDTH):
        d, u = _visit(
            *(table, part, begin, at + i, count, table, table, 0),
            *(half, first, second, rademacher, stochastic, store, copied, packed, aligned, False),
        )
        all_d, all_u, dd, du, uu = all_d + d, all_u + u, dd + d * d, du + d * u, uu + u * u
    for at in range(full, tl.minimum(count, RUN_SIZE), WIDTH):
        d, u = _visit(
            *(table, part, begin, at + i, count, table, table, 0),
            *(half, first, second, rademacher, stochastic, store, copied, packed, aligned, True),
        )
        all_d, all_u, dd, du, uu = all_d + d, all_u + u, dd + d * d, du + d * u, uu + u * u
    out = lanes + tl.program_id(0).to(tl.int64) * (ROWS * 5) + run * (5 * WIDTH) + lane
    tl.store(out, all_d)
    tl.store(out + WIDTH, dd)
    tl.store(out + 2 * WIDTH, du)
    tl.store(out + 3 * WIDTH, all_u)
    tl.store(out + 4 * WIDTH, uu)


@triton.jit
def fold(rows, ends, out, width: constexpr, padded: constexpr):
    """Adds rows [n, width] one after another in float64: segment s is ``ends[s - 1] .. ends[s]``."""
    segment = tl.program_id(0)
    column = tl.arange(0, padded)
    inside = column < width
    begin = tl.load(ends + segment - 1, mask=segment > 0, other=0)
    total = tl.zeros([padded], tl.float64)
    for row in range(begin, tl.load(ends + segment)):
        total += tl.load(rows + row * width + column, mask=inside, other=0).to(tl.float64)
    tl.store(out + segment * width + column, total, mask=inside)
