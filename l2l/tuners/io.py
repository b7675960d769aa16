"""What is checked of a tuner's files before they cost anything: kinds of file, sizes, types, checksum.

Tuners on disk: ``tuner.safetensors`` + ``config.json`` + ``README.md``. Inert: nothing in them is ever executed.

The weights file holds the network's tensors by name, and ``basis.<block>`` for each block that has a basis.

What is said about a tuner, changed: licence, base model, results. Its weights stay as they lie, byte for byte.
"""

from __future__ import annotations

import json
import platform
import tempfile
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from l2l.tuners.card import LICENCE, render, with_results
from l2l.tuners.model import Fingerprint, Provenance, Tuner, load_weights, ranks
from l2l.tuners.networks import build_network
from l2l.tuners.normalize import build_normalizer, normalizer_config
from l2l.tuners.schedule import build_schedule, schedule_config

SHA256 = "weights_sha256"
"""Field of the config: checksum of the weights' file. Tuners saved by older releases have none."""
MOST_TEXT = 8 << 20
"""Bytes of a config."""
MOST_TENSORS = 64
"""That a network may have, beside one per block for its basis."""
MOST_SIZE = 1 << 40
"""Of a block, along one dimension."""
SLACK = 1 << 22
"""Numbers by which a config and its weights may differ before memory is taken; the exact comparison comes after."""
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("architecture", "features", "base_model", SHA256), str),
    **dict.fromkeys(("architecture_args", "normaliser", "recipe", "results", "basis", "turns", "versions"), dict),
    "blocks": list,
    "revision": (str, type(None)),
}
DTYPES = ("F32", "F16", "BF16")


def check_regular(path: Path, most: int | None = None) -> Path:
    """The path, if a regular file of at most so many bytes is there: not a directory, a device or a pipe.

    Raises:
        OSError: it is not.
    """
    if not path.is_file():
        raise OSError("no regular file there")
    if most is not None and path.stat().st_size > most:
        raise OSError(f"{path.stat().st_size} bytes, more than {most}")
    return path


