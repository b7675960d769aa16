"""Tuners on disk: a folder of ``tuner.safetensors``, ``config.json`` and ``README.md``, inert: nothing in it is executed.

The weights' file holds the network's tensors by name, and ``basis.<block>`` for each block that has a basis. Files are
checked before they take memory, and complete before they take their names.
"""

import hashlib
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
from safetensors import SafetensorError, safe_open

from l2l.report.run_directory import share_as_usual
from l2l.tuners.card import LICENCE, render, with_results
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.model import Provenance, TunerModel, load_weights, ranks
from l2l.tuners.networks import build_network, current_network
from l2l.tuners.normalize import build_normalizer, normalizer_config
from l2l.tuners.plan import build_plan, plan_config
from l2l.tuners.schedule import build_schedule, schedule_config

AnyTuner = TypeVar("AnyTuner", bound=TunerModel)

FORMAT = "l2l-tuner"
FORMAT_VERSION = 4
"""Version 1 had no features (they were ``paper``), no basis, no kinds of blocks, and one normalizer without a name; version
2 had no block schedule, 3 no training plan. Each tuner is written as the first version that has what it has, which older
releases read."""
WEIGHTS, CONFIG, CARD = "tuner.safetensors", "config.json", "README.md"
BASIS = "basis."
"""Prefix of the tensors that are columns of a basis."""
SHA256 = "weights_sha256"
"""Field of the config: checksum of the weights' file. Tuners saved by older releases have none."""
ORIGIN = ("base_model", "revision", "recipe", "results")
FIELDS = ("format_version", "architecture", "architecture_args", "normaliser", *ORIGIN, "blocks")
FIELDS_SINCE = {2: ("features", "basis"), 3: ("turns",), 4: ("plan",)}
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("architecture", "features", "base_model", SHA256), str),
    **dict.fromkeys(("architecture_args", "normaliser", "recipe", "results", "basis", "turns", "plan", "versions"), dict),
    "blocks": list,
    "revision": (str, type(None)),
}
DTYPES = ("F32", "F16", "BF16")
MAX_TEXT = 8 << 20
"""Bytes of a config, and of the header of the weights' file."""
MAX_TENSORS = 64
"""Tensors of a network, beside one per block for its basis."""
MAX_SIZE = 1 << 40
"""Of a block, along one dimension."""
SLACK = 1 << 22
"""Numbers by which config and weights may differ before memory is taken; the exact comparison comes after."""
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
    weights = {name: value.detach().to(dtype or value.dtype).contiguous() for name, value in tuner.network.state_dict().items()}
    weights |= {BASIS + name: vectors for name, vectors in (tuner.basis or {}).items()}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as folder:
        files = [Path(folder) / name for name in (WEIGHTS, CARD, CONFIG)]
        safetensors.torch.save_file(weights, files[0], {"format": FORMAT})
        config = to_config(tuner) | {SHA256: sha256_of(files[0])}
        files[1].write_text(render(tuner, config))
        files[2].write_text(json.dumps(config, indent=1) + "\n")
        share_as_usual(Path(folder))  # safetensors writes for its owner only
        _publish(files, directory)
    return directory


def _publish(files: Iterable[Path], directory: Path) -> None:
    for file in files:
        file.replace(directory / file.name)


def to_config(tuner: TunerModel) -> dict[str, Any]:
    """Everything about a tuner but its weights, as JSON values."""
    identity, schedule, known = tuner.fingerprint.identity(), schedule_config(tuner.block_schedule), tuner.fingerprint
    plan = None if tuner.plan is None else plan_config(tuner.plan)
    kinds = [{"kind": kind} for kind in known.kinds] or [{}] * len(known.names)  # tuners saved without have no kinds
    blocks = [
        {"name": name, "shape": list(shape)} | kind for name, shape, kind in zip(known.names, known.shapes, kinds, strict=True)
    ]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if plan else 3 if schedule else 2,
        "architecture": tuner.architecture,
        "architecture_args": tuner.architecture_args,
        "features": tuner.feature_set,
        "normaliser": normalizer_config(tuner.normalizer),
        **asdict(tuner.provenance),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
        "basis": ranks(tuner.basis or {}),
        **({"turns": schedule} if schedule or plan else {}),
        **({"plan": plan} if plan else {}),
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
        try:
            validate_header(path, config)
            found = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): get it again") from error
        basis = {name.removeprefix(BASIS): found.pop(name) for name in list(found) if name.startswith(BASIS)}
        if given["architecture"] == "fixed" and set(found) == {"sigma"}:  # a table holds its logarithm
            found = {"log_sigma": found["sigma"].abs().log()}
        tuner = _build(config, basis, kind)
    except UNFIT as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:300]  # torch adds a stack
        raise ValueError(f"{directory / CONFIG} holds a value that does not fit ({line}): get it again") from error
    load_weights(tuner, found)
    wanted = given.get(SHA256)
    if wanted is not None and sha256_of(path) != wanted:
        raise ValueError(f"{path} has changed since it was saved: its sha256 is not {wanted[:80]!r}; get it again")
    return tuner


