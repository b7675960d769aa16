"""Tuners published as pickles of whole modules: read without executing anything, kept bit for bit, written as ours.

Such a file holds a mapping from the names of a model's blocks to ``Sequential(Linear(5, 64), Tanh(), Linear(64, 1))``
(ZO Fine-tuner, arXiv:2510.00419).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l.tuners import store
from l2l.tuners.archive import Archive, read_archive
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.known_models import known_fingerprint
from l2l.tuners.normalise import EnergyNormalizer
from l2l.tuners.per_block_mlp import PerBlockMLP
from l2l.tuners.safe_pickle import LINEAR, SEQUENTIAL, TANH, Module, TensorPlace, read
from l2l.tuners.tuner import Provenance, Tuner, load_weights

HIDDEN, INPUTS = 64, 5
LAYERS = {"0": LINEAR, "1": TANH, "2": LINEAR}
SHAPES = {
    ("0", "weight"): (HIDDEN, INPUTS),
    ("0", "bias"): (HIDDEN,),
    ("2", "weight"): (1, HIDDEN),
    ("2", "bias"): (1,),
}
"""Tensors of each block's module: layer, name, shape."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}
BLOCK_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
MOST_BLOCKS = 100_000
NO_LICENCE = "unknown: the file states none; ask its authors before passing it on"
NOT_RECORDED = "not recorded; distances are from what blocks that started alike have in common"


@dataclass(frozen=True)
class Published:
    """What a published file holds."""

    archive: Archive
    dtype: torch.dtype
    names: tuple[str, ...]
    """Of its blocks, in the order of the file."""
    weights: dict[str, Tensor]
    """The network's tensors as ``per_block_mlp`` stacks them, one row per name, in the file's dtype."""


def read_published(path: Path) -> Published:
    """Read a published file. Its classes are names that are compared, never code that is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, too large, or anything else than a mapping from block names to these modules.
    """
    archive = read_archive(path)
    try:
        modules = _modules(read(archive.entries["data.pkl"]))
        parts = {place: [_tensor(archive, *_of(modules, name, place)) for name in modules] for place in SHAPES}
    except ValueError as error:
        raise ValueError(f"{path} is not a tuner as published ones are: {error}") from error
    first, second = torch.stack(parts["0", "weight"]), torch.stack(parts["2", "weight"])[:, 0]
    biases = torch.stack(parts["0", "bias"]), torch.stack(parts["2", "bias"])[:, 0]
    weights = {"first_weight": first, "first_bias": biases[0], "second_weight": second, "second_bias": biases[1]}
    return Published(
        archive, first.dtype, tuple(modules), {name: value.contiguous() for name, value in weights.items()}
    )


def _modules(found: Any) -> dict[str, Module]:
    if not isinstance(found, dict) or not 1 <= len(found) <= MOST_BLOCKS:
        raise ValueError("it holds no mapping from block names to modules")
    for name, module in found.items():
        if not BLOCK_NAME.fullmatch(name) or len(name) > 200:
            raise ValueError(f"{name[:80]!r} is no name of a block")
        parts = module.state.get("_modules") if isinstance(module, Module) and module.kind == SEQUENTIAL else None
        layers = [(key, layer.kind) for key, layer in parts.items() if isinstance(layer, Module)] if parts else []
        if layers != list(LAYERS.items()) or len(layers) != len(parts or ()):
            raise ValueError(f"what it holds for block {name!r} is not Sequential(Linear, Tanh, Linear)")
    dtypes = {place.storage.dtype for name in found for at in SHAPES for place in _of(found, name, at)[1:]}
    if len(dtypes) > 1:
        raise ValueError(f"its numbers are of several dtypes: {', '.join(sorted(dtypes))}")
    return found