def check_types(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError unless the fields that are there hold values of the right kind, blocks of a name and sizes."""
    wrong = [name for name, kind in TYPES.items() if name in config and not isinstance(config[name], kind)]
    if not wrong and not all(map(_is_block, config["blocks"])):
        wrong = ["blocks"]
    if wrong:
        value = repr(config[wrong[0]])[:60]
        raise ValueError(f"{path} holds a value that does not fit ({wrong[0]} is {value}): get it again")


def _is_block(row: Any) -> bool:
    """Whether it may describe a block, as far as that has to be known before any of its sizes is used."""
    if not isinstance(row, dict) or not isinstance(row.get("name", ""), str):
        return False
    shape = row.get("shape", [])
    return isinstance(shape, list) and not any(isinstance(size, int) and size >= MOST_SIZE for size in shape)


def check_header(path: Path, config: dict[str, Any], basis: str) -> None:
    """Raise ValueError, before memory is taken, where dtypes are wrong or config and file are of another size by far.

    Args:
        basis: how the names of tensors begin that are not the network's.

    Raises:
        SafetensorError, OSError: the file is not readable.
    """
    held = 0
    check_length(path)
    with safe_open(path, "pt") as opened:
        names: list[str] = opened.keys()
        if len(names) > len(config["blocks"]) + MOST_TENSORS:
            raise ValueError(f"tuner weights do not fit their config: {path} holds {len(names)} tensors")
        for name in names:
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"tuner weights {name[:80]!r} are of dtype {part.get_dtype()}, not one of {DTYPES}")
            held += 0 if name.startswith(basis) else torch.Size(part.get_shape()).numel()
    if config["architecture_args"].get("blocks") != len(config["blocks"]):
        return  # refused when it is built
    asked = _asked(config["architecture"], config["architecture_args"])
    if abs(asked - held) > SLACK:
        raise ValueError(f"tuner weights do not fit their config: it is for {asked} numbers, {path} holds {held}")


def check_length(path: Path) -> None:
    """Raise OSError unless a regular file is there, whose header is not larger than a config may be."""
    with check_regular(path).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MOST_TEXT:
        raise OSError(f"a header of {length} bytes, more than {MOST_TEXT}")


def _asked(architecture: str, args: dict[str, Any]) -> int:
    """Numbers of a network, which is built without memory."""
    with suppress(ModuleNotFoundError):  # whatever is unknown is named by who builds it
        import_module(f"l2l.tuners.{architecture}" if architecture.isidentifier() else "l2l.tuners")
    with torch.device("meta"):
        network = build_network(architecture, args)
    return sum(value.numel() for value in network.state_dict().values())


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = sha256()
    with path.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def verify_checksum(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError where the config knows the checksum of the file, and it has another."""
    wanted = config.get(SHA256)
    if wanted is not None and checksum(path) != wanted:
        raise ValueError(f"{path} has changed since it was saved: its sha256 is not {wanted[:80]!r}; get it again")


FORMAT = "l2l-tuner"
FORMAT_VERSION = 3
"""Version 1 had no features (they were ``paper``), no basis, no kinds of blocks, and one normaliser without a name; version 2
had no turns. A tuner without turns is written as version 2, which older releases read."""
FIELDS = (
    *("format_version", "architecture", "architecture_args", "normaliser"),
    *("base_model", "revision", "recipe", "results", "blocks"),
)
FIELDS_SINCE = {2: ("features", "basis"), 3: ("turns",)}
BASIS = "basis."
WEIGHTS, CONFIG, CARD = "tuner.safetensors", "config.json", "README.md"


UNFIT = (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""What values of a wrong kind lead to. RuntimeError: torch makes no such tensor."""


def bundled_folder() -> Path:
    """Where the tuners that come with the project lie: in the checkout, or inside the installed package."""
    package = Path(__file__).parent.parent
    checkout = package.parent / "pretrained_tuners"
    return checkout if checkout.is_dir() else package / "pretrained_tuners"


def save(tuner: Tuner, directory: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a tuner; all files are complete before they take their names, the config last.

    Args:
        dtype: of the network's tensors on disk; None: float32, in which it computes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(dtype or value.dtype).contiguous() for name, value in tuner.network.state_dict().items()
    }
    weights |= {BASIS + name: vectors for name, vectors in (tuner.basis or {}).items()}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as folder:
        files = [Path(folder) / name for name in (WEIGHTS, CARD, CONFIG)]
        safetensors.torch.save_file(weights, files[0], {"format": FORMAT})
        config = to_config(tuner) | {SHA256: checksum(files[0])}
        files[1].write_text(render(tuner, config))
        files[2].write_text(json.dumps(config, indent=1) + "\n")
        for file in files:
            file.chmod(0o644)  # safetensors writes for its owner only
            file.replace(directory / file.name)
    return directory


def to_config(tuner: Tuner) -> dict[str, Any]:
    """Everything about a tuner but its weights, as JSON values."""
    return {
        "format": FORMAT,
        "format_version": 2 if tuner.block_schedule is None else FORMAT_VERSION,
        "architecture": tuner.architecture,
        "architecture_args": tuner.architecture_args,
        "features": tuner.feature_set,
        "normaliser": normalizer_config(tuner.normalizer),
        **asdict(tuner.provenance),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
        "basis": ranks(tuner.basis or {}),
        **({} if tuner.block_schedule is None else {"turns": schedule_config(tuner.block_schedule)}),
        **({"fingerprint": tuner.fingerprint.identity()} if tuner.fingerprint.identity() else {}),
        "blocks": _block_list(tuner.fingerprint),
    }


def _block_list(prints: Fingerprint) -> list[dict[str, Any]]:
    shapes = zip(prints.names, prints.shapes, strict=True)
    rows: list[dict[str, Any]] = [{"name": name, "shape": list(shape)} for name, shape in shapes]
    if not prints.kinds:
        return rows
    return [row | {"kind": kind} for row, kind in zip(rows, prints.kinds, strict=True)]


def from_config(config: dict[str, Any], basis: dict[str, Tensor] | None = None) -> Tuner:
    """The tuner that :func:`to_config` described, with fresh weights. A config of version 1 is understood as well.

    Raises:
        ValueError: unknown architecture, features or normaliser, or what is given does not fit the blocks.
    """
    config = upgraded(config)
    architecture, args, blocks = config["architecture"], config["architecture_args"], config["blocks"]
    if args["blocks"] != len(blocks):
        raise ValueError(f"the tuner's config lists {len(blocks)} blocks for {args['blocks']} networks: get it again")
    found = basis or {}
    if {name: vectors.shape[-1:] for name, vectors in found.items()} != {n: (r,) for n, r in config["basis"].items()}:
        raise ValueError(f"the tuner's config lists a basis for {len(config['basis'])} blocks that is not there")
    names, shapes = tuple(block["name"] for block in blocks), tuple(tuple(block["shape"]) for block in blocks)
    kinds, identity = tuple(block["kind"] for block in blocks if "kind" in block), config.get("fingerprint", {})
    ties = tuple(tuple(group) for group in identity["ties"]) if identity else None
    return Tuner(
        build_network(architecture, args),
        Fingerprint(names, shapes, kinds, ties, identity.get("weights")),
        build_normalizer(**config["normaliser"]),
        architecture,
        args,
        Provenance(config["base_model"], config["revision"], config["recipe"], config["results"]),
        config["features"],
        found,
        build_schedule(config["turns"]),
    )


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """The config as this version would have written it."""
    if config["format_version"] >= 2:
        return {"turns": {}} | config
    first = {"features": "paper", "basis": {}, "turns": {}}
    return config | first | {"normaliser": {"name": "energy", **config["normaliser"]}}


def load(name: str | Path, revision: str | None = None) -> Tuner:
    """Load a tuner from a directory, by the name of a bundled one (``l2l-tiny``, ``l2l/tiny``), or from the hub.

    Raises:
        FileNotFoundError: there is none of that name; what was looked for is said.
        ValueError: a file is missing, corrupted, or of another format.
    """
    directory = locate(str(name), revision)
    config = read_config(directory / CONFIG)
    try:
        weights, basis = _read_weights(directory / WEIGHTS, config)
        tuner = from_config(config, basis)
    except UNFIT as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:300]  # torch adds where it was
        raise ValueError(f"{directory / CONFIG} holds a value that does not fit ({line}): get it again") from error
    load_weights(tuner, weights)
    verify_checksum(directory / WEIGHTS, config)
    return tuner


def _read_weights(path: Path, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's tensors, and the basis by block."""
    try:
        check_header(path, config, BASIS)
        found = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): get it again") from error
    basis = {name.removeprefix(BASIS): value for name, value in found.items() if name.startswith(BASIS)}
    return {name: value for name, value in found.items() if not name.startswith(BASIS)}, basis


def read_config(path: Path) -> dict[str, Any]:
    """A tuner's config, of any version; its fields are there and of the right kinds.

    Raises:
        ValueError: it is not readable, of a newer version, or a field is missing or of another kind.
    """
    try:
        config = json.loads(check_regular(path, MOST_TEXT).read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither JSON nor text
        raise ValueError(f"{path} is not a readable tuner config ({error}): get it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} is not an l2l tuner: its 'format' is not {FORMAT!r}")
    number = config.get("format_version", 1)
    if not isinstance(number, int) or not 1 <= number <= FORMAT_VERSION:
        raise ValueError(f"{path} has format version {number}; this l2l reads 1 to {FORMAT_VERSION}: upgrade l2l")
    needed = (*FIELDS, *(field for since, fields in FIELDS_SINCE.items() if number >= since for field in fields))
    missing = [field for field in needed if field not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: the file is incomplete, get it again")
    check_types(path, config)
    return config


def locate(name: str, revision: str | None = None) -> Path:
    """The directory of a tuner by its path, its bundled name or its hub id; fetched from the hub where it must be.

    Raises:
        FileNotFoundError: there is none of that name; what was looked for is said.
    """
    bundled = bundled_folder() / name.replace("/", "-")
    known = (bundled / CONFIG).is_file()
    if Path(name).is_dir() and not (
        known and not (Path(name) / WEIGHTS).exists()
    ):  # the model may lie under its tuner's name
        return Path(name)
    if known:
        return bundled
    registered = import_module("l2l.tuners.sources").located(name) if revision is None else None
    if registered is not None:
        return registered
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        have = sorted(path.parent.name for path in bundled_folder().glob(f"*/{CONFIG}"))
        raise FileNotFoundError(
            f"no tuner {name!r}: it is not a directory, not bundled ({', '.join(have) or 'none'}), not in a "
            "registry (`l2l tuners list`), and not a hub id"
        )
    return import_module("l2l.tuners.sources").hub_folder(name, revision)


def edit_card(
    directory: Path,
    results: Path | None = None,
    label: str | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write a tuner's config and card anew; the card's path.

    Args:
        directory: of the tuner.
        results: ``meta_evaluate.json``, or the ``summary.json`` of ``l2l tuners test``.
        label: what the evaluation calls the tuner; None: the contender of the folder's name, or the only one.
        licence: of the tuner's weights, as the hub names licences.
        base_model: id by which others know the model, where the tuner was learned from a directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no tuner, a value does not fit, or the file says nothing of this tuner and model.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{str(directory)!r} is no directory: `l2l tuners card` changes tuners in a directory")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise ValueError(f"licence is {licence!r}; give one name without spaces, such as MIT or Apache-2.0")
    tuner, config = load(directory), read_config(directory / CONFIG)
    if licence is not None:
        config["recipe"]["licence"] = licence
    if base_model is not None:
        config["base_model"] = base_model
    if results is not None:
        known = config["results"], results, directory.resolve().name, config["base_model"], label
        config["results"] = with_results(*known)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as folder:
        card, kept = (Path(folder) / name for name in (CARD, CONFIG))
        card.write_text(render(tuner, upgraded(config)))
        kept.write_text(json.dumps(config, indent=1) + "\n")
        for file in (card, kept):
            file.chmod(0o644)
            file.replace(directory / file.name)
    return directory / CARD