def _build(config: dict[str, Any], basis: dict[str, torch.Tensor], kind: type[AnyTuner]) -> AnyTuner:
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
        Provenance(*(config[name] for name in ORIGIN)),
        config["features"],
        basis,
        build_schedule(config["turns"]),
        build_plan(config["plan"]) if config["plan"] else None,
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
        results: ``meta_evaluate.json``, or the ``summary.json`` of ``l2l tuners test``.
        label: the tuner's label in the evaluation, see :func:`l2l.tuners.card.with_results`.
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
        own_name, base = directory.resolve().name, config["base_model"]
        config["results"] = with_results(config["results"], results, own_name, base, label)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as folder:
        files = [Path(folder) / name for name in (CARD, CONFIG)]
        files[0].write_text(render(tuner, upgraded(config)))
        files[1].write_text(json.dumps(config, indent=1) + "\n")
        _publish(files, directory)
    return directory / CARD


def sha256_of(path: Path) -> str:
    """Checksum of a file: 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def validate_file(path: Path, most: int | None = None) -> Path:
    """The path of a regular file of at most so many bytes; OSError for a directory, device or pipe."""
    if not path.is_file():
        raise OSError("no regular file there")
    if most is not None and path.stat().st_size > most:
        raise OSError(f"{path.stat().st_size} bytes, more than {most}")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """A tuner's config, of any version; ValueError unless all fields of that version are there, each of its type."""
    try:
        config = json.loads(validate_file(path, MAX_TEXT).read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither JSON nor text
        raise ValueError(f"{path} is not a readable tuner config ({error}): get it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} is not an l2l tuner: its 'format' is not {FORMAT!r}")
    number = config.get("format_version", 1)
    if not isinstance(number, int) or not 1 <= number <= FORMAT_VERSION:
        raise ValueError(f"{path} has format version {number}; this l2l reads 1 to {FORMAT_VERSION}: upgrade l2l")
    needed = (*FIELDS, *(field for since, fields in FIELDS_SINCE.items() if number >= since for field in fields))
    if missing := [field for field in needed if field not in config]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: the file is incomplete, get it again")
    wrong = [name for name, kind in TYPES.items() if name in config and not isinstance(config[name], kind)]
    if wrong or not all(map(_is_block, config["blocks"])):
        wrong = wrong or ["blocks"]
        value = repr(config[wrong[0]])[:60]
        raise ValueError(f"{path} holds a value that does not fit ({wrong[0]} is {value}): get it again")
    return config


def _is_block(row: Any) -> bool:
    """Whether the row may be used at all: its sizes are not yet known to be whole numbers."""
    if not isinstance(row, dict) or not isinstance(row.get("name", ""), str):
        return False
    shape = row.get("shape", [])
    return isinstance(shape, list) and not any(isinstance(size, int) and size >= MAX_SIZE for size in shape)


def validate_header(path: Path, config: dict[str, Any]) -> None:
    """Compare the header of the weights' file with its config, before memory is taken: dtypes, and roughly sizes."""
    held = 0
    with validate_file(path).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_TEXT:
        raise OSError(f"a header of {length} bytes, more than {MAX_TEXT}")
    with safe_open(path, "pt") as opened:
        names: list[str] = opened.keys()
        if len(names) > len(config["blocks"]) + MAX_TENSORS:
            raise ValueError(f"tuner weights do not fit their config: {path} holds {len(names)} tensors")
        for name in names:
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"tuner weights {name[:80]!r} are of dtype {part.get_dtype()}, not one of {DTYPES}")
            held += 0 if name.startswith(BASIS) else torch.Size(part.get_shape()).numel()
    if config["architecture_args"].get("blocks") != len(config["blocks"]):
        return  # refused when the tuner is built
    with torch.device("meta"):
        network = build_network(config["architecture"], config["architecture_args"])
    asked = sum(value.numel() for value in network.state_dict().values())
    if abs(asked - held) > SLACK:
        raise ValueError(f"tuner weights do not fit their config: it is for {asked} numbers, {path} holds {held}")


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """The config as this version would have written it."""
    architecture, args = current_network(config["architecture"], config["architecture_args"])
    found = {"turns": {}, "plan": {}} | config | {"architecture": architecture, "architecture_args": args}
    if config["format_version"] == 1:
        found |= {"features": "paper", "basis": {}, "normaliser": {"name": "energy", **config["normaliser"]}}
    return found
