"""What a tuner has learned, from the tuner alone: distance from its initialisation, sigma by kind of block and by layer.

Imported tuners do not record their initialisation; it is reconstructed. A model that is spread over several devices has its
blocks' networks initialised on their devices, from generators with one seed: the i-th network of each device starts as the
i-th of all others. Learning moves few blocks far, so the networks that started alike still point the same way, and the
median over them, coordinate by coordinate, is where they started.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev

import torch

from l2l.report.run_directory import write_whole
from l2l.tuners.features import RunStatistics, block_constants, kind_of
from l2l.tuners.model import TunerModel
from l2l.tuners.networks import TunerNetwork, build_network

ALIKE = 0.5
"""Cosine above which two blocks started alike. In hundreds of dimensions separate draws stay below 0.3."""
TYPICAL_VARIANCE = 4e-4
"""Of the weights of a language model's matrices; their mean is 0."""
TYPICAL_LOSS = 2.0
NO_LAYER = "-"
"""The row of blocks that belong to no layer."""


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructed initial weights of the blocks' networks."""

    initial: torch.Tensor
    """[blocks, numbers] float64; NaN for a block that started like no other."""
    group: tuple[int, ...]
    """Per block: number of the group of blocks that started alike."""
    sizes: tuple[int, ...]
    """Per block: size of its group. With two the median is their mean: half of what either moved counts to each."""


def reconstruct(weights: torch.Tensor, alike: float = ALIKE) -> Reconstruction:
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


