"""Loading a language model and its tokenizer (embedded, directory, gguf file, or hub id); quantising and freezing its parts."""

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from safetensors import SafetensorError

from l2l.arguments import plain
from l2l.models.heads import virtual_tokens
from l2l.models.kinds import auto_class, kind_of_config
from l2l.models.kinds import kind_of as kind_of
from l2l.models.kinds import unwrapped as unwrapped
from l2l.models.offload import check_offload, offload_layers
from l2l.models.schemes import CONFIG, adapter_base, seeded, with_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "l2l/tiny"
"""Id of the model that ships inside the package."""

GGUF = ".gguf"
"""How files in the format of llama.cpp end."""

PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of ``device_map`` that name no device."""

logger = logging.getLogger(__name__)
_EMBEDDED_DIR = Path(__file__).parent / "tiny"
_LONGEST_DEFAULT = 2048

DTYPES: dict[str, torch.dtype] = {
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
}


@dataclass(frozen=True)
class ModelIdentity:
    """Source of a model: hub id, directory, gguf file or ``l2l/tiny``, empty for one built in memory; commit of the hub."""

    id: str
    revision: str | None


def load_model(
    name_or_path: str | Path,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    head: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    num_labels: int | None = None,
    seed: int = 0,
    quantize: "Quantize" = "none",
    offload: bool = False,
) -> "PreTrainedModel":
    """Load a language model in eval mode. Code that comes with a checkpoint is run only where the caller says so.

    Args:
        name_or_path: ``l2l/tiny``, a directory with ``config.json``, or an id of the hub. A directory with
            ``adapter_config.json`` gives the base that it names, and the adapter. A gguf file, by its path or on the hub as
            ``owner/name/file.gguf``, is dequantised: its weights are then like any others, to train and to save.
        dtype: ``float32`` (default), ``bfloat16`` or ``float16`` (or ``fp32``, ``bf16``, ``fp16``) of the weights, whatever
            the checkpoint holds.
        device: ``None`` leaves it on the CPU.
        revision: branch, tag or commit of the hub.
        attn_implementation: ``eager``, ``sdpa``, … as transformers names them; ``None`` lets it choose.
        head: ``causal``, ``masked``, ``seq2seq`` or ``classifier`` (see :mod:`l2l.models.kinds`); ``auto``: what the
            checkpoint was saved from. A classifier may be loaded from any checkpoint: its head is then fresh.
        device_map: ``auto``, ``balanced``, … spreads the layers over devices, which needs ``accelerate``.
        trust_remote_code: run the Python code that comes with the checkpoint. It can do whatever you can.
        num_labels: labels of a fresh head of a classifier; one that the checkpoint holds keeps its own number.
        seed: of a fresh head's random weights; the global random state is not touched.
        quantize: a :data:`Quantize`: the linear layers are kept in 4 or 8 bits and cannot be trained. ``none``: they are not.
        offload: keep the layers in the host's memory, and each on ``device`` only while it computes; see
            :mod:`l2l.models.offload`.

    Raises:
        FileNotFoundError: no such directory or file, no ``config.json`` in it, or neither in the local cache nor to be fetched.
        ValueError: a gguf file that is not readable, or no ``gguf`` package to read it; an unknown dtype or head, both
            ``device`` and ``device_map``, a model type that transformers cannot load without foreign code, or a checkpoint
            that lacks weights of the model other than a fresh head's.
    """
    import transformers
    from transformers.utils.hub import extract_commit_hash

    dtype, num_labels, seed = str(plain(dtype)), plain(num_labels), plain(seed)
    if offload:
        check_offload(device)
        check_device(device)
        if device_map is not None or quantize != "none":
            raise ValueError("offload does not go with device_map or quantize: leave one of them out")
        rest = (revision, attn_implementation, head, None, trust_remote_code, num_labels, seed)
        model = load_model(name_or_path, dtype, None, *rest)
        offload_layers(model, device or "cpu")
        return model
    adapter = adapter_base(name_or_path)
    if adapter is not None:
        if head == "auto":
            head, num_labels = adapter.head, adapter.num_labels or num_labels
        rest = (head, device_map, trust_remote_code, num_labels, seed, quantize)
        base = load_model(adapter.name, dtype, device, adapter.revision, attn_implementation, *rest)
        adapted = with_adapter(base, name_or_path)
        held = getattr(adapted.active_peft_config, "modules_to_save", None) or ()
        there = {part.rpartition(".")[2] for part, _ in base.named_modules()}
        absent = [part for part in held if part.rpartition(".")[2] not in there]
        if absent:
            raise ValueError(
                f"the adapter in {str(name_or_path)!r} holds a head {absent[0]!r} that {type(base).__name__} has not; "
                "load it with head=classifier and num_labels as it was trained"
            )
        return adapted
    if device is not None and device_map is not None:
        raise ValueError(f"device={str(device)!r} and device_map={device_map!r} are both given; leave one out")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    check_device(device)
    if isinstance(device_map, str) and device_map not in PLACEMENTS:
        check_device(device_map)
    options: dict[str, Any] = {"dtype": DTYPES[str(dtype)], "output_loading_info": True}
    gguf = gguf_path(name_or_path, revision)
    stored = "" if gguf is None else stored_types(gguf)
    if gguf is not None and quantize != "none":
        raise ValueError(
            f"quantize={quantize!r} does not go with the gguf file {str(name_or_path)!r}: leave it out, or give the directory "
            "to which the dequantised model was saved"
        )
    if quantize != "none":
        options["quantization_config"] = quantization_config(quantize, DTYPES[str(dtype)])
        device_map, device = device_map or str(device or "cpu"), None  # quantised layers cannot be moved afterwards
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = device_map
    code = {"trust_remote_code": trust_remote_code}
    config = _load(transformers.AutoConfig, "model", name_or_path, revision, code)
    kind = kind_of_config(config, head)
    fresh = kind == "classifier" != kind_of_config(config)
    if fresh and num_labels is not None:
        options["num_labels"] = num_labels
    if gguf is not None:  # parsing its tokenizer again takes seconds, so the config is passed on
        config.num_labels = options.pop("num_labels", config.num_labels)
        options["config"] = config
        if hasattr(transformers, "GgufConfig"):  # of versions that may leave weights packed
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with seeded(seed) if fresh else nullcontext():
        model, info = _load(auto_class(kind), "model", name_or_path, revision, options | code)
    missing = set(info["missing_keys"])
    if fresh:  # what the class of the checkpoint does not have is the head
        prefix = f"{model.base_model_prefix}."
        saved_from = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            held = (model.base_model if saved_from is None else saved_from(config)).named_parameters()
        names = {name.removeprefix(prefix) for name, _ in held}
        missing -= {name for name, _ in model.named_parameters() if name.removeprefix(prefix) not in names}
    if missing:
        # transformers fills the gap with random numbers and only warns.
        raise ValueError(
            f"checkpoint {str(name_or_path)!r} lacks {len(missing)} weights of {type(model).__name__}, "
            f"the first being {min(missing)!r}; it was saved from {', '.join(config.architectures or ['another class'])}"
        )
    if gguf is not None:
        if hasattr(model, "hf_quantizer"):  # nothing is quantised any more, and a model marked so cannot be saved
            model.hf_quantizer.remove_quantization_config(model)
        local = Path(name_or_path).expanduser().is_file()
        model.config._name_or_path = str(gguf if local else name_or_path)
        model.config._commit_hash = None if local else extract_commit_hash(str(gguf), None)
        model.config.architectures = [type(model).__name__]
        logger.warning("%s: dequantised from %s to %s", name_or_path, stored, str(DTYPES[str(dtype)]).removeprefix("torch."))
    return (model if device is None else model.to(device)).eval()


def check_device(device: torch.device | str | None) -> None:
    """Raise ValueError unless torch can put tensors on the device."""
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("its tensors have no memory")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch says it in each of these ways
        why = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        kind = torch.accelerator.current_accelerator(check_available=True) if hasattr(torch, "accelerator") else None
        there = "cpu" if kind is None else f"cpu, {kind.type}"
        raise ValueError(f"device={str(device)!r} is none that torch can use here ({why}); use {there}") from error


def check_measured(device: str | None) -> None:
    """Raise ValueError unless torch can use the device, and tells what memory is in use there."""
    check_device(device)
    if torch.device(device or "cpu").type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} tells no figures of its memory; use cpu")


def gguf_path(name_or_path: str | Path, revision: str | None = None) -> Path | None:
    """The file of a model in the gguf format, fetched where the hub's ``owner/name/file.gguf`` is given; None for others.

    Raises:
        FileNotFoundError: there is no such file, or it is neither in the local cache nor to be fetched.
        ValueError: the ``gguf`` package is not installed.
    """
    source = str(name_or_path)
    path = Path(source).expanduser()
    if path.suffix != GGUF or path.is_dir():
        return None
    if find_spec("gguf") is None:
        raise ValueError(f"reading {source!r} needs gguf, which is not installed: pip install 'l2l[gguf]'")
    if path.is_file():
        return path
    owner, name, file = (*source.split("/", 2), "", "")[:3]
    if _is_path(name_or_path) or not file:
        raise FileNotFoundError(f"no file {source!r}; give an existing file, or owner/name/file.gguf of the hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))
    except OSError as error:
        raise _absent("gguf file", source, f"{owner}/{name} {file}", revision, error) from error


def stored_types(path: Path) -> str:
    """The types in which a gguf file stores its weights, those of most coordinates first: ``Q4_1, Q8_0``. ValueError where
    the file is not readable to its end."""
    from gguf import GGUFReader

    coordinates: Counter[str] = Counter()
    try:
        for tensor in GGUFReader(path).tensors:
            coordinates[tensor.tensor_type.name] += int(tensor.n_elements)
    except Exception as error:  # its parser takes whatever bytes it finds for lengths, types and text
        raise ValueError(f"{str(path)!r} is no whole gguf file ({_one_line(error)}): fetch it again") from error
    packed = [name for name, _ in coordinates.most_common() if name not in ("F32", "F16", "BF16")]
    return ", ".join(packed or coordinates)


def load_tokenizer(
    name_or_path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model. Where it has no padding token, the end-of-text token is used. Arguments and errors are
    those of :func:`load_model`."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, "tokenizer", name_or_path, revision, {"trust_remote_code": trust_remote_code})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_identity(model: "PreTrainedModel") -> ModelIdentity:
    """The source of a model, by its config."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    if source and Path(source) == _EMBEDDED_DIR:
        return ModelIdentity(EMBEDDED, None)
    return ModelIdentity(source, getattr(model.config, "_commit_hash", None))


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The directory on this machine of a model by its identity: given, embedded, or in the hub's cache; None: there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = _EMBEDDED_DIR if name == EMBEDDED else Path(name)
    if path.is_dir():
        return path
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def context_length(model: "PreTrainedModel", asked: int | None = None) -> int:
    """Most tokens a row may have: ``asked``; by default as many as the model has positions, at most 2048. ValueError where
    ``asked`` is below 2 or more than the model has positions."""
    limit, positions = None, getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int):
        words = model.get_input_embeddings()
        tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words)
        # A table with a padding row counts its positions from the row after that one.
        padded = (table.padding_idx for table in tables if table.num_embeddings == positions)
        limit = positions - max((index + 1 for index in padded if index is not None), default=0) - virtual_tokens(model)
    if asked is None:
        return min(limit or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
    if asked < 2 or (limit is not None and asked > limit):
        raise ValueError(f"max_length {asked} must lie in 2..{limit or 'any'}, the positions of the model")
    return asked


def _load(auto: Any, what: str, name_or_path: str | Path, revision: str | None, options: dict[str, Any]) -> Any:
    """``auto.from_pretrained`` with one-line errors."""
    source = str(name_or_path)
    path, gguf = Path(source).expanduser(), gguf_path(name_or_path, revision)
    if source == EMBEDDED:
        source = str(_EMBEDDED_DIR)
    elif gguf is not None:
        source, revision, options = str(gguf.parent), None, options | {"gguf_file": gguf.name}
    elif path.is_dir():
        if not (path / "config.json").is_file() and not (path / CONFIG).is_file():
            raise FileNotFoundError(f"directory {source!r} has no config.json; give a directory saved by save_pretrained")
        source = str(path)
    elif _is_path(name_or_path) or source.count("/") > 1:
        raise FileNotFoundError(f"no directory {source!r}; give an existing directory or an id of the hub (owner/name)")
    malformed: tuple[type[Exception], ...] = (ValueError, ImportError, SafetensorError)
    if gguf is not None:  # an architecture without a mapping, metadata that lack a key, tensors of other shapes
        malformed += (NotImplementedError, KeyError, RuntimeError)
    try:
        return auto.from_pretrained(source, revision=revision, **options)
    except OSError as error:
        if Path(source).is_dir():
            raise FileNotFoundError(f"cannot read the {what} in directory {source!r}: {_one_line(error)}") from error
        raise _absent(what, source, source, revision, error) from error
    except malformed as error:
        raise ValueError(f"cannot load the {what} {str(name_or_path)!r}: {_one_line(error)}") from error


@contextmanager
def loading_bar(visible: bool) -> Iterator[None]:
    """Whether transformers shows how far it is in reading a checkpoint, on a terminal, while the block runs."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    (bars.enable_progress_bar if visible and shown and sys.stderr.isatty() else bars.disable_progress_bar)()
    try:
        yield
    finally:
        (bars.enable_progress_bar if shown else bars.disable_progress_bar)()


def _is_path(name_or_path: str | Path) -> bool:
    """Whether it can be nothing on the hub."""
    return isinstance(name_or_path, Path) or name_or_path.startswith((".", "~", os.sep))


def _absent(what: str, source: str, download: str, revision: str | None, error: Exception) -> FileNotFoundError:
    """The error for what is neither here nor on the hub."""
    at, pinned = (f" at revision {revision!r}", f" --revision {revision}") if revision else ("", "")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return FileNotFoundError(
        f"{what} {source!r}{at} is neither in the local cache nor can it be fetched{offline}: {_one_line(error)}; "
        f"run `hf download {download}{pinned}` where there is a network, or give a directory"
    )


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


Quantize: TypeAlias = Literal["none", "bnb4", "bnb8", "torchao-int8"]
"""``bnb4``: NF4 of bitsandbytes with double quantisation (arXiv:2305.14314). ``bnb8``: LLM.int8 of bitsandbytes
(arXiv:2208.07339). ``torchao-int8``: int8 weights of torchao, one scale per row."""

_PACKAGES = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "torchao-int8": "torchao"}


def check_quantize(quantize: str, scheme: str | None = None) -> None:
    """ValueError, before a model is loaded: an unknown format, a scheme that trains the weights to be quantised, or a package
    that is not installed."""
    if quantize not in get_args(Quantize):
        raise ValueError(f"quantize is {quantize!r}; use one of {', '.join(get_args(Quantize))}")
    if quantize == "none":
        return
    if scheme == "full":
        raise ValueError(
            f"quantize={quantize!r} freezes the weights that scheme 'full' trains: use scheme lora, or leave quantize out"
        )
    package = _PACKAGES[quantize]
    if find_spec(package) is None:
        raise ValueError(f"quantize={quantize!r} needs {package}, which is not installed: pip install 'l2l[quant]'")


def quantization_config(quantize: str, dtype: torch.dtype) -> Any:
    """The ``quantization_config`` of ``from_pretrained`` for layers that compute in ``dtype``."""
    import transformers

    check_quantize(quantize)
    if quantize == "bnb4":
        nf4: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)
    if quantize == "bnb8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    quantization: Any = import_module("torchao.quantization")  # an extra: may be absent where types are checked
    return transformers.TorchAoConfig(quant_type=quantization.Int8WeightOnlyConfig())


def check_pattern(freeze: str | None) -> None:
    """Raise ValueError where the pattern is no regular expression."""
    try:
        re.compile(freeze or "")
    except re.error as error:
        raise ValueError(f"freeze={freeze!r} is no regular expression: {error}") from error


def freeze_matching(model: torch.nn.Module, freeze: str | None) -> list[torch.nn.Parameter]:
    """Freeze the parameters whose name the regular expression finds. Returns those that were trainable, for :func:`thaw`.
    ValueError where it finds no parameter, or leaves none to train."""
    if freeze is None:
        return []
    found = [parameter for name, parameter in model.named_parameters() if re.search(freeze, name)]
    if not found:
        raise ValueError(f"freeze={freeze!r} finds no parameter; names look like {next(model.named_parameters())[0]!r}")
    changed = [parameter for parameter in found if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        thaw(changed)
        raise ValueError(f"freeze={freeze!r} finds every trainable parameter: nothing would be trained")
    return changed


def thaw(parameters: list[torch.nn.Parameter]) -> None:
    """Make parameters trainable again."""
    for parameter in parameters:
        parameter.requires_grad_(True)
