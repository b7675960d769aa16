"""The prediction for a run whose model is loaded and whose method is set up, from the batches it will see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l2l.blocks import Blocks
from l2l.estimate.memory import Load, PerturbMode, activation_bytes, passing_bytes
from l2l.estimate.predict import gib, method_costs, plan_of, predict
from l2l.estimate.shape import model_shape
from l2l.report.memory import available_bytes, current_bytes
from l2l.tasks.encode import Batch

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
