"""Whatever is traversed, in whatever parts, by whichever backend, on however many threads: no bit differs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from noise_cases import Case, differing, random_case, same_bits, same_pieces, same_sums

from l2l.noise import (
    Distribution,
    Key,
    MomentRequest,
    NoiseTerm,
    Sums,
    TensorSlice,
    add_noise,
    backend_problem,
    shard_pieces,
)
from l2l.noise.dispatch import VARIABLE

pytestmark = pytest.mark.in_turn

FAST = [
    pytest.param(name, marks=pytest.mark.skipif(backend_problem(name) is not None, reason=str(backend_problem(name))))
    for name in ("native", "numba")
]
ALL = ["reference", *FAST]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_native_equals_the_reference_bit_for_bit():
    if backend_problem("native") is not None:
        pytest.skip(str(backend_problem("native")))
    assert differing("native", range(150), 40_000) == []


def test_numba_equals_the_reference_bit_for_bit():
    if backend_problem("numba") is not None:
        pytest.skip(str(backend_problem("numba")))
    assert differing("numba", range(6), 40_000) == []


@pytest.mark.slow
def test_every_fast_backend_equals_the_reference_in_many_cases():
    for backend in ("native", "numba"):
        if backend_problem(backend) is None:
            assert differing(backend, range(1000, 1300), 300_000) == []


def moved(case: Case) -> tuple[list[TensorSlice], Sums | None]:
    pieces = case.pieces()
    return pieces, add_noise(pieces, case.terms, case.gather, case.rounding, case.store)


@pytest.mark.parametrize("backend", ALL)
def test_sums_and_values_do_not_depend_on_the_number_of_threads(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, backend)
    case = replace(random_case(1, 10), dtype=torch.float32, form="place", counts=[900_001, 3], offsets=[5, 2**32 - 2])
    case = replace(case, terms=[NoiseTerm(Key(1), [(1e-3,)] * 2)], gather=MomentRequest([1e-3] * 2, [0.0] * 2), rounding=None)
    torch.set_num_threads(1)
    pieces, sums = moved(case)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        others, again = moved(case)
        assert same_pieces(pieces, others)
        assert same_sums(sums, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_fast_backend_cannot_do_falls_to_the_reference_with_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    draw = random.Random(0)
    for seed in range(10):
        case = random_case(seed, 5000, (dtype,))
        many = len(case.counts)
        adds: list[tuple[Key, Distribution, int]] = [
            (Key(1), "gaussian", 3),
            (Key(2), "rademacher", 1),
            (Key(1), "gaussian", 1),
        ]
        terms = [NoiseTerm(k, [tuple(draw.uniform(-0.01, 0.01) for _ in range(n))] * many, d) for k, d, n in adds]
        for some in (terms, terms[:1], terms[:2]):
            tried = replace(case, terms=some, threads=1)
            monkeypatch.setenv(VARIABLE, "reference")
            slow, wanted = moved(tried)
            monkeypatch.setenv(VARIABLE, "auto")
            fast, sums = moved(tried)
            assert same_pieces(slow, fast), tried
            assert same_sums(wanted, sums), tried


def test_pieces_of_several_dtypes_are_traversed_together(monkeypatch: pytest.MonkeyPatch, key: Key):
    def mixed() -> list[TensorSlice]:
        some = [torch.randn(700 + i, generator=torch.Generator().manual_seed(i)) for i in range(6)]
        kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.bfloat16]
        return [TensorSlice(w.to(kind), f"b{i}") for i, (w, kind) in enumerate(zip(some, kinds, strict=True))]

    terms, gather = [NoiseTerm(key, [(10.0**-i,) for i in range(1, 7)])], MomentRequest([0.1] * 6, [0.0] * 6)
    monkeypatch.setenv(VARIABLE, "reference")
    slow = mixed()
    wanted = add_noise(slow, terms, gather)
    monkeypatch.setenv(VARIABLE, "auto")
    fast = mixed()
    assert same_sums(wanted, add_noise(fast, terms, gather))
    assert same_pieces(slow, fast)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rounding", [None, Key(9)], ids=["nearest", "stochastic"])
def test_a_block_moves_the_same_whole_or_in_shards_of_rows_or_columns(
    backend: str, dtype: torch.dtype, rounding: Key | None, monkeypatch: pytest.MonkeyPatch, key: Key
):
    monkeypatch.setenv(VARIABLE, backend)
    rows, columns = 61, 517
    start = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)

    def walk(pieces: list[TensorSlice]) -> None:
        add_noise(pieces, [NoiseTerm(key, [(1e-2,)] * len(pieces))], rounding=rounding)

    walk([TensorSlice((whole := start.clone()).view(-1), "w")])
    for cut in (1, 20, 60):
        upper, lower = start[:cut].clone(), start[cut:].clone()
        walk(shard_pieces(upper, "w", columns) + shard_pieces(lower, "w", columns, row=cut))
        assert same_bits(whole, torch.cat([upper, lower]))
        left, right = start[:, :cut].clone(), start[:, cut:].clone()
        walk(shard_pieces(left, "w", columns) + shard_pieces(right, "w", columns, column=cut))
        assert same_bits(whole, torch.cat([left, right], dim=1))


@pytest.mark.parametrize("backend", ALL)
def test_shards_across_two_to_the_32_elements_move_as_the_whole_does(backend: str, monkeypatch: pytest.MonkeyPatch, key: Key):
    monkeypatch.setenv(VARIABLE, backend)
    columns, row = 65_536 * 4, 2**32 // (65_536 * 4) - 1  # the second row begins at 2**32
    shard = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    together, apart = shard.clone(), shard.clone()
    (whole,) = shard_pieces(together, "w", columns, row=row)
    assert whole.offset + columns == 2**32
    parts = [piece for i in range(2) for piece in shard_pieces(apart[i : i + 1], "w", columns, row=row + i)]
    add_noise([whole], [NoiseTerm(key, [(1e-2,)])])
    add_noise(parts, [NoiseTerm(key, [(1e-2,)] * 2)])
    assert same_bits(together, apart)


@pytest.mark.parametrize("backend", ALL)
def test_a_traversal_that_is_to_store_and_sum_nothing_does_nothing(backend: str, monkeypatch: pytest.MonkeyPatch, key: Key):
    monkeypatch.setenv(VARIABLE, backend)
    start = torch.randn(100, generator=torch.Generator().manual_seed(0))
    piece = TensorSlice(start.clone(), "w")
    assert add_noise([piece], [NoiseTerm(key, [(1.0,)])], store=False) is None
    assert same_bits(start, piece.flat)


@pytest.mark.parametrize("backend", ALL)
def test_negative_zeros_survive_a_traversal_without_noise(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, backend)
    zeros = torch.full((50,), -0.0)
    copy = torch.ones(50)
    add_noise([TensorSlice(zeros, "w", into=copy)])
    assert same_bits(zeros, copy)


@pytest.mark.parametrize("backend", ALL)
def test_a_scale_that_is_not_finite_is_refused_before_anything_is_written(
    backend: str, monkeypatch: pytest.MonkeyPatch, key: Key
):
    monkeypatch.setenv(VARIABLE, backend)
    pieces = [TensorSlice(torch.ones(9), "a"), TensorSlice(torch.ones(9), "b")]
    with pytest.raises(ValueError, match="noise scale is nan; it must be finite"):
        add_noise(pieces, [NoiseTerm(key, [(1.0,), (float("nan"),)])])
    assert all(torch.equal(piece.flat, torch.ones(9)) for piece in pieces)
