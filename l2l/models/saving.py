"""Saving a model so that it is loaded again: by :func:`l2l.load_model`, and by transformers and peft alone.

What fails at the end of a run fails in :func:`rehearse` before it: a configuration that transformers does not write, weights
that its configuration does not describe, an adapter whose base lies nowhere.
"""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from l2l.models import schemes
from l2l.models.load import EMBEDDED, gguf_path, load_tokenizer, loading_bar, local_folder, model_identity
from l2l.models.streaming import LayerFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPARED = 4096
"""Numbers of each tensor by which a model is compared with the files that it came from: any training moves some of them."""


def save_model(model: Any, tokenizer: "PreTrainedTokenizerBase", target: Path, files: LayerFiles | None = None) -> None:
    """Write a model, or its active adapter, and the tokenizer into a directory.

    An adapter names its base; where that is not what lies under its name (it was built or changed in memory), the base is
    written too, into the folder ``base``.

    Args:
        files: of layers that are not in memory.
    """
    if hasattr(model, "peft_config"):
        base = known_base(model)
        if base is None:
            _save_whole(model, target / schemes.BASE)
            tokenizer.save_pretrained(target / schemes.BASE)
            base = schemes.AdapterBase(str((target / schemes.BASE).resolve()), None)
        schemes.save_adapter(model, target, base)
    elif files is not None:
        files.save(model, target)
    else:
        _save_whole(model, target)
    tokenizer.save_pretrained(target)


def rehearse(model: Any, tokenizer: "PreTrainedTokenizerBase", target: Path) -> None:
    """Do with all but the weights what :func:`save_model` does, and read it again.

    Args:
        target: an empty folder, to be removed afterwards.

    Raises:
        ValueError: saving, or loading what is saved, would fail; the message says why and what to do.
    """
    adapted = hasattr(model, "peft_config")
    try:
        base = known_base(model) if adapted else None
        if adapted:
            schemes.check_adapter(model)
            schemes.save_adapter(model, target, base or schemes.AdapterBase(str(target / schemes.BASE), None))
            schemes.adapter_base(target)
        if base is None:
            whole = target / schemes.BASE if adapted else target
            _save_whole(model, whole, weights=False)
            _check_described(model, whole)
        tokenizer.save_pretrained(target)
        load_tokenizer(target)
    except Exception as error:  # of transformers, peft, tokenizers and the model's own code
        raise ValueError(f"the model could not be saved after training: {_reason(model, error)}") from error


def known_base(model: Any) -> schemes.AdapterBase | None:
    """The base of a model of peft by name, where what lies there is what is in memory; else None.

    None where a model was built in memory, or trained, resized or merged since it was loaded, or has weights in training that
    belong to no adapter. Compared are :data:`COMPARED` numbers of each tensor; of a gguf file, or of files that are not here
    as safetensors, none.
    """
    if any(parameter.requires_grad and not schemes.of_adapter(model, name) for name, parameter in model.named_parameters()):
        return None
    source = model_identity(model)
    if not source.id:
        return None
    path = Path(source.id)
    local = source.id != EMBEDDED and path.exists()  # absolute: the adapter will be loaded from other working directories
    named = schemes.AdapterBase(str(path.resolve()) if local else source.id, source.revision)
    folder = None if gguf_path(source.id) is not None else local_folder(source.id, source.revision)
    if folder is None or getattr(model.get_base_model(), "is_quantized", False):
        return named
    return named if _same_as_files(schemes.own_state(model), folder) else None


