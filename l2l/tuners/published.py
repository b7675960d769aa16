"""Tuners published as pickles of whole modules: read without executing anything, kept bit for bit, saved as ours.

Such a file is a zip that ``torch.save`` wrote. Its pickle describes a mapping from the names of a model's blocks to
``Sequential(Linear(5, 64), Tanh(), Linear(64, 1))`` (ZO Fine-tuner, arXiv:2510.00419). The standard library's disassembler
gives the instructions of the pickle; a stack machine here gives each a meaning of its own, in plain values: classes stay
names, nothing is imported, called or built. Any instruction or name that a module of linear layers does not need is refused.
A restricted ``pickle.Unpickler`` would be shorter, but allocates whatever sizes the file asks for.
"""

import io
import pickletools
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.io import save
from l2l.tuners.model import Provenance, TunerModel, load_weights
from l2l.tuners.networks import PerBlockMLP
from l2l.tuners.normalize import EnergyNormalizer

MAX_BYTES = 64 << 20
"""Of a file that is read: about 25 times the largest published tuner."""
MAX_PICKLE = 4 << 20
"""Bytes of its pickle: about four times that of a tuner of 772 blocks."""
MAX_DEPTH = 20_000
"""Values on the stack; a mapping is written in groups of 1000 entries."""
MAX_BLOCKS = 100_000
ENTRIES = re.compile(r"data\.pkl|byteorder|version|data/\d+|\.data/serialization_id|\.format_version|\.storage_alignment")
"""Names that entries of the zip may have below its folder."""
FOLDER = re.compile(r"(?!\.)[\w.\-]{1,200}")
BLOCK_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
UNREADABLE = (zipfile.BadZipFile, struct.error, EOFError, OSError, ValueError, RuntimeError, OverflowError, IndexError)
"""Raised by the standard library at a broken zip file; NotImplementedError is a RuntimeError."""

MODULES = SEQUENTIAL, LINEAR, TANH = tuple(
    f"torch.nn.modules.{name}" for name in ("container Sequential", "linear Linear", "activation Tanh")
)
"""Classes that a module may be of. Their code is never run."""
STORAGES = {"torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16}
HIDDEN, INPUTS = 64, 5
LAYERS = [("0", LINEAR), ("1", TANH), ("2", LINEAR)]
SHAPES = {("0", "weight"): (HIDDEN, INPUTS), ("0", "bias"): (HIDDEN,), ("2", "weight"): (1, HIDDEN), ("2", "bias"): (1,)}
"""Tensors of each block's module: layer, name, shape."""
NO_LICENCE = "unknown: the file states none; ask its authors before passing it on"
NOT_RECORDED = "not recorded; distances are from what blocks that started alike have in common"

_LLAMA = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_OPT = ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "word_embed_proj_dim")


def _shape(model_type: str, names: tuple[str, ...], sizes: tuple[int, ...], vocab_size: int, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **dict(zip(names, sizes, strict=True)), "vocab_size": vocab_size, **more}


KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.2-1B": _shape("llama", _LLAMA, (2048, 8192, 16, 32, 8), 128256, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B": _shape("llama", _LLAMA, (4096, 14336, 32, 32, 8), 128256, tie_word_embeddings=False),
    "facebook/opt-30b": _shape("opt", _OPT, (7168, 28672, 48, 56, 7168), 50272, max_position_embeddings=2048),
    "Qwen/Qwen2.5-14B": _shape("qwen2", _LLAMA, (5120, 13824, 48, 40, 8), 152064, tie_word_embeddings=False),
}
"""Models of published tuners: hub id -> the fields of its transformers config that decide names and shapes of blocks."""


