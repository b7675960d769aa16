"""What a tuner has become, read off the tuner alone: how far it moved, its sigma by kind of block, its basis."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median, pstdev

import torch
from torch import Tensor

from l2l.tuners.base import TunerNetwork
from l2l.tuners.build import build_network
from l2l.tuners.constants import block_constants, kind_of
from l2l.tuners.features import RunStatistics
from l2l.tuners.reconstruct import reconstructed_state
from l2l.tuners.tuner import Tuner

TYPICAL_VARIANCE = 4e-4
"""Of the weights of a language model's matrices; their mean is 0."""
TYPICAL_LOSS = 2.0


@dataclass(frozen=True)
class SigmaRow:
    """Sigma over the blocks of one kind."""

    kind: str
    blocks: int
    smallest: float
    median: float
    largest: float
    variation: float
    """Standard deviation over mean."""


def movement(tuner: Tuner) -> list[float]:
    """How far the weights that serve each block moved from their initialisation, relative to its norm.

    Weights that serve all blocks count for each. Where the initialisation is zero, the distance itself. Empty where the
    initialisation is unknown: see :func:`initial_network`.
    """
    started = initial_network(tuner)
    if started is None:
        return []
    fresh = started.state_dict()
    learned = tuner.network.state_dict()
    changes = {name: learned[name].double() - fresh[name].double() for name in fresh}
    size = _squares(fresh, tuner)
    return torch.sqrt(_squares(changes, tuner) / torch.where(size > 0, size, 1.0)).tolist()


def initial_network(tuner: Tuner) -> TunerNetwork | None:
    """The network as it began: drawn again from its seed.

    Of an imported tuner nobody recorded the seed: what it began from is reconstructed, None where that cannot be done.
    """
    network = build_network(tuner.architecture, tuner.architecture_args)
    if "imported_from" not in tuner.provenance.recipe:
        return network
    state = reconstructed_state(tuner.network.state_dict())
    if state is not None:
        network.load_state_dict(state)
    return None if state is None else network


def _squares(values: dict[str, Tensor], tuner: Tuner) -> Tensor:
    blocks = len(tuner.fingerprint.names)
    found = torch.zeros(blocks, dtype=torch.float64)
    for name, value in values.items():
        rows = 1 if name in tuner.network.shared else blocks
        found += (value.double() ** 2).reshape(rows, -1).sum(1)
    return found


def typical_history(tuner: Tuner) -> RunStatistics:
    """At the start of a run on a model of ordinary weights, the losses 2, the last sigma 1."""
    blocks = tuner.fingerprint.blocks()
    moments = torch.tensor([[0.0, TYPICAL_VARIANCE]] * len(blocks), dtype=torch.float64)
    constants = block_constants(blocks, moments)
    return RunStatistics(torch.ones(len(blocks)), moments, TYPICAL_LOSS, TYPICAL_LOSS, constants)


def typical_sigma(tuner: Tuner, fresh: bool = False) -> Tensor:
    """[blocks] sigma at :func:`typical_history`, before normalisation; [blocks, 2] with two outputs.

    Args:
        fresh: of the tuner as it was initialised; NaN where that is unknown.
    """
    network = initial_network(tuner) if fresh else tuner.network
    if network is None:
        return torch.full_like(typical_sigma(tuner), torch.nan)
    with torch.no_grad():
        return network(tuner.features(typical_history(tuner)))


def sigma_by_kind(tuner: Tuner) -> list[SigmaRow]:
    """Typical sigma over the blocks of each kind, over all, and, inside the basis, over the blocks that have one."""
    sigma = typical_sigma(tuner).reshape(len(tuner.fingerprint.names), -1)
    kinds: dict[str, list[float]] = {}
    for kind, value in zip(map(kind_of, tuner.fingerprint.blocks()), sigma[:, 0].tolist(), strict=True):
        kinds.setdefault(kind, []).append(value)
    rows = [_row(kind, values) for kind, values in sorted(kinds.items())]
    inside = [sigma[i, 1].item() for i, name in enumerate(tuner.fingerprint.names) if name in (tuner.basis or {})]
    return [*rows, _row("all", sigma[:, 0].tolist()), *([_row("inside the basis", inside)] if inside else [])]


def _row(kind: str, values: list[float]) -> SigmaRow:
    average = mean(values)
    variation = pstdev(values) / average if average else 0.0
    return SigmaRow(kind, len(values), min(values), median(values), max(values), variation)


def sigma_change(tuner: Tuner) -> list[float]:
    """Per block, typical sigma over what it was at initialisation, minus 1; empty where that is unknown."""
    blocks = len(tuner.fingerprint.names)
    if initial_network(tuner) is None:
        return []
    now, then = (typical_sigma(tuner, fresh).reshape(blocks, -1)[:, 0] for fresh in (False, True))
    return ((now - then) / then.clamp(min=torch.finfo(then.dtype).tiny)).tolist()


def turns_line(tuner: Tuner) -> str:
    """How many groups of blocks take turns, and how often the rarest and the most frequent have theirs."""
    if tuner.block_schedule is None:
        return "none, all blocks move together"
    shares = [share / sum(tuner.block_schedule.shares) for share in tuner.block_schedule.shares]
    often = f"each {shares[0]:.3f}" if min(shares) == max(shares) else f"{min(shares):.3f} to {max(shares):.3f}"
    return f"{len(shares)} groups of {', '.join(str(len(group)) for group in tuner.block_schedule.groups)} blocks, {often} of the steps"


def basis_line(tuner: Tuner) -> str:
    """Blocks, ranks and size of the basis."""
    if tuner.basis is None:
        return "none"
    found = [vectors.shape[1] for vectors in tuner.basis.values()]
    size = sum(vectors.numel() * vectors.element_size() for vectors in tuner.basis.values())
    span = str(found[0]) if min(found) == max(found) else f"{min(found)} to {max(found)}"
    return f"{len(found)} blocks, rank {span}, {size / 1024:.1f} KiB"
