"""The zip files that torch writes, opened in memory: only what belongs in one, uncompressed, with right checksums.

Reads what a module pickle describes without doing it: classes stay names, nothing is imported, called or built.

The standard library's disassembler gives the instructions; a stack machine here gives each a meaning of its own, in plain
values. An instruction or a name that a module of linear layers does not need is refused, by name.

The models of published tuners in numbers, so that their blocks are known without a network.

Tuners published as pickles of whole modules: read without executing anything, kept bit for bit, written as ours.

Such a file holds a mapping from the names of a model's blocks to ``Sequential(Linear(5, 64), Tanh(), Linear(64, 1))``
(ZO Fine-tuner, arXiv:2510.00419).
"""

from __future__ import annotations

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
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from l2l.tuners import io as store
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.model import Provenance, Tuner, load_weights
from l2l.tuners.normalize import EnergyNormalizer
from l2l.tuners.per_block_mlp import PerBlockMLP

MOST_BYTES = 64 << 20
"""Of a file that is read: about 25 times the largest published tuner."""
ENTRIES = re.compile(
    r"data\.pkl|byteorder|version|data/\d+|\.data/serialization_id|\.format_version|\.storage_alignment"
)
"""Names that entries may have below the archive's own."""
FOLDER = re.compile(r"(?!\.)[\w.\-]{1,200}")
BROKEN = (zipfile.BadZipFile, struct.error, EOFError, OSError, ValueError, RuntimeError, OverflowError, IndexError)
"""What the standard library raises at a broken zip file; NotImplementedError is a RuntimeError."""


@dataclass(frozen=True)
class Archive:
    """The entries of a torch file, by name."""

    name: str
    """Of the folder that all entries are in: what the file was called when it was saved."""
    entries: dict[str, bytes]
    sha256: str
    bytes: int


def read_archive(path: Path) -> Archive:
    """All entries of a torch file. Nothing is unpacked to disk.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, no file that torch wrote, or damaged.
    """
    data = _whole_file(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as opened:
            name = _checked(opened.infolist(), len(data))
            entries = {info.filename[len(name) + 1 :]: opened.read(info) for info in opened.infolist()}
    except BROKEN as error:
        raise ValueError(f"{path} is not a readable torch file ({_line(error)}): get it again") from error
    if entries.get("byteorder", b"little") != b"little" or "data.pkl" not in entries:
        raise ValueError(f"{path} is not a readable torch file (no pickle, or other byte order): get it again")
    return Archive(name, entries, sha256(data).hexdigest(), len(data))


def _whole_file(path: Path) -> bytes:
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"no file {str(path)!r}: give the path of a tuner that torch saved")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: give the path of a tuner that torch saved")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {MOST_BYTES} that a tuner may have")
    return path.read_bytes()


def _checked(infos: list[zipfile.ZipInfo], size: int) -> str:
    """The folder that all entries are in, if there is nothing odd about them."""
    name = infos[0].filename.partition("/")[0] if infos else ""
    names = [info.filename for info in infos]
    if not FOLDER.fullmatch(name):
        raise ValueError(f"its entries are in {name[:80]!r}, which is no plain folder")
    for info in infos:
        if not info.filename.startswith(f"{name}/") or not ENTRIES.fullmatch(info.filename[len(name) + 1 :]):
            raise ValueError(f"its entry {info.filename[:80]!r} has no place in a torch file")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"its entry {info.filename[:80]!r} is compressed or encrypted, which torch never does")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"its entry {info.filename[:80]!r} is a symbolic link")
    if len(set(names)) < len(names) or sum(info.file_size for info in infos) > size:
        raise ValueError("its entries overlap")
    return name


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


MOST_PICKLE_BYTES = 4 << 20
"""Of a pickle that is read: about four times what a tuner of 772 blocks has."""
MOST_DEPTH = 20_000
"""Of the stack; a mapping is written in groups of 1000 entries."""

