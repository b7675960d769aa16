"""From the sizes of a model, what it is fed and how it is tuned, to a prediction and a line of advice.

The prediction for a run whose model is loaded and whose method is set up, from the batches it will see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from l2l.costs.memory import (
    LOSS_BYTES,
    Load,
    PerturbMode,
    Plan,
    Update,
    activation_bytes,
    choose_perturb_mode,
    choose_update,
    memory_parts,
    passing_bytes,
)
from l2l.costs.model_shape import ModelShape, model_shape
from l2l.costs.time import Passes, first_order_passes, forward_seconds, step_passes, step_seconds
from l2l.params.blocks import Blocks
from l2l.report.memory import available_bytes, current_bytes
from l2l.tasks.encode import Batch

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
    """Bytes by part; see :func:`l2l.costs.memory.memory_parts`."""
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
    from l2l.tuners.api import Tuner

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
        else step_passes(
            plan.perturb, costs.num_directions, costs.learned, costs.interval, costs.iterations, costs.every
        )
    )
    forward, step = (None, None) if device is None else _seconds(shape, mean, plan, passes, device)
    return Prediction(memory_parts(shape, peak, plan), passes.forwards, forward, step)


def _seconds(
    shape: ModelShape, load: Load, plan: Plan, passes: Passes, device: torch.device | str
) -> tuple[float, float]:
    from l2l.costs.time import speeds_for

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
        thin = replace(plan, dtype=torch.bfloat16, perturb="functional", update="stochastic")
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


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Expectation:
    """What a run is expected to need."""

    peak_bytes: int
    """Of the process on the CPU, of tensors on CUDA; what is in use now included."""
    seconds_per_step: float | None
    """None where it was not worth measuring."""
    missing: int
    """Bytes by which the peak exceeds what there is; 0 where the run fits."""

    def line(self, steps: int) -> str:
        """In words."""
        words = f"expected: {gib(self.peak_bytes)} at most"
        if self.missing:
            words += f", {gib(self.missing)} more than there is: lower batch_size or max_length"
        if self.seconds_per_step is not None:
            total = self.seconds_per_step * steps
            words += f", {self.seconds_per_step:.3g} s per step, {total / 3600:.2g} h for {steps} steps"
        return words


def expect(
    model: PreTrainedModel,
    blocks: Blocks,
    perturb: PerturbMode,
    masters: bool,
    method: Any,
    batches: Sequence[Batch],
    evaluated: Sequence[Batch],
    measure: bool,
    every: int = 0,
) -> Expectation:
    """Peak memory and seconds per step of a run about to begin.

    Args:
        blocks: what moves.
        walk: how.
        masters: whether half-precision weights have float32 masters.
        method: the method object, its state already made.
        batches: some that steps will see; time follows from their mean, memory from the largest.
        evaluated: some that evaluations will see.
        measure: whether to measure this machine for the time; a few hundred milliseconds, once per process.
        every: steps between third losses of ``lr="auto"``; 0: there are none.
    """
    shape, dtype = model_shape(model, blocks), model.dtype
    costs = replace(method_costs(method, blocks), every=every)
    calls = [load for batch in (*batches, *evaluated) for load in loads_of(batch)]
    largest = max(calls, key=lambda load: activation_bytes(shape, load, dtype))
    plan = plan_of(dtype, perturb, "master" if masters else "direct", costs)
    used, room = current_bytes(model.device), available_bytes(model.device)  # before anything is measured
    found = predict(
        shape,
        largest,
        mean_load([loads_of(batch) for batch in batches]),
        plan,
        costs,
        model.device if measure else None,
    )
    more = passing_bytes(found.parts)
    return Expectation(used + more, found.seconds_per_step, max(0, more - room))


def loads_of(batch: Batch) -> list[Load]:
    """What a batch feeds to the model, call by call."""
    calls = batch.parts or (batch,)
    return [Load(len(call.input_ids), call.input_ids.shape[1], len(call.targets)) for call in calls]


def mean_load(batches: Sequence[Sequence[Load]]) -> Load:
    """Rows, length, tokens read and calls of a mean batch, from the calls of some."""
    count, loads = len(batches), [load for calls in batches for load in calls]
    rows = max(1, round(sum(load.rows for load in loads) / count))
    tokens = sum(load.tokens for load in loads) / count
    read = round(sum(load.read for load in loads) / count)
    return Load(rows, max(1, round(tokens / rows)), read, round(len(loads) / count))
