"""Predicted time of a step: arithmetic of a forward pass and traversals of the weights, over measured speeds.

Speeds are measured in a few hundred milliseconds, once per process and kind of load. Nothing random is drawn, so a run that is
predicted first gives the same results.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from l2l.costs.memory import Load, Plan
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
    pointwise: float
    """Seconds of one layer's norms, activation and additions on the tokens fed."""
    logits: float
    """Seconds to turn one logit into a log-probability."""
    module: float
    """Seconds to call one module on hardly any data."""
    one_stream: float
    """Elements/s of a traversal that adds one direction."""
    two_streams: float
    """Elements/s of a traversal that removes one direction and adds another."""
    block: float
    """Seconds a traversal spends on each block, however small."""


@dataclass(frozen=True)
class Passes:
    """Forward passes and traversals of the weights in a mean step."""

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
    around = shape.layers * (speeds.attention + speeds.pointwise) + load.calls * shape.modules * speeds.module
    return products + around + load.read * shape.vocabulary * speeds.logits


def step_passes(plan: Plan, every: int = 0) -> Passes:
    """Forward passes and traversals of a step, in a loop that owns the model.

    In place, a traversal per forward pass: half of them to the other side of a direction, half from there through the
    update to the next direction. Functional: a copy for each forward pass, and the update per direction; a learned method
    also reads the weights. A first-order method traverses the weights once.

    Args:
        every: steps between the extra losses of ``lr="auto"``, at unperturbed weights; 0: there are none.
    """
    third = 1 / every if every else 0.0
    forwards = plan.passes + third
    if not plan.num_directions:
        return Passes(forwards, 1, 0)
    if plan.perturb == "in_place":
        return Passes(forwards, plan.passes / 2 + 2 * third, plan.passes / 2 - third)
    return Passes(forwards, forwards + plan.num_directions + plan.learned, 0)


def traversal_seconds(shape: ModelShape, passes: Passes, speeds: Speeds) -> float:
    """Seconds a step spends on perturbing and updating the weights."""
    elements = shape.trained * (passes.one_stream / speeds.one_stream + passes.two_streams / speeds.two_streams)
    return elements + (passes.one_stream + passes.two_streams) * len(shape.blocks) * speeds.block


def step_seconds(shape: ModelShape, load: Load, passes: Passes, speeds: Speeds) -> float:
    """Seconds of a mean step."""
    return passes.forwards * forward_seconds(shape, load, speeds) + traversal_seconds(shape, passes, speeds)


CALLS_PER_MODULE = 4
"""A model's module costs about as many small calls: its own, and those around it (views, additions, checks)."""

_REPEATS, _SECONDS = 8, 0.04
"""A measurement is repeated so often, or until it has taken so long."""
_LIMITS = {"cpu": (4.0e8, 2**24), "cuda": (4.0e12, 2**28)}
"""Device -> FLOP of the product measured, and most coordinates of its matrix."""
_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Most elements of the states that attention and pointwise work are measured on; larger ones are in proportion."""
_WEIGHTS = {"reference": 2**20, "cpu": 2**22, "cuda": 2**28}
"""Weights traversed, by backend or else device."""
_SLICES = 64


def speeds_for(shape: ModelShape, load: Load, dtype: torch.dtype, device: torch.device | str = "cpu") -> Speeds:
    """Measured speeds for the sizes of a model and its load."""
    device = torch.device(device)
    threads = torch.get_num_threads()
    # Loads that differ by little share a measurement: rows up to a power of two.
    rounded = [1 << max(0, (rows - 1).bit_length()) for rows in (load.tokens, load.read)]
    products = [_product_speed(rows, shape.width, dtype, device, threads) for rows in rounded]
    attention, pointwise = _layer_seconds(shape, load, dtype, device, threads)
    one, two, block = _traversal_speeds(dtype, device, threads)
    logits, module = _small_seconds(device, threads)
    return Speeds(products[0], products[1], attention, pointwise, logits, module, one, two, block)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some runs, after one that does not count. Other load on the machine only ever makes a run slower."""

    def timed() -> float:
        wait()
        begin = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - begin

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best, spent = float("inf"), 0.0
    timed()
    for _ in range(_REPEATS):
        taken = timed()
        best, spent = min(best, taken), spent + taken
        if spent > _SECONDS:
            break
    return best


def _limit(table: dict[str, Any], device: torch.device) -> Any:
    return table["cuda" if device.type == "cuda" else "cpu"]


# The measurements are cached by all that they depend on, the number of threads among it.


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
    """Seconds of attention and of pointwise work of one layer."""
    size, most = max(1, shape.width // shape.heads), _limit(_ELEMENTS, device)
    rows = min(load.rows, max(1, most // (load.length * shape.heads * size)))
    attention = _attention_seconds(rows, shape.heads, load.length, size, dtype, device, threads)
    tokens = min(load.tokens, max(1, most // shape.expanded))
    pointwise = _pointwise_seconds(tokens, shape.width, shape.expanded * shape.gates, dtype, device, threads)
    return attention * load.rows / rows, pointwise * load.tokens / tokens


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
def _pointwise_seconds(tokens: int, width: int, expanded: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
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
    """Elements/s with one direction and with two, and seconds per block."""
    backend = active_backend(device, dtype)
    count = _WEIGHTS[backend] if backend in _WEIGHTS else _limit(_WEIGHTS, device)
    flat = torch.zeros(count, dtype=dtype, device=device)
    unit = 2.0**-20 / standard_deviation("gaussian")
    here, there = NoiseTerm(Key(0), [(unit,)]), NoiseTerm(Key(0, 1), [(unit,)])
    both = NoiseTerm(Key(0), [(unit, -unit)])
    whole = [TensorSlice(flat, "calibration")]
    one = seconds_of(lambda: add_noise(whole, [here]), device)
    two = seconds_of(lambda: add_noise(whole, [both, there]), device)
    slices = [TensorSlice(flat[16 * i : 16 * (i + 1)], f"calibration.{i}") for i in range(_SLICES)]
    small = NoiseTerm(Key(0), [(unit,)] * _SLICES)
    return count / one, count / two, seconds_of(lambda: add_noise(slices, [small]), device) / _SLICES