def reconstructed_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Initial tensors of a network, one row per block each; None unless every block started like another one."""
    rows = [value.reshape(len(value), -1) for value in state.values()]
    initial = reconstruct(torch.cat(rows, 1)).initial
    parts = zip(state.items(), initial.split([row.shape[1] for row in rows], 1), strict=True)
    found = {name: part.reshape(value.shape).to(value.dtype) for (name, value), part in parts}
    return None if initial.isnan().any() else found


def initial_network(tuner: TunerModel) -> TunerNetwork | None:
    """The network at its initialisation, from its seed. Of an imported tuner it is reconstructed; None if it cannot be."""
    network = build_network(tuner.architecture, tuner.architecture_args)
    if "imported_from" not in tuner.provenance.recipe:
        return network
    if (state := reconstructed_state(tuner.network.state_dict())) is None:
        return None
    network.load_state_dict(state)
    return network


def movement(tuner: TunerModel) -> list[float]:
    """Per block, distance of the weights that serve it from their initialisation, relative to the norm of that.

    Weights that serve all blocks count for each. Where the initialisation is zero, the distance itself. Empty where the
    initialisation is unknown: see :func:`initial_network`.
    """
    started = initial_network(tuner)
    if started is None:
        return []
    blocks, learned = len(tuner.fingerprint.names), tuner.network.state_dict()
    size, distance = torch.zeros(blocks, dtype=torch.float64), torch.zeros(blocks, dtype=torch.float64)
    for name, fresh in started.state_dict().items():
        rows = 1 if name in tuner.network.shared else blocks
        size += (fresh.double() ** 2).reshape(rows, -1).sum(1)
        distance += ((learned[name].double() - fresh.double()) ** 2).reshape(rows, -1).sum(1)
    return torch.sqrt(distance / torch.where(size > 0, size, 1.0)).tolist()


def typical_statistics(tuner: TunerModel, loss: float = TYPICAL_LOSS) -> RunStatistics:
    """The start of a run on a model of ordinary weights: mean 0, variance 4e-4, both losses ``loss``, the last sigma 1."""
    blocks = tuner.fingerprint.blocks()
    moments = torch.tensor([[0.0, TYPICAL_VARIANCE]] * len(blocks), dtype=torch.float64)
    return RunStatistics(torch.ones(len(blocks)), moments, loss, loss, block_constants(blocks, moments))


def typical_sigma(tuner: TunerModel, fresh: bool = False) -> torch.Tensor:
    """[blocks] sigma at :func:`typical_statistics`, before normalisation; [blocks, 2] with two outputs.

    Args:
        fresh: of the tuner as it was initialised; NaN where that is unknown.
    """
    network = initial_network(tuner) if fresh else tuner.network
    if network is None:
        return torch.full_like(typical_sigma(tuner), torch.nan)
    with torch.no_grad():
        return network(tuner.features(typical_statistics(tuner)))


def dense_sigma(tuner: TunerModel, fresh: bool = False) -> torch.Tensor:
    """[blocks] :func:`typical_sigma` of the dense noise."""
    return typical_sigma(tuner, fresh).reshape(len(tuner.fingerprint.names), -1)[:, 0]


def sigma_change(tuner: TunerModel) -> list[float]:
    """Per block, typical sigma over its value at initialisation, minus 1; empty where that is unknown."""
    now, then = dense_sigma(tuner), dense_sigma(tuner, fresh=True)
    return [] if then.isnan().any() else ((now - then) / then.clamp(min=torch.finfo(then.dtype).tiny)).tolist()


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


def sigma_by_kind(tuner: TunerModel) -> list[SigmaRow]:
    """Typical sigma over the blocks of each kind, over all, and, along the basis, over the blocks that have one."""
    sigma, names = typical_sigma(tuner).reshape(len(tuner.fingerprint.names), -1), tuner.fingerprint.names
    kinds: dict[str, list[float]] = {}
    for block, value in zip(tuner.fingerprint.blocks(), sigma[:, 0].tolist(), strict=True):
        kinds.setdefault(kind_of(block), []).append(value)
    kinds = dict(sorted(kinds.items())) | {"all": sigma[:, 0].tolist()}
    if inside := [sigma[i, 1].item() for i, name in enumerate(names) if name in (tuner.basis or {})]:
        kinds["inside the basis"] = inside
    rows: list[SigmaRow] = []
    for kind, values in kinds.items():
        average, ends = mean(values), (min(values), median(values), max(values))
        rows.append(SigmaRow(kind, len(values), *ends, pstdev(values) / average if average else 0.0))
    return rows


def schedule_line(tuner: TunerModel) -> str:
    """Number and sizes of the groups of the block schedule, and how often the rarest and the most frequent move."""
    if tuner.block_schedule is None:
        return "none, all blocks move together"
    groups, total = tuner.block_schedule.groups, sum(tuner.block_schedule.shares)
    low, high = (choose(tuner.block_schedule.shares) / total for choose in (min, max))
    often = f"each {low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
    return f"{len(groups)} groups of {', '.join(str(len(group)) for group in groups)} blocks, {often} of the steps"


def basis_line(tuner: TunerModel) -> str:
    """Blocks, ranks and size of the basis."""
    if tuner.basis is None:
        return "none"
    low, high = (choose(vectors.shape[1] for vectors in tuner.basis.values()) for choose in (min, max))
    size = sum(vectors.nbytes for vectors in tuner.basis.values())
    return f"{len(tuner.basis)} blocks, rank {low if low == high else f'{low} to {high}'}, {size / 1024:.1f} KiB"


@dataclass(frozen=True)
class Heatmap:
    """Typical sigma by layer and kind."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    """Names of blocks within their layer."""
    values: tuple[tuple[float, ...], ...]
    """[layers][kinds]; NaN where there is no such block."""


def heatmap(tuner: TunerModel) -> Heatmap:
    """Sigma before normalisation at :func:`typical_statistics`, by layer and kind."""
    return by_layer_and_kind(dict(zip(tuner.fingerprint.names, dense_sigma(tuner).tolist(), strict=True)))


def by_layer_and_kind(values: Mapping[str, float]) -> Heatmap:
    """Values of blocks, given by their names, in a grid of layers and kinds."""
    found = {layer_and_kind(name): value for name, value in values.items()}
    layers = sorted({layer for layer, _ in found}, key=lambda layer: -1 if layer == NO_LAYER else int(layer))
    kinds = list(dict.fromkeys(kind for layer, kind in found if layer != NO_LAYER))
    kinds += [kind for layer, kind in found if layer == NO_LAYER and kind not in kinds]
    grid = tuple(tuple(found.get((layer, kind), math.nan) for kind in kinds) for layer in layers)
    return Heatmap(tuple(layers), tuple(kinds), grid)


def layer_and_kind(name: str) -> tuple[str, str]:
    """Layer and kind of a block: the first whole number in its name, and the part after it."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return (NO_LAYER, name) if number is None else (parts[number], ".".join(parts[number + 1 :]))


def heatmap_table(found: Heatmap):
    """The heat map for the terminal: a row per kind, a column per layer, the larger sigma the redder."""
    from rich.table import Table

    table = Table(title="sigma by kind and layer, before normalisation", title_justify="left", padding=(0, 0))
    for layer in ("kind", *found.layers):
        table.add_column(layer, justify="left" if layer == "kind" else "right", no_wrap=True)
    known = [value for row in found.values for value in row if not math.isnan(value)]
    low, high = min(known), max(known)

    def cell(value: float) -> str:
        if math.isnan(value):
            return ""
        share = (value - low) / (high - low) if high > low else 0.0
        red, blue = round(60 + 140 * share), round(200 - 140 * share)
        return f"[white on rgb({red},60,{blue})] {value:.2f} [/]"

    for column, kind in enumerate(found.kinds):
        table.add_row(kind, *(cell(row[column]) for row in found.values))
    return table


def draw_heatmap(found: Heatmap, target: Path, title: str) -> Path:
    """The heat map as PNG, complete before it takes its name."""
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
    try:
        return write_whole(target, lambda path: figure.savefig(path, dpi=120, format="png"))
    finally:
        pyplot.close(figure)