SEQUENTIAL, LINEAR, TANH = (
    "torch.nn.modules.container Sequential",
    "torch.nn.modules.linear Linear",
    "torch.nn.modules.activation Tanh",
)
MODULES = (SEQUENTIAL, LINEAR, TANH)
"""Classes that a module may be of. Their code is never run."""
STORAGES = {"torch FloatStorage": "float32", "torch HalfStorage": "float16"}
"""Names of storages, and the dtype of each."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Where numbers lie in the file."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorPlace:
    """A tensor as the file describes it: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Module:
    """A module as the file describes it."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


def read(code: bytes) -> Any:
    """What a pickle that torch wrote describes: mappings, plain values, and the classes of this file.

    Raises:
        ValueError: it is no such pickle, too large, or names something that is not allowed.
    """
    if len(code) > MOST_PICKLE_BYTES:
        raise ValueError(f"its pickle has {len(code)} bytes, more than the {MOST_PICKLE_BYTES} that are read")
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(code):
            if operation.name == "STOP":
                return machine.result()
            machine.step(operation.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its pickle is broken ({type(error).__name__}: {error})") from error
    raise ValueError("its pickle has no end")


@final
class _Machine:
    """The stack, the marks on it, and what was kept by number."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError(f"its pickle ends with {len(self._stack)} values, not 1")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._push(_CONSTANTS[name]())
        elif name in _LITERALS:
            self._push(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._push(self._memo[argument])
        elif name == "GLOBAL":
            self._push(_allowed(argument))
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name != "PROTO":
            raise ValueError(f"its pickle uses {name}, which no module of linear layers needs")

    def _push(self, value: Any) -> None:
        if len(self._stack) >= MOST_DEPTH:
            raise ValueError(f"its pickle puts more than {MOST_DEPTH} values on the stack")
        self._stack.append(value)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def tuple_of(self, count: int | None) -> None:
        values = self._since_mark() if count is None else [self._stack.pop() for _ in range(count)][::-1]
        self._push(tuple(values))

    def set_items(self, one: bool) -> None:
        values = [self._stack.pop(), self._stack.pop()][::-1] if one else self._since_mark()
        target = self._stack[-1]
        keys = values[::2]
        if not isinstance(target, dict) or len(values) % 2 or not all(isinstance(key, str) for key in keys):
            raise ValueError("its pickle fills something that is no mapping from names")
        if len(set(keys)) < len(keys) or target.keys() & set(keys):
            raise ValueError("its pickle gives a name twice")
        target.update(zip(keys, values[1::2], strict=True))

    def storage(self) -> None:
        kind, dtype, key, _, numel = self._stack.pop()
        known = isinstance(dtype, Name) and dtype.text in STORAGES
        if kind != "storage" or not known or not isinstance(key, str) or not _whole(numel):
            raise ValueError("its pickle refers to something beside it that is no storage of numbers")
        self._push(Storage(key, STORAGES[dtype.text], numel))

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Name) or function.text not in _CALLS or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle calls {getattr(function, 'text', 'something that is no function')!r}")
        self._push(_CALLS[function.text](arguments))

    def new(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, Name) or kind.text not in MODULES or arguments != ():
            raise ValueError(f"its pickle makes a new {getattr(kind, 'text', 'something that is no class')!r}")
        self._push(Module(kind.text))

    def build(self) -> None:
        state, module = self._stack.pop(), self._stack[-1]
        if not isinstance(module, Module) or module.state or not isinstance(state, dict):
            raise ValueError("its pickle gives a state to something that is no new module")
        module.state = state


def _allowed(text: str) -> Name:
    if text not in MODULES and text not in STORAGES and text not in _CALLS:
        raise ValueError(f"its pickle names {text.replace(' ', '.')!r}, which no tuner needs")
    return Name(text)


def _tensor_place(arguments: tuple[Any, ...]) -> TensorPlace:
    """Of storage, offset, shape, stride, whether it wants a gradient, hooks: the last two mean nothing here."""
    storage, offset, shape, stride = arguments[:4]
    sizes = isinstance(shape, tuple) and isinstance(stride, tuple) and all(map(_whole, (offset, *shape, *stride)))
    if not isinstance(storage, Storage) or not sizes:
        raise ValueError("its pickle holds a tensor without a storage, or with sizes that are no whole numbers")
    return TensorPlace(storage, offset, shape, stride)


def _parameter(arguments: tuple[Any, ...]) -> TensorPlace:
    if not arguments or not isinstance(arguments[0], TensorPlace):
        raise ValueError("its pickle holds a parameter that is no tensor")
    return arguments[0]


def _empty(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments not in ((), ([],)):
        raise ValueError("its pickle fills a mapping or a set in a way that torch does not")
    return {}


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections OrderedDict": _empty,
    "__builtin__ set": _empty,
    "torch._utils _rebuild_tensor_v2": _tensor_place,
    "torch._utils _rebuild_parameter": _parameter,
}
"""What the file may ask to be called, and the function of this file that stands for it."""
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = ("BININT", "BININT1", "BININT2", "BINUNICODE")
_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": lambda machine: machine.tuple_of(None),
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "SETITEM": lambda machine: machine.set_items(True),
    "SETITEMS": lambda machine: machine.set_items(False),
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
}


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def _sizes(width: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.2-1B": {"model_type": "llama", **_sizes(2048, 8192, 16, 32, 8, 128256, True)},
    "meta-llama/Llama-3.1-8B": {"model_type": "llama", **_sizes(4096, 14336, 32, 32, 8, 128256, False)},
    "facebook/opt-30b": {
        "model_type": "opt",
        "hidden_size": 7168,
        "ffn_dim": 28672,
        "num_hidden_layers": 48,
        "num_attention_heads": 56,
        "word_embed_proj_dim": 7168,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
    },
    "Qwen/Qwen2.5-14B": {"model_type": "qwen2", **_sizes(5120, 13824, 48, 40, 8, 152064, False)},
}
"""Hub id -> the fields of its transformers config that decide names and shapes of blocks; the others are defaults."""


def known_config(base_model: str) -> PreTrainedConfig:
    """The transformers config of a model of :data:`KNOWN_MODELS`, case aside.

    Raises:
        ValueError: it is none of them.
    """
    from transformers import AutoConfig

    fields = {name.lower(): dict(found) for name, found in KNOWN_MODELS.items()}.get(base_model.lower())
    if fields is None:
        raise ValueError(
            f"the blocks of {base_model!r} are not known here: {', '.join(KNOWN_MODELS)} are. Of another model, name a "
            "directory or hub id whose config tells them, as --model"
        )
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a config without memory: names, shapes and ties of its blocks, no numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def known_fingerprint(base_model: str) -> Fingerprint:
    """Blocks of a model of :data:`KNOWN_MODELS`.

    Raises:
        ValueError: it is none of them.
    """
    return Fingerprint.of(skeleton(known_config(base_model)))


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
        prints: blocks of that model; None: it is one of :data:`l2l.tuners.published.KNOWN_MODELS`.

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
