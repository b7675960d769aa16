"""Reading and writing tuners in folders: see :mod:`l2l.tuners.format`."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from l2l.tuners.card import LICENCE, render, with_results
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.format import (
    BASIS,
    CARD,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    SHA256,
    WEIGHTS,
    read_config,
    sha256_of,
    upgraded,
    validate_checksum,
    validate_header,
)
from l2l.tuners.model import Provenance, TunerModel, load_weights, ranks
from l2l.tuners.networks import build_network
from l2l.tuners.normalize import build_normalizer, normalizer_config
from l2l.tuners.schedule import build_schedule, schedule_config

AnyTuner = TypeVar("AnyTuner", bound=TunerModel)

UNFIT = (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""Raised at values of a wrong type. RuntimeError: torch makes no such tensor."""


def bundled_folder() -> Path:
    """Folder of the tuners that come with the project: in the checkout, or inside the installed package."""
    package = Path(__file__).parent.parent
    checkout = package.parent / "pretrained_tuners"
    return checkout if checkout.is_dir() else package / "pretrained_tuners"


def save(tuner: TunerModel, directory: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a tuner; all files are complete before they take their names, the config last.

    Args:
        dtype: of the network's tensors on disk; None: float32, in which it computes.
    """
    weights = {
        name: value.detach().to(dtype or value.dtype).contiguous() for name, value in tuner.network.state_dict().items()
    }
    weights |= {BASIS + name: vectors for name, vectors in (tuner.basis or {}).items()}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as folder:
        files = [Path(folder) / name for name in (WEIGHTS, CARD, CONFIG)]
        safetensors.torch.save_file(weights, files[0], {"format": FORMAT})
        config = to_config(tuner) | {SHA256: sha256_of(files[0])}
        files[1].write_text(render(tuner, config))
        files[2].write_text(json.dumps(config, indent=1) + "\n")
        _publish(files, directory)
    return directory


def _publish(files: Iterable[Path], directory: Path) -> None:
    for file in files:
        file.chmod(0o644)  # safetensors, and temporary folders, write for their owner only
        file.replace(directory / file.name)


def to_config(tuner: TunerModel) -> dict[str, Any]:
    """Everything about a tuner but its weights, as JSON values."""
    identity, schedule, known = tuner.fingerprint.identity(), schedule_config(tuner.block_schedule), tuner.fingerprint
    blocks: list[dict[str, Any]] = [
        {"name": name, "shape": list(shape)} for name, shape in zip(known.names, known.shapes, strict=True)
    ]
    for row, kind in zip(blocks, known.kinds, strict=False):  # tuners saved without have no kinds
        row["kind"] = kind
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if schedule else 2,
        "architecture": tuner.architecture,
        "architecture_args": tuner.architecture_args,
        "features": tuner.feature_set,
        "normaliser": normalizer_config(tuner.normalizer),
        **asdict(tuner.provenance),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
        "basis": ranks(tuner.basis or {}),
        **({"turns": schedule} if schedule else {}),
        **({"fingerprint": identity} if identity else {}),
        "blocks": blocks,
    }


def load(directory: Path, kind: type[AnyTuner]) -> AnyTuner:
    """The tuner in a folder, as an object of the class ``kind``.

    Raises:
        ValueError: a file is missing, corrupted, or of another format.
    """
    given, path = read_config(directory / CONFIG), directory / WEIGHTS
    try:
        config = upgraded(given)
        weights, basis = _read_weights(path, config)
        if given["architecture"] == "fixed" and set(weights) == {"sigma"}:  # a table holds its logarithm
            weights = {"log_sigma": weights["sigma"].abs().log()}
        tuner = _build(config, basis, kind)
    except UNFIT as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:300]  # torch adds a stack
        raise ValueError(f"{directory / CONFIG} holds a value that does not fit ({line}): get it again") from error
    load_weights(tuner, weights)
    validate_checksum(path, given)
    return tuner


def _read_weights(path: Path, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's tensors, and the basis by block."""
    try:
        validate_header(path, config)
        found = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): get it again") from error
    basis = {name.removeprefix(BASIS): value for name, value in found.items() if name.startswith(BASIS)}
    return {name: value for name, value in found.items() if not name.startswith(BASIS)}, basis


def _build(config: dict[str, Any], basis: dict[str, Tensor], kind: type[AnyTuner]) -> AnyTuner:
    """The tuner of an upgraded config, with fresh weights."""
    args, blocks, identity = config["architecture_args"], config["blocks"], config.get("fingerprint", {})
    if args["blocks"] != len(blocks):
        raise ValueError(f"the tuner's config lists {len(blocks)} blocks for {args['blocks']} networks: get it again")
    if {name: vectors.shape[-1:] for name, vectors in basis.items()} != {n: (r,) for n, r in config["basis"].items()}:
        raise ValueError(f"the tuner's config lists a basis for {len(config['basis'])} blocks that is not there")
    names, shapes = tuple(block["name"] for block in blocks), tuple(tuple(block["shape"]) for block in blocks)
    kinds = tuple(block["kind"] for block in blocks if "kind" in block)
    ties = tuple(tuple(group) for group in identity["ties"]) if identity else None
    return kind(
        build_network(config["architecture"], args),
        Fingerprint(names, shapes, kinds, ties, identity.get("weights")),
        build_normalizer(**config["normaliser"]),
        config["architecture"],
        args,
        Provenance(config["base_model"], config["revision"], config["recipe"], config["results"]),
        config["features"],
        basis,
        build_schedule(config["turns"]),
    )


def edit_card(
    directory: Path,
    results: Path | None = None,
    label: str | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Rewrite a tuner's config and card, and leave its weights' file as it is; the card's path.

    Args:
        directory: of the tuner.
        results: ``meta_evaluate.json``, or the ``summary.json`` of ``l2l tuners test``.
        label: the tuner's label in the evaluation; None: the contender of the folder's name, or the only one.
        licence: of the tuner's weights, as the hub names licences.
        base_model: public id of the model, where the tuner was learned from a directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no tuner, a value does not fit, or the file has no results of this tuner and model.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{str(directory)!r} is no directory: `l2l tuners card` changes tuners in a directory")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise ValueError(f"licence is {licence!r}; give one name without spaces, such as MIT or Apache-2.0")
    tuner, config = load(directory, TunerModel), read_config(directory / CONFIG)
    if licence is not None:
        config["recipe"]["licence"] = licence
    if base_model is not None:
        config["base_model"] = base_model
    if results is not None:
        known = config["results"], results, directory.resolve().name, config["base_model"], label
        config["results"] = with_results(*known)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as folder:
        files = [Path(folder) / name for name in (CARD, CONFIG)]
        files[0].write_text(render(tuner, upgraded(config)))
        files[1].write_text(json.dumps(config, indent=1) + "\n")
        _publish(files, directory)
    return directory / CARD
