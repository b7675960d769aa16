"""Where tuners began whose initialisation nobody recorded: read off blocks that started from the same draw.

A model that is spread over several devices has its blocks' networks initialised on their devices, from generators with one
seed: the i-th network of each device starts as the i-th of all others. Learning moves few blocks far, so the networks that
started alike still point the same way, and the median over them, coordinate by coordinate, is what they started from.

What a tuner has become, read off the tuner alone: how far it moved, its sigma by kind of block, its basis.

Sigma of every block as a heat map: layers down, kinds of blocks across; in the terminal and as PNG.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2l.tuners.features import RunStatistics, block_constants, kind_of
from l2l.tuners.model import Tuner
from l2l.tuners.networks import TunerNetwork, build_network

ALIKE = 0.5
"""Cosine above which two blocks started alike. In hundreds of dimensions separate draws stay below 0.3."""


@dataclass(frozen=True)
class Reconstruction:
    """What blocks started from, as far as it can be known."""

    initial: Tensor
    """[blocks, numbers] float64; NaN for a block that nothing is like."""
    group: tuple[int, ...]
    """Of each block: which blocks it started alike with, as a number."""
    sizes: tuple[int, ...]
    """Of each block: how many blocks started as it did, itself included. With two the median is their mean: half of what
    either moved counts to each."""


def reconstruct(weights: Tensor, alike: float = ALIKE) -> Reconstruction:
    """The initial weights of each block.

    Args:
        weights: [blocks, numbers] of the blocks' networks, all of one form.
        alike: cosine above which two blocks are taken to have started alike.
    """
    values = weights.double()
    directions = values / values.norm(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    near = directions @ directions.t() > alike
    group = torch.full((len(values),), -1)
    initial = torch.full_like(values, torch.nan)
    for number in range(len(values)):
        members = (near[number] & (group < 0)).nonzero().flatten()
        if group[number] < 0 and len(members):
            group[members] = number
            if len(members) > 1:
                initial[members] = values[members].quantile(0.5, dim=0)
    found = group.tolist()
    return Reconstruction(initial, tuple(found), tuple(found.count(number) for number in found))


def reconstructed_state(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a network, one row per block each, as they began; None unless every block started as another did."""
    rows = [value.reshape(len(value), -1) for value in state.values()]
    initial = reconstruct(torch.cat(rows, 1)).initial
    if initial.isnan().any():
        return None
    parts = initial.split([row.shape[1] for row in rows], 1)
    named = zip(state.items(), parts, strict=True)
    return {name: part.reshape(value.shape).to(value.dtype) for (name, value), part in named}


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


if TYPE_CHECKING:
    from rich.table import Table

OUTSIDE = "-"
"""The row of blocks that belong to no layer."""


@dataclass(frozen=True)
class Heat:
    """Typical sigma by layer and kind."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    """The blocks' names below their layer."""
    values: tuple[tuple[float, ...], ...]
    """[layers][kinds]; NaN where there is no such block."""


def heat(tuner: Tuner) -> Heat:
    """Sigma before normalisation, at ordinary weights and losses (see :mod:`l2l.tuners.diagnostics`)."""
    sigma = typical_sigma(tuner).reshape(len(tuner.fingerprint.names), -1)[:, 0].tolist()
    found = dict(zip(map(place, tuner.fingerprint.names), sigma, strict=True))
    layers = sorted({layer for layer, _ in found}, key=lambda layer: -1 if layer == OUTSIDE else int(layer))
    kinds = list(dict.fromkeys(kind for layer, kind in found if layer != OUTSIDE))
    kinds += [kind for layer, kind in found if layer == OUTSIDE and kind not in kinds]
    values = tuple(tuple(found.get((layer, kind), math.nan) for kind in kinds) for layer in layers)
    return Heat(tuple(layers), tuple(kinds), values)


def place(name: str) -> tuple[str, str]:
    """Layer and kind of a block: its first whole number, and what comes after; names without one lie outside."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return (OUTSIDE, name) if number is None else (parts[number], ".".join(parts[number + 1 :]))


def table(found: Heat) -> Table:
    """For the terminal: kinds down, layers across, the larger sigma the redder."""
    from rich.table import Table as RichTable

    drawn = RichTable(title="sigma by kind and layer, before normalisation", title_justify="left", padding=(0, 0))
    drawn.add_column("kind", no_wrap=True)
    for layer in found.layers:
        drawn.add_column(layer, justify="right", no_wrap=True)
    known = [value for row in found.values for value in row if not math.isnan(value)]
    low, high = min(known), max(known)
    for column, kind in enumerate(found.kinds):
        drawn.add_row(kind, *(_cell(row[column], low, high) for row in found.values))
    return drawn


def _cell(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return ""
    share = (value - low) / (high - low) if high > low else 0.0
    red, blue = round(60 + 140 * share), round(200 - 140 * share)
    return f"[white on rgb({red},60,{blue})] {value:.2f} [/]"


def draw(found: Heat, target: Path, title: str) -> Path:
    """A PNG; written whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 2.5 + 0.35 * len(found.kinds), 2.2 + 0.22 * len(found.layers)
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    picture = axis.imshow(found.values, aspect="auto", interpolation="nearest")
    axis.set_xticks(range(len(found.kinds)), found.kinds, rotation=90, fontsize=7)
    axis.set_yticks(range(len(found.layers)), found.layers, fontsize=7)
    axis.set(title=title, ylabel="layer")
    figure.colorbar(picture, label="sigma before normalisation")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as folder:
            figure.savefig(Path(folder) / target.name, dpi=120, format="png")
            return (Path(folder) / target.name).replace(target)
    finally:
        pyplot.close(figure)
