"""Predicted time of a step: arithmetic of a forward pass and traversals of the weights, over measured speeds.

Pure functions; the speeds come from :mod:`l2l.estimate.calibrate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from l2l.estimate.memory import Load, PerturbMode
from l2l.estimate.shape import ModelShape


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
    perturb: PerturbMode, num_directions: int = 1, learned: bool = False, interval: int = 0, iterations: int = 0, every: int = 0
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
