"""From the sizes of a model, what it is fed and how it is tuned, to a prediction and a line of advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from l2l.blocks import Blocks
from l2l.estimate.memory import LOSS_BYTES, Load, Plan, Update, PerturbMode, choose_update, choose_perturb_mode, memory_parts
from l2l.estimate.shape import ModelShape
from l2l.estimate.time import Passes, first_order_passes, forward_seconds, step_passes, step_seconds

GIB = 2**30
_DOUBLES = 3 * 8
"""Bytes per coordinate while a distance between two blocks is measured in float64."""


@dataclass(frozen=True)
class Costs:
    """What a method costs beyond two forward passes."""

    num_directions: int = 1
    learned: bool = False
    interval: int = 0
    """Steps between searches; 0: there is none."""
    iterations: int = 0
    anchor: int = 0
    """Coordinates of which a copy is held throughout."""
    search: int = 0
    """Coordinates copied during a search."""
    scratch: int = 0
    """Bytes needed for a moment."""
    tuner: int = 0
    """Parameters of the tuner."""
    every: int = 0
    """Steps between third losses; 0: there are none."""
    backward: bool = False
    """Whether a step is a forward and a backward pass, and not looks along directions."""
    states: int = 0
    """Float32 coordinates of its state, where it is."""


@dataclass(frozen=True)
class Prediction:
    """What a step is expected to need."""

    parts: dict[str, int]
    """Bytes by part; see :func:`l2l.estimate.memory.memory_parts`."""
    passes: float
    """Forward passes per step, those of searches included."""
    seconds_per_forward: float | None
    seconds_per_step: float | None
    """None where nothing was measured."""

    @property
    def bytes(self) -> int:
        """Of all parts together."""
        return sum(self.parts.values())


def method_costs(method: Any, blocks: Blocks) -> Costs:
    """What a method object costs, for these blocks."""
    from l2l.methods.base import FirstOrder
    from l2l.methods.dizo import DiZO, projected_blocks
    from l2l.methods.learned import Learned

    if isinstance(method, Learned):
        kept = [*method.tuner.network.parameters(), *(method.tuner.basis or {}).values()]
        return Costs(method.num_directions, True, tuner=sum(tensor.numel() for tensor in kept))
    if isinstance(method, DiZO):
        sizes = [blocks[i].numel for i in projected_blocks(blocks, method.projected)]
        return Costs(
            num_directions=method.num_directions,
            interval=method.interval,
            iterations=method.iterations,
            anchor=sum(sizes),
            search=sum(sizes),  # where theta stands while the search moves it
            scratch=_DOUBLES * max(sizes),
        )
    if isinstance(method, FirstOrder):
        return Costs(backward=True, states=method.copies * blocks.numel)
    return Costs(method.num_directions)


def named_method_costs(name: str, args: Mapping[str, Any], model: Any, blocks: Blocks) -> Costs:
    """The same for a method's name; a fresh tuner stands in for the one that ``learned`` will be given.

    Raises:
        ValueError: no such method, or an argument it does not take.
    """
    from l2l.methods import method_class
    from l2l.methods.learned import Learned
    from l2l.tuners.tuner import Tuner

    kind: Any = method_class(name)
    given = {"tuner": Tuner.for_model(model), **args} if issubclass(kind, Learned) else args
    try:
        return method_costs(kind(**given), blocks)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from error


def make_plan(shape: ModelShape, dtype: torch.dtype, perturb: str, update: str, costs: Costs, room: int) -> Plan:
    """The plan with its choices made.

    Args:
        room: bytes there are before the weights are loaded.

    Raises:
        ValueError: walk or update do not fit the dtype.
    """
    left, master = room - shape.parameters * dtype.itemsize, shape.trained * LOSS_BYTES
    chosen = choose_update(dtype, update, left, master)
    return plan_of(dtype, choose_perturb_mode(dtype, perturb), chosen, costs)


def plan_of(dtype: torch.dtype, perturb: PerturbMode, update: Update, costs: Costs) -> Plan:
    """The plan of choices made."""
    return Plan(
        dtype, perturb, update, costs.anchor, costs.search, costs.scratch, costs.tuner, costs.backward, costs.states
    )


def predict(
    shape: ModelShape,
    peak: Load,
    mean: Load,
    plan: Plan,
    costs: Costs,
    device: torch.device | str | None = None,
) -> Prediction:
    """Memory and time of a step.

    Args:
        peak: the largest load, which decides the memory.
        mean: the load of a mean step, which decides the time.
        device: where speeds are measured; None: time is not predicted.
    """
    passes = (
        first_order_passes()
        if costs.backward
        else step_passes(plan.perturb, costs.num_directions, costs.learned, costs.interval, costs.iterations, costs.every)
    )
    forward, step = (None, None) if device is None else _seconds(shape, mean, plan, passes, device)
    return Prediction(memory_parts(shape, peak, plan), passes.forwards, forward, step)


def _seconds(
    shape: ModelShape, load: Load, plan: Plan, passes: Passes, device: torch.device | str
) -> tuple[float, float]:
    from l2l.estimate.calibrate import speeds_for

    speeds = speeds_for(shape, load, plan.dtype, device)
    return forward_seconds(shape, load, speeds), step_seconds(shape, load, passes, speeds)


def advice(shape: ModelShape, load: Load, plan: Plan, room: int) -> str:
    """One line: whether it fits, else the smallest change that makes it fit."""
    needed = sum(memory_parts(shape, load, plan).values())
    have = f"needs {gib(needed)} of {gib(room)} available"
    if needed <= room:
        return f"fits: {have}"
    for words, other_load, other_plan in _changes(load, plan):
        lower = sum(memory_parts(shape, other_load, other_plan).values())
        if lower <= room:
            return f"does not fit: {have}; with {words} it needs {gib(lower)} and fits"
    return f"does not fit: {have}; no smaller batch or dtype helps: use a smaller model, or a machine with more memory"


def _changes(load: Load, plan: Plan) -> list[tuple[str, Load, Plan]]:
    """Smaller runs, the mildest change first."""
    found: list[tuple[str, Load, Plan]] = []
    thin = plan
    if plan.update == "master" and plan.dtype == torch.bfloat16:
        thin = replace(plan, update="stochastic")
        found.append(("update stochastic", load, thin))
    found += [(f"batch_size {rows}", fewer_rows(load, rows), plan) for rows in _halves(load.rows)]
    if plan.dtype in (torch.float32, torch.float64):
        thin = replace(plan, dtype=torch.bfloat16, walk="exact", update="stochastic")
        found.append(("dtype bf16 and update stochastic", load, thin))
    if thin is not plan:
        together = "update stochastic and batch_size 1" if thin.dtype == plan.dtype else "dtype bf16 and batch_size 1"
        found.append((together, fewer_rows(load, 1), thin))
    return found


def _halves(rows: int) -> list[int]:
    return [rows >> shift for shift in range(1, rows.bit_length())]


def fewer_rows(load: Load, rows: int) -> Load:
    """The same load with fewer rows."""
    return Load(rows, load.length, max(1, load.read * rows // load.rows))


def gib(size: int) -> str:
    """A size in words."""
    return f"{size / GIB:.2f} GiB"
