"""Tuning schemes: which tensors of a model are trained. Adapters come from peft; the base is frozen.

The layers that get adapters are chosen by the model's structure: peft's own choice where it knows the architecture and the
model has such layers, else the projections of its attention, else all linear layers; never by a model's name. An adapter on
disk is a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, and names its base.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from safetensors import SafetensorError, safe_open

from l2l.models.heads import output_embedding
from l2l.models.kinds import kind_of, kind_of_class

logger = logging.getLogger(__name__)

Scheme: TypeAlias = Literal["full", "lora", "prefix", "prompt", "ia3", "head"]
"""``full``: every weight. ``lora`` (arXiv:2106.09685), ``prefix`` (arXiv:2101.00190), ``prompt`` (arXiv:2104.08691) and
``ia3`` (arXiv:2205.05638): adapters. ``head``: the output head alone, as linear probing does."""

ADAPTERS = ("lora", "prefix", "prompt", "ia3")
"""Schemes that freeze the base and save an adapter."""

_CONFIGS = {"lora": "LoraConfig", "prefix": "PrefixTuningConfig", "prompt": "PromptTuningConfig", "ia3": "IA3Config"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16},
    "prefix": {"num_virtual_tokens": 5},
    "prompt": {"num_virtual_tokens": 10},
    "ia3": {},
}
"""Rank, alpha and prefix length as Malladi et al. 2023 use them, arXiv:2305.17333."""
_RESERVED = frozenset({"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"})
"""Fields of peft's configurations that only this module sets."""


def check_scheme(scheme: str, args: Mapping[str, Any]) -> None:
    """Raise ValueError at an unknown scheme or argument, before a model is loaded."""
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme is {scheme!r}; use one of {', '.join(get_args(Scheme))}")
    if scheme not in ADAPTERS:
        if args:
            raise ValueError(f"scheme {scheme!r} takes no scheme_args, but {next(iter(args))!r} is given: leave it out")
        return
    known = {field.name for field in fields(_config_class(scheme))} - _RESERVED
    unknown = sorted(set(args) - known)
    if unknown:
        raise ValueError(f"scheme {scheme!r} has no argument {unknown[0]!r}; it has {', '.join(sorted(known))}")


def apply_scheme(model: Any, scheme: str = "full", args: Mapping[str, Any] | None = None, seed: int = 0) -> Any:
    """The model with exactly the scheme's tensors trainable. The model given becomes part of the one returned.

    Args:
        model: a model of transformers.
        scheme: a :data:`Scheme`. ``full`` leaves ``requires_grad`` unchanged. A frozen adapter, as :func:`l2l.load_model` gives
            it, is merged into its base first. ``head`` trains a copy of the head where it is
            tied to the input embedding, so that the features it reads stay those of the base. ``lora`` and ``ia3`` train a
            classifier's head too, which may be a fresh one.
        args: further fields of peft's configuration of the scheme, e.g. ``{r: 16, target_modules: [q_proj]}``.
        seed: of the initialisation; torch's global generators are left as they are.

    Returns:
        The model itself (``full``, ``head``), or a ``peft.PeftModel`` around it, whose adapters are float32 whatever the
        dtype of the base. A prefix begins as the keys and values, and a prompt as the embeddings, of random tokens.

    Raises:
        ValueError: an unknown scheme or argument, a model that has an adapter in training already or one that cannot be
            merged, or one that the scheme does not fit.
    """
    args = dict(args or {})
    check_scheme(scheme, args)
    if hasattr(model, "peft_config") and not hasattr(model, "get_base_model"):
        raise ValueError(
            f"scheme {scheme!r}: layers of an adapter lie in the model itself, put there by an earlier run or by add_adapter: "
            "give `result.model.unload()` or `result.model.merge_and_unload()` of that run, or peft.get_peft_model(model, …)"
        )
    if hasattr(model, "peft_config") and (scheme != "full" or not any(p.requires_grad for p in model.parameters())):
        model = _merged(model, scheme)
    if scheme == "full":
        return model
    model.requires_grad_(False)
    if scheme == "head":
        return _train_head(model)
    from peft import get_peft_model

    generates = hasattr(model, "prepare_inputs_for_generation")
    task_type = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(kind_of(model)) if generates else None  # keeps forward
    with seeded(seed):
        start = _start(model, scheme, args)
        options = {**_DEFAULTS[scheme], **_model_fields(model, scheme, args, start), "task_type": task_type, **args}
        try:
            with quiet():
                adapted: Any = get_peft_model(model, _config_class(scheme)(**options))
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"peft cannot apply scheme {scheme!r} to {type(model).__name__}: {reason}; "
                "choose layers by scheme_args.target_modules, or another scheme"
            ) from error
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:  # a module of the model's own keeps its dtype
            parameter.data = parameter.data.float()
    if start is not None:
        weight = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
        if start.ndim == 5:  # [2 * layers, 1, heads, n, width] to [n, 2 * layers * heads * width], as peft reads it
            start = start[:, 0].permute(2, 0, 1, 3).flatten(1)
        initial = getattr(adapted.active_peft_config, "prompt_tuning_init", "RANDOM")
        if weight.shape == start.shape and initial == "RANDOM":  # an encoder that projects keeps its own start
            weight.data.copy_(start)
    return adapted.eval()


