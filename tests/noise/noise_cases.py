"""Random traversals, carried out by two backends: what the bit-for-bit tests share. Also run as a program."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass

import numpy as np
import torch

from l2l.noise import Distribution, Key, MomentRequest, NoiseTerm, Sums, TensorSlice, add_noise, reference
from l2l.noise.dispatch import VARIABLE

WORD = 2**32
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Case:
    """One traversal: everything but the memory it works on, which ``pieces`` makes anew."""

    seed: int
    dtype: torch.dtype
    form: str
    counts: list[int]
    offsets: list[int]
    terms: list[NoiseTerm]
    gather: MomentRequest | None
    rounding: Key | None
    store: bool
    threads: int

    def pieces(self, device: str = "cpu") -> list[TensorSlice]:
        """The same values each time; NaN, infinities and negative zeros among them for every fifth seed."""
        made = []
        for j, (count, offset) in enumerate(zip(self.counts, self.offsets, strict=True)):
            values = torch.randn(count, generator=torch.Generator().manual_seed(self.seed * 10 + j))
            if self.seed % 5 == 0 and count > 4:
                values[:5] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 3e38])
            values = values.to(device)
            flat = values.to(self.dtype)
            into = torch.zeros_like(flat) if self.form == "into" else None
            made.append(TensorSlice(flat, f"b{j}", offset, into, values if self.form == "master" else None))
        return made


def random_case(seed: int, limit: int, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Case:
    """Pieces of at most ``limit`` elements, one dtype and one form, with what fast backends serve."""
    draw = random.Random(seed)
    form = draw.choice(["place", "into", "master"])
    dtype = torch.bfloat16 if form == "master" else draw.choice(dtypes)
    many = draw.randint(1, 4)
    counts = [draw.choice([0, 1, 7, 511, 513, draw.randrange(limit), draw.randrange(limit)]) for _ in range(many)]
    near, far = WORD - draw.randrange(1, 600), draw.randrange(2**34)
    offsets = [draw.choice([0, 3, near, far]) for _ in range(many)]
    distribution: Distribution = draw.choice(["gaussian", "rademacher", "packed_rademacher"])

    def term(key: Key, adds: int) -> NoiseTerm:
        scales = [tuple(draw.uniform(-1, 1) * 10.0 ** draw.randint(-6, -1) for _ in range(adds)) for _ in range(many)]
        return NoiseTerm(key, scales, distribution)

    key = Key(draw.randrange(2**40), draw.randrange(10_000), draw.randrange(4 if distribution != "packed_rademacher" else 70))
    terms = draw.choice([[], [term(key, 1)], [term(key, 2)]])
    gather = MomentRequest([draw.uniform(-0.01, 0.01) for _ in counts], [0.1 for _ in counts]) if draw.random() < 0.4 else None
    if terms and gather is None and draw.random() < 0.5:
        terms = [*terms, term(Key(4), 1)]
    if distribution == "packed_rademacher" and gather is None and draw.random() < 0.6:  # bits of one hash, and of the next
        first = key.draw // 32 * 32
        terms = [
            term(key.with_draw(first + draw.randrange(40)), draw.choice([0, 1, 1, 2])) for _ in range(draw.choice([2, 9, 35]))
        ]
    rounding = Key(5) if gather is None and draw.random() < 0.4 else None
    store = gather is None or draw.random() < 0.7
    return Case(seed, dtype, form, counts, offsets, terms, gather, rounding, store, draw.choice([1, 2, 3]))


def same_bits(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Whether all bits agree; one NaN is as good as another."""
    if left is None or right is None:
        return left is right
    kind = BITS[left.element_size()]
    return bool(((left.view(kind) == right.view(kind)) | (left.isnan() & right.isnan())).all())


def same_sums(left: Sums | None, right: Sums | None) -> bool:
    if left is None or right is None:
        return left is right
    pairs = zip(vars(left).values(), vars(right).values(), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def same_pieces(left: list[TensorSlice], right: list[TensorSlice]) -> bool:
    memory = [(getattr(a, m), getattr(b, m)) for a, b in zip(left, right, strict=True) for m in ("flat", "into", "master")]
    return all(same_bits(a if a is None else a.cpu(), b if b is None else b.cpu()) for a, b in memory)


def differing(backend: str, seeds: range, limit: int, device: str = "cpu") -> list[Case]:
    """Cases in which a backend gives other bits than the reference: in memory, or in the sums."""
    found, threads, forced = [], torch.get_num_threads(), os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    for seed in seeds:
        case = random_case(seed, limit)
        torch.set_num_threads(case.threads)
        slow, fast = case.pieces(), case.pieces(device)
        wanted = reference.add_noise(slow, case.terms, case.gather, case.rounding, case.store)
        sums = add_noise(fast, case.terms, case.gather, case.rounding, case.store)
        if not same_pieces(slow, fast) or not same_sums(wanted, sums):
            found.append(case)
    torch.set_num_threads(threads)
    if forced is None:
        del os.environ[VARIABLE]
    else:
        os.environ[VARIABLE] = forced
    return found


if __name__ == "__main__":
    failed = differing(sys.argv[1], range(int(sys.argv[2])), int(sys.argv[3]))
    print(f"{len(failed)} cases differ", *failed, sep="\n")
    sys.exit(bool(failed))
