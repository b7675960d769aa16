"""Adds keyed noise with the fastest backend that serves the tensors' device and dtype, or with the one that is forced."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from importlib import import_module
from typing import Any

import numpy as np
import torch

from l2l.interrupts import complete
from l2l.noise import reference, triton
from l2l.noise.key import Distribution, Key, standard_deviation
from l2l.noise.slices import MomentRequest, NoiseTerm, Sums, TensorSlice, computed_in, runs_of_terms
from l2l.noise.table import plan, plan_many

VARIABLE = "L2L_NOISE"
"""Environment variable that forces a backend."""

BACKENDS = {"native": "cpu", "numba": "cpu", "triton": "cuda"}
"""Fast backends and the device they serve, in order of preference."""

MANY = 8
"""Terms from which on the native backend adds them all while an element is in a register: a replay merges many steps."""

FAST_DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger("l2l")


@cache
def _module(backend: str) -> Any:
    """The module of a backend, imported once: with `available()` and `run_plans(plans)`."""
    return import_module(f"{__package__}.{backend}")


def backend_problem(name: str) -> str | None:
    """Why a backend cannot run here, or None where it can."""
    return None if name == "reference" else _module(name).available()


def active_backend(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that serves this device and dtype.

    Raises:
        ValueError: the environment variable names an unknown backend, or one that cannot run.
    """
    return _serving(os.environ.get(VARIABLE, "auto"), torch.device(device).type, dtype in FAST_DTYPES)


@lru_cache(maxsize=64)
def _serving(wanted: str, kind: str, fast: bool) -> str:
    """The choice, made once per process: nothing is looked for again in each call, and a fallback is told of once."""
    if wanted not in ("auto", "reference", *BACKENDS):
        raise ValueError(f"{VARIABLE}={wanted!r} is not a noise backend; use auto, reference, {', '.join(BACKENDS)}")
    fitting = [name for name, where in BACKENDS.items() if where == kind and fast]
    if wanted in fitting or (wanted == "triton" and triton.interpreted() and fast):
        problem = backend_problem(wanted)
        if problem is not None:
            raise ValueError(f"{VARIABLE}={wanted}, but {problem}; use {VARIABLE}=auto")
        return wanted
    if wanted != "auto":
        return "reference"
    serving = next((name for name in fitting if backend_problem(name) is None), "reference")
    if fitting and serving != fitting[0]:
        problem = backend_problem(fitting[0])
        logger.warning("noise on %s is made by the slower backend %s: %s", kind, serving, problem)
    return serving


def prepare_memory(tensors: Sequence[torch.Tensor]) -> None:
    """Tells the backend that contiguous tensors will be traversed again and again. Their values stay."""
    on_cpu = [t for t in tensors if t.device.type == "cpu" and t.numel() and active_backend(t.device, t.dtype) == "native"]
    if on_cpu:
        _module("native").use_huge_pages(on_cpu)


def add_noise(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm] = (),
    gather: MomentRequest | None = None,
    rounding: Key | None = None,
    store: bool = True,
) -> Sums | None:
    """See :func:`l2l.noise.reference.add_noise`, whose bits every backend reproduces. Pieces may differ in dtype.

    Raises:
        ValueError: a tensor is not contiguous, or a scale is not finite.
    """
    lanes = _planned(pieces, terms, gather, rounding, store)()
    return None if gather is None else reference.total(lanes or [])


def chunk_sums(pieces: Sequence[TensorSlice], terms: Sequence[NoiseTerm], gather: MomentRequest) -> list[np.ndarray]:
    """The sums that :func:`add_noise` takes, of each piece by chunk [chunks, 5, lanes]; nothing is written.

    Chunks of shards that begin at a multiple of :data:`l2l.noise.reference.CHUNK` are those of the whole block:
    :func:`l2l.noise.reference.total` of them, in the order of the block, gives the bits of its sums.
    """
    return _planned(pieces, terms, gather, None, False)() or []