def _merged(model: Any, scheme: str) -> Any:
    """The base of a ``peft.PeftModel`` with the frozen adapter in its weights; ValueError where it cannot be merged."""
    base = model.get_base_model()
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"scheme {scheme!r}: the model has an adapter already, perhaps of an earlier run: give `result.model.unload()`, "
            "its base without the adapter, or `result.model.merge_and_unload()`, with it (under prefix and prompt "
            "`result.model.get_base_model()`)"
        )
    if getattr(model.active_peft_config, "is_prompt_learning", False) or getattr(base, "is_quantized", False):
        what = "a quantised base" if getattr(base, "is_quantized", False) else "the weights: it is made of virtual tokens"
        name = model.active_peft_config.base_model_name_or_path
        raise ValueError(f"scheme {scheme!r}: the model's adapter cannot be merged into {what}; give its base, {name!r}")
    logger.warning("the adapter is merged into its base, and scheme %r trained on top", scheme)
    return model.merge_and_unload().requires_grad_(True)


def _config_class(scheme: str) -> Any:
    with quiet():
        import peft
    return getattr(peft, _CONFIGS[scheme])


def _model_fields(model: Any, scheme: str, args: Mapping[str, Any], start: torch.Tensor | None) -> dict[str, Any]:
    """Fields that depend on the model: the layers that get an adapter, or the sizes of a prefix or prompt."""
    if start is not None and scheme == "prefix":
        layers, _, heads, _, width = start.shape  # [layers * 2, 1, heads, tokens, width]
        return {"num_layers": layers // 2, "token_dim": heads * width, "num_attention_heads": heads}
    if start is not None:
        return {"token_dim": start.shape[-1], "num_layers": 1, "num_attention_heads": 1}  # the last two are not used
    modules, feedforward = args.get("target_modules") or (), ()
    if args.get("target_modules") is None and args.get("target_parameters") is None:
        modules, feedforward = attention_targets(model, scheme)
    ends = None if isinstance(modules, str) else modules
    layers = [layer for name, layer in _projections(model) if ends is None or any(_ends(name, end) for end in ends)]
    transposed = bool(layers) and not any(
        isinstance(layer, torch.nn.Linear) for layer in layers
    )  # [in, out], as those of GPT-2
    found: dict[str, Any] = {"target_modules": modules, "fan_in_fan_out": transposed}
    if kind_of(model) == "classifier":
        inner, children = _inner(model), model.named_children()
        heads = [name for name, child in children if child is not inner and any(True for _ in child.parameters())]
        found |= {"modules_to_save": heads} if heads else {}
    return found | ({"feedforward_modules": list(feedforward)} if scheme == "ia3" else {})


def _inner(model: Any) -> Any:
    """The model's encoder or decoder, without its head, where it names one."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "", None)


def _start(model: Any, scheme: str, args: Mapping[str, Any]) -> torch.Tensor | None:
    """Initial virtual tokens: keys and values [2 * layers, 1, heads, n, width], or embeddings [n, width], of random tokens."""
    if scheme not in ("prefix", "prompt"):
        return None
    if kind_of(model) != "causal":
        raise ValueError(
            f"scheme {scheme!r} needs a causal language model, but the model is a {type(model).__name__}: use lora or ia3"
        )
    count = args.get("num_virtual_tokens", _DEFAULTS[scheme]["num_virtual_tokens"])
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"num_virtual_tokens={count!r} must be a whole number, at least 1")
    embedding = model.get_input_embeddings()
    ids = torch.randint(0, embedding.weight.shape[0], (1, count)).to(embedding.weight.device)
    was_training = model.training
    with torch.no_grad():
        if scheme == "prompt":
            return embedding(ids)[0].float()
        cache = getattr(model.eval()(input_ids=ids, use_cache=True), "past_key_values", None)
    model.train(was_training)
    layers = getattr(cache, "layers", None) or ()
    kept = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    found = [value.float() for value in kept if isinstance(value, torch.Tensor)]
    if len(found) < len(kept) or len({tuple(value.shape) for value in found}) != 1:
        raise ValueError(
            f"scheme 'prefix' needs keys and values of one shape in every layer, which {type(model).__name__} does not "
            "keep: use prompt, or lora with scheme_args.target_modules"
        )
    return torch.stack(found)


def _train_head(model: Any) -> Any:
    """Make the output head trainable, as a copy where it is tied; of a classifier, all that lies outside the base model."""
    head: Any = output_embedding(model)
    if head is None:
        inner = _inner(model)
        inside = {id(parameter) for parameter in inner.parameters()} if isinstance(inner, torch.nn.Module) else set()
        outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        if not inside or not outside:
            raise ValueError(f"scheme 'head': {type(model).__name__} names no output head; use full or lora")
        for parameter in outside:
            parameter.requires_grad_(True)
        return model
    embedding = model.get_input_embeddings()
    if embedding is not None and getattr(head, "weight", None) is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False  # it is saved, and loaded again, as a weight of its own
    head.requires_grad_(True)
    return model


def attention_targets(model: Any, scheme: str) -> tuple[str | Sequence[str], Sequence[str]]:
    """The layers that ``lora`` or ``ia3`` adapts by default, in the form peft takes, the ends of their names or ``all-linear``;
    and those of them whose input IA3 scales instead of the output. They are peft's choice for the architecture where the
    model has such layers; else all projections of its attention modules, which are those that split their input into heads;
    else all linear layers, where IA3 raises ValueError."""
    from peft.utils import constants

    model_type, names = getattr(model.config, "model_type", ""), [name for name, _ in _projections(model)]
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{scheme.upper()}_TARGET_MODULES_MAPPING")
    chosen: Sequence[str] = table.get(model_type, ())
    known = [end for end in chosen if any(_ends(name, end) for name in names)]
    if known:
        inside = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type, ())
        return known, [end for end in known if scheme == "ia3" and end in inside]
    sizes = ("head_dim", "head_size", "attention_head_size")
    owned = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    attention = sorted({end for owner, end in owned if any(isinstance(getattr(owner, size, None), int) for size in sizes)})
    if attention:
        return attention, ()
    if scheme == "ia3":
        raise ValueError(
            f"scheme 'ia3' finds no attention projections in {type(model).__name__}: name layers by "
            "scheme_args.target_modules and feedforward_modules"
        )
    return "all-linear", ()


def _projections(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Layers that multiply by a matrix."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            yield name, module


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base"
"""Files of an adapter's directory, and the folder in it where the base lies that is nowhere else."""


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter belongs to: ``l2l/tiny``, a directory, or an id of the hub, with its revision."""

    name: str
    revision: str | None
    head: str = "auto"
    """``classifier`` where the adapter holds a classifier's head."""
    num_labels: int | None = None
    """Labels of that head."""


def adapter_base(name_or_path: str | Path) -> AdapterBase | None:
    """The base that an adapter's directory holds or names; None where this is no directory of an adapter. FileNotFoundError
    where there are no weights as safetensors, ValueError where its configuration is not readable or names no base."""
    folder = Path(name_or_path).expanduser()
    if not (folder / CONFIG).is_file():
        return None
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"directory {str(folder)!r} has {CONFIG}, but no {WEIGHTS}: save the adapter again")
    try:
        found = json.loads((folder / CONFIG).read_text())
        name, revision = found["base_model_name_or_path"], found.get("revision")
        mapping, heads = found.get("auto_mapping") or {}, found.get("modules_to_save") or ()
        classifies = kind_of_class(mapping.get("base_model_class", "")) == "classifier"
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is not the configuration of an adapter: save the adapter again") from error
    if (folder / BASE / "config.json").is_file():
        name, revision = str(folder / BASE), None
    if not name:
        raise ValueError(f"{folder / CONFIG} names no base model: fill in base_model_name_or_path")
    if not (classifies and heads):
        return AdapterBase(name, revision)
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if any(f".{head}." in name for head in heads)]  # noqa: SIM118
        shapes = [file.get_slice(name).get_shape() for name in names]
    rows = [shape[0] for shape in shapes if len(shape) == 2]  # of several layers, the last has the fewest
    return AdapterBase(name, revision, "classifier", min(rows, default=None))