def _of(modules: Mapping[str, Module], block: str, place: tuple[str, str]) -> tuple[str, TensorPlace]:
    """What to call a tensor, and where the file has it."""
    layer, name = place
    parameters = modules[block].state["_modules"][layer].state.get("_parameters")
    if not isinstance(parameters, dict) or set(parameters) != {"weight", "bias"}:
        raise ValueError(f"layer {layer} of block {block!r} has not just a weight and a bias")
    found = parameters[name]
    if not isinstance(found, TensorPlace) or found.shape != SHAPES[place]:
        shape = found.shape if isinstance(found, TensorPlace) else "no tensor"
        raise ValueError(f"{layer}.{name} of block {block!r} has shape {shape}, not {SHAPES[place]}")
    return f"{layer}.{name} of block {block!r}", found


def _tensor(archive: Archive, label: str, place: TensorPlace) -> Tensor:
    dtype, size = DTYPES[place.storage.dtype], prod(place.shape)
    held = archive.entries.get(f"data/{place.storage.key}", b"")
    rows = tuple(prod(place.shape[i + 1 :]) for i in range(len(place.shape)))
    if len(held) != place.storage.numel * dtype.itemsize or place.offset + size > place.storage.numel:
        raise ValueError(f"{label} lies in a storage of {len(held)} bytes, which does not hold it")
    if place.stride != rows:
        raise ValueError(f"{label} is not stored row by row")
    values = torch.frombuffer(bytearray(held), dtype=dtype, offset=place.offset * dtype.itemsize, count=size)
    if not torch.isfinite(values).all():
        raise ValueError(f"{label} is not finite")
    return values.reshape(place.shape)


def to_tuner(found: Published, base_model: str, prints: Fingerprint, file: str) -> Tuner:
    """The tuner for a model of these blocks, its rows in the order of the model's. It computes in float32.

    Args:
        file: name of the file that it was read from, for its record.

    Raises:
        ValueError: the file's blocks are not the model's.
    """
    _check_blocks(found.names, base_model, prints)
    places = {name: row for row, name in enumerate(found.names)}
    rows = torch.tensor([places[name] for name in prints.names])
    args = {"blocks": len(rows), "hidden": HIDDEN, "start": "random"}
    origin = {
        "file": file,
        "sha256": found.archive.sha256,
        "bytes": found.archive.bytes,
        "saved_as": found.archive.name,
        "dtype": str(found.dtype).removeprefix("torch."),
    }
    recipe = {"imported_from": origin, "licence": NO_LICENCE, "initialisation": NOT_RECORDED}
    provenance = Provenance(base_model, None, recipe)
    tuner = Tuner(PerBlockMLP(**args), prints, EnergyNormalizer(), "per_block_mlp", args, provenance)
    load_weights(tuner, {name: value[rows] for name, value in found.weights.items()})
    return tuner


def _check_blocks(names: tuple[str, ...], base_model: str, prints: Fingerprint) -> None:
    absent, more = sorted(set(prints.names) - set(names)), sorted(set(names) - set(prints.names))
    if absent or more:
        said = [f"it lacks {len(absent)}: {format_names(absent)}"] if absent else []
        said += [f"it has {len(more)} others: {format_names(more)}"] if more else []
        raise ValueError(f"the file is no tuner for {base_model!r}: of the model's blocks {'; '.join(said)}")


def import_published(file: Path, base_model: str, out: Path, prints: Fingerprint | None = None) -> Tuner:
    """Import a published file: its numbers bit for bit, with its origin, as a directory that appears whole or not at all.

    Args:
        base_model: hub id of the model that it was trained for.
        out: new or empty directory.
        prints: blocks of that model; None: it is one of :data:`l2l.tuners.known_models.KNOWN_MODELS`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is refused, is for another model, or the directory is not empty.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out} exists and is no empty directory: choose another --out")
    found = read_published(file)
    tuner = to_tuner(found, base_model, prints or known_fingerprint(base_model), file.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".writing-") as folder:
        whole = store.save(tuner, Path(folder) / "tuner", found.dtype)
        whole.replace(out)
    return tuner
