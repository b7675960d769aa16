"""Predicted time of a step: arithmetic of a forward pass and traversals of the weights, over measured speeds.

Pure functions; the speeds come from :mod:`l2l.costs.time`.

How fast this machine is: a measurement of a few hundred milliseconds, made once per process and kind of load.

Nothing random is drawn, so a run that is predicted first gives the same results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from l2l.costs.memory import Load, PerturbMode
from l2l.costs.model_shape import ModelShape
from l2l.noise import Key, NoiseTerm, TensorSlice, active_backend, add_noise, standard_deviation


@dataclass(frozen=True)
class Speeds:
    """What this machine does per second, or the seconds it takes."""

    matrices: float
    """FLOP/s of a product with as many rows as tokens are fed in a call."""
    head: float
    """FLOP/s of a product with as many rows as tokens are read in a call."""
    attention: float
    """Seconds of one layer's attention on the rows fed, projections apart."""
    leaves_span: float
    """Seconds of one layer's norms, activation and additions on the tokens fed."""
    logits: float
    """Seconds to turn one logit into a log-probability."""
    module: float
    """Seconds to call one module on hardly any data."""
    one_stream: float
    """Elements/s of a traversal that adds one direction."""
    two_streams: float
    """Elements/s of a traversal that leaves one direction and takes up another."""
    piece: float
    """Seconds a traversal spends on each block, however small."""


@dataclass(frozen=True)
class Passes:
    """Forward passes and traversals of a mean step."""

    forwards: float
    one_stream: float
    two_streams: float


def forward_flops(shape: ModelShape, load: Load) -> dict[str, int]:
    """FLOP of a forward pass: 2 per matrix coordinate and token, 2 per head coordinate and token read, 4 per pair of
    tokens and coordinate of a layer's attention."""
    return {
        "matrices": 2 * load.tokens * shape.matrices,
        "head": 2 * load.read * shape.head,
        "attention": 4 * load.tokens * load.length * shape.width * shape.layers,
    }


def forward_seconds(shape: ModelShape, load: Load, speeds: Speeds) -> float:
    """Seconds of one forward pass with its loss."""
    flops = forward_flops(shape, load)
    products = flops["matrices"] / speeds.matrices + flops["head"] / speeds.head
    around = shape.layers * (speeds.attention + speeds.leaves_span) + load.calls * shape.modules * speeds.module
    return products + around + load.read * shape.vocabulary * speeds.logits


def step_passes(
    perturb: PerturbMode,
    num_directions: int = 1,
    learned: bool = False,
    interval: int = 0,
    iterations: int = 0,
    every: int = 0,
) -> Passes:
    """What a step consists of, in a loop that owns the model.

    In place, two traversals per draw: to the other side, and from there home, on by the update, and out along the
    next direction. Exact: a copy for each forward pass, and the update; a learned method also reads the weights.

    Args:
        draws: directions per step, two forward passes each.
        interval, iterations: of a search every so many steps, two forward passes per iteration.
        every: steps between third losses, for which theta goes home, of ``lr="auto"``; 0: there are none.
    """
    searching = 2 * iterations / interval if interval else 0.0
    third = 1 / every if every else 0.0
    forwards = 2 * num_directions + searching + third
    if perturb == "in_place":
        return Passes(forwards, num_directions + 2 * third, num_directions - third)
    return Passes(forwards, 3 * num_directions + third + learned, 0)


def first_order_passes() -> Passes:
    """A forward pass, a backward pass that takes about as long as two, and one traversal for the update."""
    return Passes(3, 1, 0)


def traversal_seconds(shape: ModelShape, passes: Passes, speeds: Speeds) -> float:
    """Seconds a step spends on moving weights."""
    elements = shape.trained * (passes.one_stream / speeds.one_stream + passes.two_streams / speeds.two_streams)
    return elements + (passes.one_stream + passes.two_streams) * len(shape.blocks) * speeds.piece


def step_seconds(shape: ModelShape, load: Load, passes: Passes, speeds: Speeds) -> float:
    """Seconds of a mean step."""
    return passes.forwards * forward_seconds(shape, load, speeds) + traversal_seconds(shape, passes, speeds)


CALLS_PER_MODULE = 4
"""A model's module costs about as many small calls: its own, and those around it (views, additions, checks)."""

_REPEATS = 8
_SECONDS = 0.04
"""After this long a measurement is not repeated."""
_LIMITS = {"cpu": (4.0e8, 2**24), "cuda": (4.0e12, 2**28)}
"""Device -> FLOP of the product measured, and most coordinates of its matrix."""
_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Most elements of the states on which what is not a product is measured; the rest is in proportion."""
_WEIGHTS = {"reference": 2**20, "cpu": 2**22, "cuda": 2**28}
"""Weights traversed, by backend or else device."""
_PIECES = 64


def speeds_for(shape: ModelShape, load: Load, dtype: torch.dtype, device: torch.device | str = "cpu") -> Speeds:
    """Measured speeds for the sizes of a model and what it is fed."""
    device = torch.device(device)
    threads = torch.get_num_threads()
    # Loads that differ by little share a measurement: rows up to a power of two.
    products = [
        _product_speed(_rounded(rows), shape.width, dtype, device, threads) for rows in (load.tokens, load.read)
    ]
    attention, leaves_span = _layer_seconds(shape, load, dtype, device, threads)
    one, two, piece = _traversal_speeds(dtype, device, threads)
    logits, module = _small_seconds(device, threads)
    return Speeds(products[0], products[1], attention, leaves_span, logits, module, one, two, piece)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some runs, after one that does not count. Others who use the machine only ever make it slower."""
    best, spent = float("inf"), 0.0
    _timed(work, device)
    for _ in range(_REPEATS):
        taken = _timed(work, device)
        best, spent = min(best, taken), spent + taken
        if spent > _SECONDS:
            break
    return best


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rounded(number: int) -> int:
    return 1 << max(0, (number - 1).bit_length())