def _planned(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm],
    gather: MomentRequest | None,
    rounding: Key | None,
    store: bool,
) -> Callable[[], list[np.ndarray] | None]:
    """The traversal, checked and ready to run; it gives the sums of each piece by chunk, where these are asked for."""
    for piece in pieces:
        if not piece.flat.is_contiguous():
            raise ValueError(f"noise for block {piece.name!r} needs a contiguous tensor; its strides are {piece.flat.stride()}")
    kinds = {_kind(piece) for piece in pieces}
    if len(kinds) > 1:
        return partial(_add_by_kind, sorted(kinds, key=str), pieces, terms, gather, rounding, store)
    if not pieces or (not store and gather is None):
        return list
    first = pieces[0]
    backend = active_backend(first.flat.device, first.flat.dtype)
    plain = store and gather is None and rounding is None and first.master is None and first.into is None
    kinds = {(term.distribution, len(term.scales[0])) for term in terms} if len(terms) >= MANY and plain else set()
    if backend == "native" and first.flat.dtype == torch.float32 and kinds in ({("gaussian", 1)}, {("rademacher", 1)}):
        return partial(_module("native").run_plans, [plan_many(pieces, terms)])
    groups = _grouped(terms)
    # Fast backends take sums of at most one stream, rounded to nearest.
    packed_once = len(terms) == 1 and len(terms[0].scales[0]) == 1
    single = len(groups) == 1 and len(groups[0]) <= 1 and (packed_once or not any(term.packed_by for term in terms))
    summable = gather is None or (rounding is None and single)
    copied_exactly = first.master is not None and first.flat.dtype != torch.bfloat16
    if len(groups) > 1:
        # A further call would start from a value that the call before has rounded to what is stored.
        rounds_between = first.master is None and first.flat.dtype != computed_in(first.flat.dtype)
        summable &= rounding is None and first.into is None and not rounds_between
    if backend == "reference" or copied_exactly or not summable:
        return partial(reference.traverse, pieces, terms, gather, rounding, store)
    plans = [plan(pieces, group, gather, rounding, store) for group in groups]  # all are checked before any runs
    if not plans[0].chunks:
        return lambda: [np.zeros((0, 5, reference.LANES))] * len(pieces)
    return partial(_module(backend).run_plans, plans)


def _kind(piece: TensorSlice) -> tuple[Any, ...]:
    """What must be the same in all pieces of one call of a backend."""
    return piece.flat.device, piece.flat.dtype, piece.master is None, piece.into is None


def _add_by_kind(
    kinds: Sequence[tuple[Any, ...]],
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm],
    gather: MomentRequest | None,
    rounding: Key | None,
    store: bool,
) -> list[np.ndarray] | None:
    """One call for the pieces of each device and dtype."""
    found = [np.zeros((0, 5, reference.LANES))] * len(pieces)

    def added(kind: tuple[Any, ...]) -> None:
        chosen = [i for i, piece in enumerate(pieces) if _kind(piece) == kind]
        some = [NoiseTerm(t.key, [t.scales[i] for i in chosen], t.distribution) for t in terms]
        part = gather and MomentRequest([gather.restoring[i] for i in chosen], [gather.centre[i] for i in chosen])
        lanes = _planned([pieces[i] for i in chosen], some, part, rounding, store)()
        if gather is not None:
            for i, own in zip(chosen, lanes or [], strict=True):
                found[i] = own

    complete(partial(added, kind) for kind in kinds)
    return found if gather is not None else None


def _grouped(terms: Sequence[NoiseTerm]) -> list[list[NoiseTerm]]:
    """The same additions in the same order, as the calls that fast backends serve.

    A call adds one stream once or twice, and then another once; or the sum of any number of bits of one hash. Order within
    an element fixes the bits.
    """
    groups: list[list[NoiseTerm]] = []
    for key, run in runs_of_terms(terms):
        groups += _streams(run) if key is None else [[term for term in run if term.scales[0]] or run[:1]]
    return groups or [[]]


def _streams(terms: Sequence[NoiseTerm]) -> list[list[NoiseTerm]]:
    groups: list[list[NoiseTerm]] = []
    for term in terms:
        for add in range(len(term.scales[0])):
            single = term if len(term.scales[0]) == 1 else replace(term, scales=[(own[add],) for own in term.scales])
            last = groups[-1] if groups else []
            same = len(last) == 1 and last[0].key == term.key and last[0].distribution == term.distribution
            if same and len(last[0].scales[0]) == 1:
                last[0] = replace(term, scales=[(*a, *b) for a, b in zip(last[0].scales, single.scales, strict=True)])
            elif len(last) == 1 and not same and last[0].distribution == term.distribution:
                last.append(single)
            else:
                groups.append([single])
    return groups


def add_noise_to(
    flat: torch.Tensor, name: str, key: Key, scales: Sequence[float], distribution: Distribution = "gaussian", offset: int = 0
) -> None:
    """``flat += scale * integers`` for each scale in turn, in place."""
    add_noise([TensorSlice(flat, name, offset)], [NoiseTerm(key, [tuple(scales)], distribution)])


def noise_dot(flat: torch.Tensor, name: str, key: Key, distribution: Distribution = "gaussian", offset: int = 0) -> float:
    """Inner product of ``flat`` [count] with the standard noise of block ``name``."""
    piece = TensorSlice(flat, name, offset)
    sums = add_noise([piece], [NoiseTerm(key, [(0.0,)], distribution)], MomentRequest([0.0], [0.0]), store=False)
    assert sums is not None, "sums were asked for"
    return float(sums.du[0]) / standard_deviation(distribution)