def known_config(base_model: str):
    """The transformers config of a model of :data:`KNOWN_MODELS`, case aside; ValueError for any other."""
    from transformers import AutoConfig

    fields = {name.lower(): dict(found) for name, found in KNOWN_MODELS.items()}.get(base_model.lower())
    if fields is None:
        raise ValueError(
            f"the blocks of {base_model!r} are not known here: {', '.join(KNOWN_MODELS)} are. Of another model, name a "
            "directory or hub id whose config tells them, as --model"
        )
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def known_fingerprint(base_model: str) -> Fingerprint:
    """Blocks of a model of :data:`KNOWN_MODELS`, from its config, without memory; ValueError for any other."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return Fingerprint.of(AutoModelForCausalLM.from_config(known_config(base_model)))


@dataclass(frozen=True)
class Published:
    """Contents of a published file."""

    saved_as: str
    """Name of the folder of all entries: the file's name when it was saved."""
    sha256: str
    bytes: int
    dtype: torch.dtype
    names: tuple[str, ...]
    """Of its blocks, in the order of the file."""
    weights: dict[str, torch.Tensor]
    """The network's tensors as ``per_block_mlp`` stacks them, one row per name, in the file's dtype."""


def read_published(path: Path) -> Published:
    """Read a published file. Its classes are names that are compared, never code that is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, too large, or anything else than a mapping from block names to these modules.
    """
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"no file {str(path)!r}: give the path of a tuner that torch saved")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: give the path of a tuner that torch saved")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_BYTES} that a tuner may have")
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as opened:
            folder = _checked_folder(opened.infolist(), len(data))
            entries = {info.filename[len(folder) + 1 :]: opened.read(info) for info in opened.infolist()}
    except UNREADABLE as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a readable torch file ({line}): get it again") from error
    if entries.get("byteorder", b"little") != b"little" or "data.pkl" not in entries:
        raise ValueError(f"{path} is not a readable torch file (no pickle, or other byte order): get it again")
    try:
        views = _views(_interpret(entries["data.pkl"]))
        rows: dict[tuple[str, str], list[torch.Tensor]] = {place: [] for place in SHAPES}
        for (name, found), place in product(views.items(), SHAPES):
            held = entries.get(f"data/{found[place].storage.key}", b"")
            rows[place].append(_tensor(found[place], held, f"{'.'.join(place)} of {name!r}"))
    except ValueError as error:
        raise ValueError(f"{path} is not a tuner as published ones are: {error}") from error
    first_weight, first_bias, *second = (torch.stack(rows[place]) for place in SHAPES)
    weights = {"first_weight": first_weight, "first_bias": first_bias}
    weights |= {f"second_{name}": value[:, 0].contiguous() for name, value in zip(("weight", "bias"), second, strict=True)}
    return Published(folder, sha256(data).hexdigest(), len(data), first_weight.dtype, tuple(views), weights)


def _checked_folder(infos: list[zipfile.ZipInfo], size: int) -> str:
    """The folder of all entries; only names that torch writes, uncompressed, are accepted. Nothing is unpacked to disk."""
    name = infos[0].filename.partition("/")[0] if infos else ""
    if not FOLDER.fullmatch(name):
        raise ValueError(f"its entries are in {name[:80]!r}, which is no plain folder")
    for info in infos:
        if not info.filename.startswith(f"{name}/") or not ENTRIES.fullmatch(info.filename[len(name) + 1 :]):
            raise ValueError(f"its entry {info.filename[:80]!r} has no place in a torch file")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"its entry {info.filename[:80]!r} is compressed or encrypted, which torch never does")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"its entry {info.filename[:80]!r} is a symbolic link")
    if len({info.filename for info in infos}) < len(infos) or sum(info.file_size for info in infos) > size:
        raise ValueError("its entries overlap")
    return name


@dataclass(frozen=True)
class _Name:  # of a class or function
    text: str


@dataclass(frozen=True)
class _Storage:  # an entry of the zip that holds numbers
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _View:  # a tensor, as a view of a storage
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class _Module:
    kind: str
    state: dict[str, Any] = field(default_factory=dict)