def with_adapter(model: Any, directory: str | Path) -> Any:
    """The model with the adapter of a directory, frozen, in eval mode, as a ``peft.PeftModel``; ValueError where it does not
    fit."""
    try:
        with quiet():
            from peft import PeftModel

            found: Any = PeftModel.from_pretrained(model, str(directory))
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the adapter in {str(directory)!r} does not fit {type(model).__name__}: {first}; is its base another model?"
        ) from error
    return found.requires_grad_(False).eval()


def save_adapter(model: Any, directory: str | Path, base: AdapterBase) -> None:
    """Write the active adapter of a ``peft.PeftModel``, whatever its name, and the base to record.

    :func:`l2l.load_model` on the directory loads both, and ``PeftModel.from_pretrained`` the adapter: peft itself writes one
    with a name of its own into a folder of that name, where neither looks for it.
    """
    name, config = model.active_adapter, model.active_peft_config
    config.base_model_name_or_path, config.revision = base.name, base.revision
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".writing-") as folder:
        # "auto" would ask the hub for the base's config
        model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        for file in (Path(folder) if name == "default" else Path(folder) / name).iterdir():
            file.replace(target / file.name)


def check_adapter(model: Any) -> None:
    """ValueError where the adapters of a ``peft.PeftModel`` are in a state that no directory of one adapter can hold."""
    active = getattr(model.base_model, "active_adapters", ())
    if isinstance(active, list) and len(active) > 1:
        raise ValueError(
            f"adapters {' and '.join(map(repr, active))} are active together, and one is saved: choose one by "
            f"model.set_adapter({active[0]!r}), or combine them by model.add_weighted_adapter and set the one that it makes"
        )
    if model.active_adapter in ("..", ".") or Path(model.active_adapter).name != model.active_adapter:
        raise ValueError(f"the adapter's name {model.active_adapter!r} is none for a file: give it one without / and ..")
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise ValueError("the adapter is merged into its base, where training it changes nothing: model.unmerge_adapter()")


def own_state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model without those of adapters, under the names that they have without them."""
    if not hasattr(model, "get_base_model"):
        return model.state_dict()
    wrappers = {".token_adapter.": ".", ".base_layer.": ".", ".original_module.": "."}
    found = {}
    for name, value in model.get_base_model().state_dict().items():
        if not of_adapter(model, name):
            for inside, without in wrappers.items():
                name = name.replace(inside, without)
            found[name] = value
    return found


def of_adapter(model: Any, name: str) -> bool:
    """Whether a tensor of a ``peft.PeftModel`` belongs to an adapter, by its name."""
    marks = (
        "prompt_encoder.",
        ".modules_to_save.",
        ".trainable_tokens_",
        f".{getattr(model.base_model, 'prefix', '') or 'lora_'}",
    )
    return any(mark in name for mark in marks)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings about names in peft's own calls that other libraries deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts at the seed; afterwards it has its earlier state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
