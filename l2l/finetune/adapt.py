"""A run's tuning scheme: the model with what is trained, a tuner that fits it, and what is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.finetune.config import FineTuneConfig
from l2l.finetune.defaults import resolve, warn
from l2l.methods.base import FirstOrder
from l2l.models.adapters import AdapterBase, save_adapter
from l2l.models.freeze import freeze_matching
from l2l.models.load import EMBEDDED, model_identity
from l2l.models.schemes import ADAPTERS, apply_scheme
from l2l.tuners.match import Level
from l2l.tuners.transfer import compare
from l2l.tuners.tuner import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def setup_scheme(model: PreTrainedModel, config: FineTuneConfig) -> PreTrainedModel:
    """The model with exactly what the run's scheme trains.

    Raises:
        ValueError: the scheme cannot be applied, or means nothing together with another field; or nothing is left to train.
    """
    if config.scheme != "full" and config.sparse_embeddings:
        raise ValueError(f"sparse_embeddings=True, but scheme {config.scheme!r} trains no word embedding: leave it off")
    if config.scheme in ("prefix", "prompt") and config.compile:
        raise ValueError(f"compile=True does not go with scheme {config.scheme!r}: leave it off")
    found = apply_scheme(model, config.scheme, config.scheme_args, config.seed)
    freeze_matching(found, config.freeze)
    return found


def fitting_tuner(
    tuner: Tuner | str | None, model: PreTrainedModel, scheme: str, match: Level = "exact", told: bool = False
) -> Tuner | None:
    """The tuner bound to the model, with what its scheme trains.

    A tuner of one model has an entry for each block of that model, by name; adapters are blocks of their own, for which it
    has none: with ``kind`` they take the sigma of similar blocks. A size-free tuner serves them at every level.

    Args:
        match: how alike the model must be to the tuner's own; see :func:`l2l.tuners.transfer.matched`.
        told: print what the model is to the tuner, where it is not the same.

    Raises:
        ValueError: the model is less like the tuner's than ``match`` asks.
    """
    if tuner is None:
        return None
    found = Tuner.from_pretrained(tuner) if isinstance(tuner, str) else tuner
    try:
        bound = found.matched(model, match)
    except ValueError as error:
        if scheme == "full" or match == "kind":
            raise
        raise ValueError(
            f"the tuner for {found.provenance.base_model!r} has a sigma for each block of the full model and none for those "
            f"that scheme {scheme!r} trains: use scheme full, or a size-free tuner (l2l meta-train, architecture shared_mlp), "
            "or give them the sigma of similar blocks with --match kind"
        ) from error
    if told and not found.size_free and (relation := compare(found, model)).kind != "exact":
        print(f"tuner for {found.provenance.base_model!r} on this model ({relation.kind}): {relation.message}")
    return bound


def warn_of_steps(model: Any, config: FineTuneConfig, method: Any) -> None:
    """Warn where learning rate or epsilon lie far outside what is known for the scheme. Not of first-order methods."""
    if isinstance(method, FirstOrder):
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lr, _ = resolve(config.scheme, config.lr, None)
    if method.step_is_normalized:
        lr = "auto"  # its learning rates are of another size, of which nothing is known here
    warn(config.scheme, lr, method.epsilon, parameters)


def save_trained(model: Any, scheme: str, target: Path) -> None:
    """Write what a run trained: the adapter where there is one, else the whole model."""
    if scheme not in ADAPTERS:
        model.save_pretrained(target)
        return
    source = model_identity(model)
    folder = Path(source.id)  # of a directory, where it lies: a relative one would be looked for from elsewhere
    base = str(folder.resolve()) if source.id and source.id != EMBEDDED and folder.is_dir() else source.id
    save_adapter(model, target, AdapterBase(base, source.revision))