def _interpret(code: bytes) -> Any:
    """The value that a pickle of torch describes: mappings, plain values, and the classes above."""
    if len(code) > MAX_PICKLE:
        raise ValueError(f"its pickle has {len(code)} bytes, more than the {MAX_PICKLE} that are read")
    stack: list[Any] = []
    marks: list[int] = []  # positions on the stack
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    try:
        for operation, given, _ in pickletools.genops(code):
            argument: Any = given
            match operation.name:
                case "STOP":
                    if len(stack) != 1:
                        raise ValueError(f"its pickle ends with {len(stack)} values, not 1")
                    return stack[0]
                case name if name in _EMPTY:
                    stack.append(_EMPTY[name]())
                case name if name in _VALUES:
                    stack.append(_VALUES[name])
                case "BININT" | "BININT1" | "BININT2" | "BINUNICODE":
                    stack.append(argument)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    if argument not in (*MODULES, *STORAGES, *_CALLS):
                        raise ValueError(f"its pickle names {argument.replace(' ', '.')!r}, which no tuner needs")
                    stack.append(_Name(argument))
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
                case "SETITEM" | "SETITEMS" as name:
                    values = since_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                    target, keys = stack[-1], values[::2]
                    if not isinstance(target, dict) or len(values) % 2 or not all(isinstance(key, str) for key in keys):
                        raise ValueError("its pickle fills something that is no mapping from names")
                    if len(set(keys)) < len(keys) or target.keys() & set(keys):
                        raise ValueError("its pickle gives a name twice")
                    target.update(zip(keys, values[1::2], strict=True))
                case "BINPERSID":
                    kind, dtype, key, _, numel = stack.pop()
                    known = isinstance(dtype, _Name) and dtype.text in STORAGES
                    if kind != "storage" or not known or not isinstance(key, str) or not _is_size(numel):
                        raise ValueError("its pickle refers to something beside it that is no storage of numbers")
                    stack.append(_Storage(key, STORAGES[dtype.text], numel))
                case "REDUCE":
                    arguments, called = stack.pop(), stack.pop()
                    if not isinstance(called, _Name) or called.text not in _CALLS or not isinstance(arguments, tuple):
                        raise ValueError(f"its pickle calls {getattr(called, 'text', 'something that is no function')!r}")
                    stack.append(_CALLS[called.text](arguments))
                case "NEWOBJ":
                    arguments, kind = stack.pop(), stack.pop()
                    if not isinstance(kind, _Name) or kind.text not in MODULES or arguments != ():
                        raise ValueError(f"its pickle makes a new {getattr(kind, 'text', 'something that is no class')!r}")
                    stack.append(_Module(kind.text))
                case "BUILD":
                    state, module = stack.pop(), stack[-1]
                    if not isinstance(module, _Module) or module.state or not isinstance(state, dict):
                        raise ValueError("its pickle gives a state to something that is no new module")
                    module.state = state
                case name if name != "PROTO":
                    raise ValueError(f"its pickle uses {name}, which no module of linear layers needs")
            if len(stack) > MAX_DEPTH:
                raise ValueError(f"its pickle puts more than {MAX_DEPTH} values on the stack")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its pickle is broken ({type(error).__name__}: {error})") from error
    raise ValueError("its pickle has no end")


def _view(arguments: tuple[Any, ...]) -> _View:
    storage, offset, shape, stride = arguments[:4]  # then requires_grad and hooks, which mean nothing here
    sizes = isinstance(shape, tuple) and isinstance(stride, tuple) and all(map(_is_size, (offset, *shape, *stride)))
    if not isinstance(storage, _Storage) or not sizes:
        raise ValueError("its pickle holds a tensor without a storage, or with sizes that are no whole numbers")
    return _View(storage, offset, shape, stride)


def _parameter(arguments: tuple[Any, ...]) -> _View:
    if not arguments or not isinstance(arguments[0], _View):
        raise ValueError("its pickle holds a parameter that is no tensor")
    return arguments[0]


