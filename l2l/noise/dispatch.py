"""Which backend makes the noise: chosen by device and dtype, or forced."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2l.noise import reference, triton
from l2l.noise.key import Distribution, Key, standard_deviation
from l2l.noise.slices import MomentRequest, NoiseTerm, Sums, TensorSlice, computed_in

VARIABLE = "L2L_NOISE"
"""Environment variable that forces a backend."""

BACKENDS = {"native": "cpu", "numba": "cpu", "triton": "cuda"}
"""Fast backends and the device they serve, in order of preference; each a module of ``l2l.noise``."""

FAST_DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger("l2l")


def backend_problem(name: str) -> str | None:
    """Why a backend cannot run here, or None where it can."""
    return None if name == "reference" else import_module(f"l2l.noise.{name}").available()


def active_backend(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that serves this device and dtype.

    Raises:
        ValueError: the environment variable names an unknown backend, or one that cannot run.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "reference", *BACKENDS):
        raise ValueError(f"{VARIABLE}={wanted!r} is not a noise backend; use auto, reference, {', '.join(BACKENDS)}")
    kind = torch.device(device).type
    fitting = [name for name, where in BACKENDS.items() if where == kind and dtype in FAST_DTYPES]
    if wanted in fitting or (wanted == "triton" and triton.interpreted() and dtype in FAST_DTYPES):
        problem = backend_problem(wanted)
        if problem is not None:
            raise ValueError(f"{VARIABLE}={wanted}, but {problem}; use {VARIABLE}=auto")
        return wanted
    if wanted != "auto":
        return "reference"
    serving = next((name for name in fitting if backend_problem(name) is None), "reference")
    if fitting and serving != fitting[0]:
        _tell_fallback(kind, serving, fitting[0])
    return serving


@lru_cache(maxsize=8)
def _tell_fallback(kind: str, serving: str, missed: str) -> None:
    """One line per process and kind of device. Every backend makes the same noise; they differ in speed."""
    logger.warning("noise on %s is made by the slower backend %s: %s", kind, serving, backend_problem(missed))


def add_noise(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm] = (),
    gather: MomentRequest | None = None,
    rounding: Key | None = None,
    store: bool = True,
) -> Sums | None:
    """See :func:`l2l.noise.reference.traverse`, whose bits every backend reproduces. Pieces may differ in dtype.

    Raises:
        ValueError: a tensor is not contiguous, or a scale is not finite.
    """
    for piece in pieces:
        if not piece.flat.is_contiguous():
            raise ValueError(
                f"noise for block {piece.name!r} needs a contiguous tensor; its strides are {piece.flat.stride()}"
            )
    kinds = sorted({_kind(piece) for piece in pieces}, key=str)
    if len(kinds) <= 1:
        return _traverse_alike(pieces, terms, gather, rounding, store)
    found = Sums(*(np.zeros(len(pieces)) for _ in range(5)))
    for kind in kinds:
        chosen = [i for i, piece in enumerate(pieces) if _kind(piece) == kind]
        some = [NoiseTerm(t.key, [t.scales[i] for i in chosen], t.distribution) for t in terms]
        part = gather and MomentRequest([gather.home[i] for i in chosen], [gather.centre[i] for i in chosen])
        sums = _traverse_alike([pieces[i] for i in chosen], some, part, rounding, store)
        if sums is not None:
            for name, values in vars(sums).items():
                getattr(found, name)[chosen] = values
    return found if gather is not None else None


def _kind(piece: TensorSlice) -> tuple[Any, ...]:
    return piece.flat.device, piece.flat.dtype, piece.master is None, piece.into is None


def _traverse_alike(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm],
    gather: MomentRequest | None,
    rounding: Key | None,
    store: bool,
) -> Sums | None:
    """Pieces of one device and dtype, in as few calls as the backend needs."""
    if not pieces:
        return reference.total([]) if gather is not None else None
    backend = import_module(f"l2l.noise.{active_backend(pieces[0].flat.device, pieces[0].flat.dtype)}")
    groups = _grouped(terms)
    copied_exactly = pieces[0].master is not None and pieces[0].flat.dtype != torch.bfloat16
    if backend is reference or copied_exactly or (gather is not None and not _summable(groups, rounding)):
        return reference.add_noise(pieces, terms, gather, rounding, store)
    if len(groups) == 1:
        return backend.add_noise(pieces, groups[0], gather, rounding, store)
    if rounding is not None or pieces[0].into is not None or _rounds_between(pieces[0]):
        return reference.add_noise(pieces, terms, gather, rounding, store)
    for group in groups:
        backend.add_noise(pieces, group, None, None, store)
    return None


def _summable(groups: Sequence[Sequence[NoiseTerm]], rounding: Key | None) -> bool:
    """Whether fast backends take sums here: of at most one stream, and of what is rounded to nearest."""
    return rounding is None and len(groups) == 1 and len(groups[0]) <= 1


def _rounds_between(piece: TensorSlice) -> bool:
    """Whether a second traversal would start from a rounded value."""
    return piece.master is None and piece.flat.dtype != computed_in(piece.flat.dtype)


def _grouped(terms: Sequence[NoiseTerm]) -> list[list[NoiseTerm]]:
    """The same additions in the same order, as the calls that fast backends serve.

    A call adds one stream once or twice, and then another once. Order within an element fixes the bits.
    """
    single = [
        NoiseTerm(t.key, [(s[i],) for s in t.scales], t.distribution) for t in terms for i in range(len(t.scales[0]))
    ]
    groups: list[list[NoiseTerm]] = []
    for term in single:
        last = groups[-1] if groups else []
        if len(last) == 1 and _same_stream(last[0], term) and len(last[0].scales[0]) == 1:
            both = [(*a, *b) for a, b in zip(last[0].scales, term.scales, strict=True)]
            last[0] = NoiseTerm(term.key, both, term.distribution)
        elif len(last) == 1 and last[0].distribution == term.distribution and not _same_stream(last[0], term):
            last.append(term)
        else:
            groups.append([term])
    return groups or [[]]


def _same_stream(left: NoiseTerm, right: NoiseTerm) -> bool:
    return left.key == right.key and left.distribution == right.distribution


def add_noise_to(
    flat: Tensor,
    name: str,
    key: Key,
    scales: Sequence[float],
    distribution: Distribution = "gaussian",
    offset: int = 0,
) -> None:
    """``flat += scale * integers`` for each scale in turn, in place: a traversal of one piece."""
    add_noise([TensorSlice(flat, name, offset)], [NoiseTerm(key, [tuple(scales)], distribution)])


def noise_dot(flat: Tensor, name: str, key: Key, distribution: Distribution = "gaussian", offset: int = 0) -> float:
    """Inner product of ``flat`` [count] with the standard noise of block ``name``."""
    piece = TensorSlice(flat, name, offset)
    sums = add_noise([piece], [NoiseTerm(key, [(0.0,)], distribution)], MomentRequest([0.0], [0.0]), store=False)
    assert sums is not None, "sums were asked for"
    return float(sums.du[0]) / standard_deviation(distribution)
