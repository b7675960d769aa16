"""Prediction of a step's memory and time, from the sizes of a model, its load and its plan; and a line of advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from l2l.costs.memory import Load, PerturbMode, Plan, activation_bytes, memory_parts, transient_bytes
from l2l.costs.model_shape import ModelShape, model_shape
from l2l.costs.time import forward_seconds, speeds_for, step_passes, step_seconds
from l2l.params.blocks import Blocks
from l2l.report.memory import available_bytes, current_bytes
from l2l.tasks.encode import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30


@dataclass(frozen=True)
class Prediction:
    """Predicted needs of a step."""

    parts: dict[str, int]
    """Bytes by part; see :func:`l2l.costs.memory.memory_parts`."""
    passes: float
    """Forward passes per step, all included."""
    seconds_per_forward: float | None
    seconds_per_step: float | None
    """None where nothing was measured."""

    @property
    def bytes(self) -> int:
        """Of all parts together."""
        return sum(self.parts.values())


def predict(
    shape: ModelShape, peak: Load, mean: Load, plan: Plan, device: torch.device | str | None = None, every: int = 0
) -> Prediction:
    """Memory and time of a step.

    Args:
        peak: the largest load, which decides the memory.
        mean: the load of a mean step, which decides the time.
        device: where speeds are measured; None: time is not predicted.
        every: steps between the extra losses of ``lr="auto"``; 0: there are none.
    """
    passes, forward, step = step_passes(plan, every), None, None
    if device is not None:
        speeds = speeds_for(shape, mean, plan.dtype, device)
        forward, step = forward_seconds(shape, mean, speeds), step_seconds(shape, mean, passes, speeds)
    return Prediction(memory_parts(shape, peak, plan), passes.forwards, forward, step)


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
    thin, halves = plan, [load.rows >> shift for shift in range(1, load.rows.bit_length())]
    if plan.update == "master" and plan.dtype == torch.bfloat16:
        thin = replace(plan, update="stochastic")
        found.append(("update stochastic", load, thin))
    found += [(f"batch_size {rows}", fewer_rows(load, rows), plan) for rows in halves]
    if plan.dtype in (torch.float32, torch.float64):
        thin = replace(plan, dtype=torch.bfloat16, perturb="functional", update="stochastic")
        found.append(("dtype bf16 and update stochastic", load, thin))
    if thin is not plan:
        together = "update stochastic and batch_size 1" if thin.dtype == plan.dtype else "dtype bf16 and batch_size 1"
        found.append((together, fewer_rows(load, 1), thin))
    return found


def fewer_rows(load: Load, rows: int) -> Load:
    """The same load with fewer rows."""
    return Load(rows, load.length, max(1, load.read * rows // load.rows))


def gib(size: int) -> str:
    """A size in words."""
    return f"{size / GIB:.2f} GiB"


@dataclass(frozen=True)
class Expectation:
    """Predicted needs of a run."""

    peak_bytes: int
    """Of the process on the CPU, of tensors on CUDA; what is in use now included."""
    seconds_per_step: float | None
    """None where it was not worth measuring."""
    missing: int
    """Bytes by which the peak exceeds what there is; 0 where the run fits."""

    def line(self, steps: int) -> str:
        """One line for a terminal."""
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
        blocks: the trained blocks.
        perturb: how they are perturbed.
        masters: whether half-precision weights have float32 masters.
        method: the method object, its state already made.
        batches: some batches of steps; time follows from their mean, memory from the largest.
        evaluated: some batches of evaluations.
        measure: whether to measure this machine for the time; a few hundred milliseconds, once per process.
        every: steps between the extra losses of ``lr="auto"``; 0: there are none.
    """
    shape, dtype = model_shape(model, blocks), model.dtype
    calls = [load for batch in (*batches, *evaluated) for load in loads_of(batch)]
    largest = max(calls, key=lambda load: activation_bytes(shape, load, dtype))
    mean = mean_load([loads_of(batch) for batch in batches])
    plan = Plan.of(dtype, perturb, "master" if masters else "direct", method, blocks)
    used, room = current_bytes(model.device), available_bytes(model.device)  # before anything is measured
    found = predict(shape, largest, mean, plan, model.device if measure else None, every)
    more = transient_bytes(found.parts)
    return Expectation(used + more, found.seconds_per_step, max(0, more - room))


def loads_of(batch: Batch) -> list[Load]:
    """The load of a batch, call by call."""
    calls = batch.parts or (batch,)
    return [Load(len(call.input_ids), call.input_ids.shape[1], len(call.targets)) for call in calls]


def mean_load(batches: Sequence[Sequence[Load]]) -> Load:
    """Rows, length, tokens read and calls of a mean batch, from the calls of some."""
    count, loads = len(batches), [load for calls in batches for load in calls]
    rows = max(1, round(sum(load.rows for load in loads) / count))
    tokens = sum(load.tokens for load in loads) / count
    read = round(sum(load.read for load in loads) / count)
    return Load(rows, max(1, round(tokens / rows)), read, round(len(loads) / count))
