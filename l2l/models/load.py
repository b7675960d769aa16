"""Loading a causal language model and its tokenizer: the embedded one, a directory, or an id of the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "l2l/tiny"
"""Id of the model that ships inside the package."""

_EMBEDDED_DIR = Path(__file__).parent / "tiny"
_LONGEST_DEFAULT = 2048

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class ModelIdentity:
    """What a model was loaded from."""

    id: str
    """Hub id, directory, or ``l2l/tiny``; empty for a model built in memory."""
    revision: str | None
    """Commit of the hub, where known."""


def load_model(
    name_or_path: str | Path,
    dtype: str = "float32",
    device: torch.device | str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model in eval mode. Code that comes with a checkpoint is never run.

    Args:
        name_or_path: ``l2l/tiny``, a directory with ``config.json``, or an id of the hub.
        dtype: ``float32`` (default), ``bfloat16`` or ``float16`` (or ``fp32``, ``bf16``, ``fp16``): the weights
            are converted to it whatever the checkpoint holds.
        device: where to put it; ``None`` leaves it on the CPU.
        revision: branch, tag or commit of the hub.
        attn_implementation: ``eager``, ``sdpa``, … as transformers names them; ``None`` lets it choose.

    Raises:
        FileNotFoundError: no such directory, no ``config.json`` in it, or the model is neither in the local cache
            nor can it be fetched.
        ValueError: an unknown dtype, a model type that transformers cannot load without foreign code, or a
            checkpoint that lacks weights of the model.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model, info = _load(AutoModelForCausalLM, "model", name_or_path, revision, options)
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills the gap with random numbers and only warns.
        raise ValueError(
            f"checkpoint {str(name_or_path)!r} lacks {len(missing)} weights of {type(model).__name__}, "
            f"the first being {missing[0]!r}; it was not saved from a causal language model"
        )
    return (model if device is None else model.to(device)).eval()


def load_tokenizer(name_or_path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Where it has no padding token, the end-of-text token serves.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, "tokenizer", name_or_path, revision, {})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_identity(model: PreTrainedModel) -> ModelIdentity:
    """Where a model came from, as its config tells."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    if source and Path(source) == _EMBEDDED_DIR:
        return ModelIdentity(EMBEDDED, None)
    return ModelIdentity(source, getattr(model.config, "_commit_hash", None))


def context_length(model: PreTrainedModel, asked: int | None = None) -> int:
    """Most tokens a row may have: ``asked``, or by default what the model's positions allow, at most 2048.

    Raises:
        ValueError: ``asked`` is below 2 or more than the model has positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    limit = positions if isinstance(positions, int) else None
    if asked is None:
        return min(limit or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
    if asked < 2 or (limit is not None and asked > limit):
        raise ValueError(f"max_length {asked} must lie in 2..{limit or 'any'}, the positions of the model")
    return asked


def _load(auto: Any, what: str, name_or_path: str | Path, revision: str | None, options: dict[str, Any]) -> Any:
    """``auto.from_pretrained`` with one-line errors."""
    source = _resolve(name_or_path)
    try:
        return auto.from_pretrained(source, revision=revision, trust_remote_code=False, **options)
    except OSError as error:
        if Path(source).is_dir():
            raise FileNotFoundError(f"cannot read the {what} in directory {source!r}: {_one_line(error)}") from error
        raise FileNotFoundError(_absent_message(what, source, revision, error)) from error
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load the {what} {str(name_or_path)!r}: {_one_line(error)}") from error


def _resolve(name_or_path: str | Path) -> str:
    """The directory or hub id to read."""
    name = str(name_or_path)
    if name == EMBEDDED:
        return str(_EMBEDDED_DIR)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"directory {name!r} has no config.json; give a directory saved by save_pretrained")
        return str(path)
    if isinstance(name_or_path, Path) or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise FileNotFoundError(f"no directory {name!r}; give an existing directory or an id of the hub (owner/name)")
    return name


def _absent_message(what: str, source: str, revision: str | None, error: OSError) -> str:
    at = f" at revision {revision!r}" if revision else ""
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return (
        f"{what} {source!r}{at} is neither in the local cache nor can it be fetched{offline}: {_one_line(error)}; "
        f"run `hf download {source}` where there is a network, or give a directory"
    )


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
