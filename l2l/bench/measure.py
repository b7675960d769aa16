"""Alternating measurement: in every round each contender is timed once, so that a slow minute slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from l2l.bench.contenders import LEARNED, STEP, Contender, Step
from l2l.report.memory import PeakMemory

RUN_IN = (STEP, LEARNED)
"""Steps of a managed loop are merged with the one before: the first of a turn is not timed."""

Advance = Callable[[float], None]


def peaks(found: Mapping[str, Contender], device: torch.device, steps: int, advance: Advance) -> dict[str, int]:
    """Name -> most bytes in use during so many steps, weights and the setting up included; also the warm-up."""
    bytes_of: dict[str, int] = {}
    for name, contender in found.items():
        _release(device)
        with PeakMemory(device) as peak, contender() as step:
            losses = [step() for _ in range(steps + (name in RUN_IN))]
            wait(device)
        bytes_of[name] = peak.bytes
        advance(losses[-1])
    return bytes_of


def rounds(
    found: Mapping[str, Contender], device: torch.device, repeats: int, advance: Advance
) -> dict[str, list[float]]:
    """Name -> seconds of a step in each round. The order is reversed from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(repeats):
        names = list(found)
        for name in names if number % 2 == 0 else names[::-1]:
            with found[name]() as step:
                if name in RUN_IN:
                    step()
                spent, loss = timed(step, device)
            seconds[name].append(spent)
            advance(loss)
    return seconds


def timed(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds that a step took, and its loss."""
    wait(device)
    start = time.perf_counter()
    loss = step()
    wait(device)
    return time.perf_counter() - start, loss


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> float | None:
    """Median over rounds of one contender's seconds over another's; None where one was not measured."""
    if above not in seconds or below not in seconds:
        return None
    return median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def checksum(tensors: Sequence[Tensor]) -> int:
    """A number that a change of any bit changes: two sums over the bits, one weighted by position, modulo 2**64."""
    found = 0
    for tensor in tensors:
        bits = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        for part in bits.split(2**22):
            wide = part.to(torch.int64)
            place = torch.arange(1, 2 * len(wide), 2, device=wide.device)
            found = (found * 31 + int(wide.sum()) * 7 + int((wide * place).sum())) % 2**64
    return found