def _limit(table: dict[str, Any], device: torch.device) -> Any:
    return table["cuda" if device.type == "cuda" else "cpu"]


@lru_cache(maxsize=64)
@torch.no_grad()
def _product_speed(rows: int, width: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """FLOP/s of [rows, width] times a matrix: few rows stream a large matrix, many rows reuse a small one."""
    flops, coordinates = _limit(_LIMITS, device)
    rows, width = min(rows, 4096), min(width, 8192)
    columns = max(16, min(int(flops / (2 * rows * width)), coordinates // width))
    states = torch.full((rows, width), 0.5, dtype=dtype, device=device)
    matrix = torch.full((columns, width), 0.25, dtype=dtype, device=device)
    return 2 * rows * width * columns / seconds_of(lambda: functional.linear(states, matrix), device)


def _layer_seconds(
    shape: ModelShape, load: Load, dtype: torch.dtype, device: torch.device, threads: int
) -> tuple[float, float]:
    """Seconds of attention and of elementwise work of one layer."""
    size = max(1, shape.width // shape.heads)
    fit = max(1, _limit(_ELEMENTS, device) // (load.length * shape.heads * size))
    rows = min(load.rows, fit)
    attention = _attention_seconds(rows, shape.heads, load.length, size, dtype, device, threads)
    fit = max(1, _limit(_ELEMENTS, device) // shape.expanded)
    tokens = min(load.tokens, fit)
    around = _elementwise_seconds(tokens, shape.width, shape.expanded * shape.gates, dtype, device, threads)
    return attention * load.rows / rows, around * load.tokens / tokens


@lru_cache(maxsize=64)
@torch.no_grad()
def _attention_seconds(
    rows: int, heads: int, length: int, size: int, dtype: torch.dtype, device: torch.device, threads: int
) -> float:
    state = torch.full((rows, heads, length, size), 0.5, dtype=dtype, device=device)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(rows, 1, length, length)
    work = functional.scaled_dot_product_attention
    return seconds_of(lambda: work(state, state, state, attn_mask=mask).transpose(1, 2).contiguous(), device)


@lru_cache(maxsize=64)
@torch.no_grad()
def _elementwise_seconds(
    tokens: int, width: int, expanded: int, dtype: torch.dtype, device: torch.device, threads: int
) -> float:
    state = torch.full((tokens, width), 0.5, dtype=dtype, device=device)
    wide = torch.full((tokens, expanded), 0.5, dtype=dtype, device=device)

    def work() -> None:
        for _ in range(2):
            functional.layer_norm(state, (width,))
            torch.add(state, state)
        functional.gelu(wide)

    return seconds_of(work, device)


@lru_cache(maxsize=8)
@torch.no_grad()
def _small_seconds(device: torch.device, threads: int) -> tuple[float, float]:
    """Seconds per logit of the loss, and per module called."""
    rows, columns = 16, 2**15
    logits = torch.full((rows, columns), 0.5, device=device)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    loss = seconds_of(lambda: functional.cross_entropy(logits, targets, reduction="none"), device)
    module, little = nn.Linear(8, 8, device="meta").to_empty(device=device), torch.zeros(8, 8, device=device)
    call = seconds_of(lambda: [module(little) for _ in range(32)], device) / 32
    return loss / (rows * columns), CALLS_PER_MODULE * call


@lru_cache(maxsize=8)
@torch.no_grad()
def _traversal_speeds(dtype: torch.dtype, device: torch.device, threads: int) -> tuple[float, float, float]:
    """Elements/s with one direction and with two, and seconds per piece."""
    backend = active_backend(device, dtype)
    count = _WEIGHTS[backend] if backend in _WEIGHTS else _limit(_WEIGHTS, device)
    flat = torch.zeros(count, dtype=dtype, device=device)
    unit = 2.0**-20 / standard_deviation("gaussian")
    here, there = NoiseTerm(Key(0), [(unit,)]), NoiseTerm(Key(0, 1), [(unit,)])
    both = NoiseTerm(Key(0), [(unit, -unit)])
    whole = [TensorSlice(flat, "calibration")]
    one = seconds_of(lambda: add_noise(whole, [here]), device)
    two = seconds_of(lambda: add_noise(whole, [both, there]), device)
    pieces = [TensorSlice(flat[16 * i : 16 * (i + 1)], f"calibration.{i}") for i in range(_PIECES)]
    small = NoiseTerm(Key(0), [(unit,)] * _PIECES)
    return count / one, count / two, seconds_of(lambda: add_noise(pieces, [small]), device) / _PIECES