def _empty(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments not in ((), ([],)):
        raise ValueError("its pickle fills a mapping or a set in a way that torch does not")
    return {}


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections OrderedDict": _empty,
    "__builtin__ set": _empty,
    "torch._utils _rebuild_tensor_v2": _view,
    "torch._utils _rebuild_parameter": _parameter,
}
"""Functions that the pickle may call, and those of this file that replace them."""
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _views(found: Any) -> dict[str, dict[tuple[str, str], _View]]:
    """The tensors by block and place, if each block has a module of the published form, and all are of one dtype."""
    if not isinstance(found, dict) or not 1 <= len(found) <= MAX_BLOCKS:
        raise ValueError("it holds no mapping from block names to modules")
    views: dict[str, dict[tuple[str, str], _View]] = {}
    for block, module in found.items():
        if not BLOCK_NAME.fullmatch(block) or len(block) > 200:
            raise ValueError(f"{block[:80]!r} is no name of a block")
        parts = module.state.get("_modules") if isinstance(module, _Module) and module.kind == SEQUENTIAL else None
        layers = [(key, getattr(layer, "kind", None)) for key, layer in parts.items()] if isinstance(parts, dict) else []
        if not isinstance(parts, dict) or layers != LAYERS:
            raise ValueError(f"what it holds for block {block!r} is not Sequential(Linear, Tanh, Linear)")
        for (layer, name), wanted in SHAPES.items():
            parameters = parts[layer].state.get("_parameters")
            if not isinstance(parameters, dict) or set(parameters) != {"weight", "bias"}:
                raise ValueError(f"layer {layer} of block {block!r} has not just a weight and a bias")
            view = parameters[name]
            shape = view.shape if isinstance(view, _View) else "no tensor"
            if shape != wanted:
                raise ValueError(f"{layer}.{name} of block {block!r} has shape {shape}, not {wanted}")
            views.setdefault(block, {})[layer, name] = view
    dtypes = {str(view.storage.dtype).removeprefix("torch.") for places in views.values() for view in places.values()}
    if len(dtypes) > 1:
        raise ValueError(f"its numbers are of several dtypes: {', '.join(sorted(dtypes))}")
    return views


def _tensor(view: _View, held: bytes, label: str) -> torch.Tensor:
    dtype, size, shape = view.storage.dtype, prod(view.shape), view.shape
    if len(held) != view.storage.numel * dtype.itemsize or view.offset + size > view.storage.numel:
        raise ValueError(f"{label} lies in a storage of {len(held)} bytes, which does not hold it")
    if view.stride != tuple(prod(shape[i + 1 :]) for i in range(len(shape))):
        raise ValueError(f"{label} is not stored row by row")
    values = torch.frombuffer(bytearray(held), dtype=dtype, offset=view.offset * dtype.itemsize, count=size)
    if not torch.isfinite(values).all():
        raise ValueError(f"{label} is not finite")
    return values.reshape(shape)


def to_tuner(found: Published, base_model: str, fingerprint: Fingerprint, file: str) -> TunerModel:
    """The tuner, computing in float32, for a model of these blocks, its rows in their order; ValueError for other blocks.

    Args:
        file: name of the file that it was read from, for its recipe.
    """
    absent = sorted(set(fingerprint.names) - set(found.names))
    more = sorted(set(found.names) - set(fingerprint.names))
    if absent or more:
        parts = [f"it lacks {len(absent)}: {format_names(absent)}"] if absent else []
        parts += [f"it has {len(more)} others: {format_names(more)}"] if more else []
        raise ValueError(f"the file is no tuner for {base_model!r}: of the model's blocks {'; '.join(parts)}")
    places = {name: row for row, name in enumerate(found.names)}
    rows = torch.tensor([places[name] for name in fingerprint.names])
    args = {"blocks": len(rows), "hidden": HIDDEN, "start": "random"}
    origin: dict[str, Any] = {"file": file, "sha256": found.sha256, "bytes": found.bytes, "saved_as": found.saved_as}
    origin["dtype"] = str(found.dtype).removeprefix("torch.")
    recipe = {"imported_from": origin, "licence": NO_LICENCE, "initialisation": NOT_RECORDED}
    provenance = Provenance(base_model, None, recipe)
    tuner = TunerModel(PerBlockMLP(**args), fingerprint, EnergyNormalizer(), "per_block_mlp", args, provenance)
    load_weights(tuner, {name: value[rows] for name, value in found.weights.items()})
    return tuner


def import_published(file: Path, base_model: str, out: Path, fingerprint: Fingerprint | None = None) -> TunerModel:
    """Import a published file: its numbers bit for bit, with its origin, as a folder that appears whole or not at all.

    Args:
        base_model: hub id of the model that it was trained for.
        out: new or empty directory, else ValueError.
        fingerprint: of that model; None: it is one of :data:`KNOWN_MODELS`.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out} exists and is no empty directory: choose another --out")
    found = read_published(file)
    tuner = to_tuner(found, base_model, fingerprint or known_fingerprint(base_model), file.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".writing-") as folder:
        save(tuner, Path(folder) / "tuner", found.dtype).replace(out)
    return tuner