def _same_as_files(state: dict[str, torch.Tensor], folder: Path) -> bool:
    """Whether the tensors that have a counterpart in a directory's safetensors are equal to it, as far as they are compared."""
    try:
        names = LayerFiles(folder).files
    except (FileNotFoundError, ValueError):
        return True
    endings = {name.partition(".")[2]: name for name in names}  # a checkpoint of the inner model lacks its name in front
    for file in sorted(set(names.values())):
        with safe_open(folder / file, "pt") as opened:
            for name, value in state.items():
                there = (
                    name if name in names else name.partition(".")[2] if name.partition(".")[2] in names else endings.get(name)
                )
                if there is None or names[there] != file or value.is_meta or not value.is_floating_point():
                    continue
                kept = opened.get_slice(there)
                if list(value.shape) != kept.get_shape():
                    return False
                if value.ndim == 0 or not value.numel():
                    continue
                rows = max(1, COMPARED * len(value) // value.numel())
                if not torch.equal(kept[:rows].to(value.dtype), value[:rows].detach().cpu()):
                    return False
    return True


def _save_whole(model: Any, target: Path, weights: bool = True) -> None:
    """``save_pretrained`` of a model without its adapters, so that all of it is written and loaded again.

    A generation configuration that transformers reads with a warning and does not write is written as it is.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = _loadable_state(base, schemes.own_state(model)) if weights else {}
    if state is None and base is not model:
        state = schemes.own_state(model)
    own, drafted = getattr(base, "generation_config", None), None
    if own is not None:
        try:
            own.validate(strict=True)
        except ValueError:
            drafted = copy.deepcopy(own)
            base.generation_config = type(own)()
    try:
        with loading_bar(False):
            base.save_pretrained(target, state_dict=state)
    finally:
        if own is not None:
            base.generation_config = own
    if drafted is not None:
        drafted.to_json_file(target / "generation_config.json")


def _loadable_state(base: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The state with copies of tensors that ``save_pretrained`` would drop or refuse; None where there are none.

    These are tensors that share memory, but for those that loading ties again, and tensors that are not contiguous.
    """
    tied, seen, changed = getattr(base, "all_tied_weights_keys", None) or {}, set[int](), False
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        found[name] = value
        if value.is_meta or type(value) not in (torch.Tensor, torch.nn.Parameter) or name in tied:
            continue
        storage = value.untyped_storage().data_ptr()
        if storage in seen or not value.is_contiguous():
            found[name], changed = value.detach().contiguous().clone(), True
        seen.add(storage)
    return found if changed else None


def _check_described(model: Any, saved: Path) -> None:
    """ValueError where the saved configuration describes a model with other weights than this one has."""
    from transformers import AutoConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base.config, "auto_map", None) or getattr(base, "is_quantized", False):
        return  # code of others is not run for a check; quantised weights have shapes of their own
    with torch.device("meta"):
        again = type(base)(AutoConfig.from_pretrained(saved)).state_dict()
    here = schemes.own_state(model)
    for name in [*again.keys() - here.keys(), *here.keys() - again.keys()]:
        what = ("needs", "has not") if name in again else ("has no", "has")
        raise ValueError(f"its config {what[0]} {name!r}, which the model {what[1]}: change model.config with the model")
    for name, value in again.items():
        if value.shape != here[name].shape:
            shapes = f"{list(value.shape)} by its config, and {list(here[name].shape)} in the model"
            raise ValueError(
                f"{name!r} has shape {shapes}: change model.config with the model (an embedding: resize_token_embeddings)"
            )


def _reason(model: Any, error: Exception) -> str:
    """One line: why a model cannot be saved, and what to do."""
    text = " ".join(str(error).split())
    if "output_attentions" in text:
        return (
            "its config asks for output_attentions, which attention 'sdpa' cannot give, so transformers does not write it: "
            "load the model with --attn_implementation eager, or remove output_attentions from its config.json"
        )
    for owner in (model.config, getattr(model, "generation_config", None)):
        for name, value in {} if owner is None else vars(owner).items():
            try:
                json.dumps(value, default=_plain)
            except (TypeError, ValueError):
                return f"{type(owner).__name__}.{name} is {value!r}, which is no JSON: remove or replace it"
    return text or type(error).__name__


def _plain(value: Any) -> Any:
    """What transformers writes in its own way: dtypes and nested configurations."""
    if isinstance(value, torch.dtype) or hasattr(value, "to_dict"):
        return str(value)
    raise TypeError(type(value).__name__)
