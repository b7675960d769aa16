"""The kind of a model or checkpoint, by its class and its config, never by its name.

Classes are looked up in the tables by which transformers itself finds the class for a head, so models that transformers learns
to load are known here too."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Kind: TypeAlias = Literal["causal", "masked", "seq2seq", "classifier"]
"""``causal``: predicts the next token. ``masked``: predicts tokens that were masked. ``seq2seq``: an encoder reads, a
decoder predicts. ``classifier``: one logit per label for a whole text."""

Head: TypeAlias = Literal["auto", "causal", "masked", "seq2seq", "classifier"]
"""A kind, or ``auto``: that of the checkpoint."""

_AUTO: dict[Kind, str] = {
    "classifier": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
}
"""In the order of look-up: an encoder-decoder that fills in masks counts as an encoder-decoder."""
_TABLES = dict(zip(_AUTO, ("SEQUENCE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM"), strict=True))


def kind_of(model: object) -> Kind:
    """The kind of a model, also of one that is wrapped by ``peft``: by its class or the nearest base class that transformers
    lists, else ``seq2seq`` or ``causal`` by its config. A module without a config counts as causal."""
    base = unwrapped(model)
    config = getattr(base, "config", None)
    if config is None:
        return "causal"
    pair = bool(getattr(config, "is_encoder_decoder", False))
    for one in type(base).__mro__:
        kind = kind_of_class(one.__name__, pair)
        if kind is not None:
            return kind
    return "seq2seq" if pair else "causal"


def unwrapped(model: object) -> Any:
    """The transformers model inside one that is wrapped by ``peft``; any other as it is."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def kind_of_config(config: "PreTrainedConfig", head: str = "auto") -> Kind:
    """``head``; under ``auto`` the kind of the class that the checkpoint was saved from (``architectures``, or the classes of
    its own code in ``auto_map``), else the kind that its model type is made for. ValueError where ``head`` is no kind."""
    if head not in get_args(Head):
        raise ValueError(f"head is {head!r}; use one of {', '.join(get_args(Head))}")
    if head != "auto":
        return cast(Kind, head)
    pair = bool(getattr(config, "is_encoder_decoder", False))
    for name in getattr(config, "architectures", None) or ():
        kind = kind_of_class(name, pair)
        if kind is not None:
            return kind
    own = getattr(config, "auto_map", None) or {}
    mapped: Kind | None = next((kind for kind in _AUTO if _AUTO[kind] in own), None)
    if mapped is not None:
        return mapped
    if pair:
        return "seq2seq"
    # Encoders can be loaded as causal models as well, but their tokens then still attend to later ones.
    encoder = config.model_type in _table("masked") and not getattr(config, "is_decoder", False)
    return "masked" if encoder else "causal"


def auto_class(kind: Kind) -> Any:
    """The auto class of transformers that loads models of a kind."""
    import transformers

    return getattr(transformers, _AUTO[kind])


def kind_of_class(name: str, pair: bool = False) -> Kind | None:
    """The kind of a class of transformers by its name; ``pair``: whether it is an encoder-decoder. None for other classes."""
    return next((kind for kind in _AUTO if name in _classes(kind) and (pair or kind != "seq2seq")), None)


@cache
def _classes(kind: Kind) -> frozenset[str]:
    """Names of the classes of transformers that are of a kind."""
    return frozenset(name for names in _table(kind).values() for name in ((names,) if isinstance(names, str) else names))


def _table(kind: Kind) -> Mapping[str, str | tuple[str, ...]]:
    """Model type -> names of its classes of a kind."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, f"MODEL_FOR_{_TABLES[kind]}_MAPPING_NAMES")
