"""The tuner: a network over block features, its normaliser, and the fingerprint of the model it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from l2l.blocks import Blocks
from l2l.tuners.base import TunerNetwork
from l2l.tuners.features import History, block_features
from l2l.tuners.normalise import EnergyNormaliser


@dataclass(frozen=True)
class Fingerprint:
    """Names and shapes of all blocks of the model that a tuner was made for, frozen ones included."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(model: nn.Module) -> Fingerprint:
        """Fingerprint of a model."""
        blocks = Blocks.of(model, trainable=False)
        return Fingerprint(blocks.names, tuple(tuple(block.tensor.shape) for block in blocks))

    def differences(self, other: Fingerprint) -> list[str]:
        """What ``other`` lacks, has beside, or has in another shape; empty if they match. Order does not matter."""
        mine = dict(zip(self.names, self.shapes, strict=True))
        theirs = dict(zip(other.names, other.shapes, strict=True))
        missing = [name for name in mine if name not in theirs]
        extra = [name for name in theirs if name not in mine]
        other_shape = [name for name in mine if name in theirs and mine[name] != theirs[name]]
        labels = ("missing in the model", missing), ("not in the tuner", extra), ("of another shape", other_shape)
        return [f"{len(names)} {label}: {_some(names)}" for label, names in labels if names]


@dataclass(frozen=True)
class Provenance:
    """Where a tuner comes from; free-form values are kept in its card."""

    base_model: str = "unknown"
    revision: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


@final
class Tuner:
    """Sigma per block from features per block. Small, inert on disk, bound to the blocks of one base model."""

    def __init__(
        self,
        network: TunerNetwork,
        fingerprint: Fingerprint,
        normaliser: EnergyNormaliser,
        architecture: str,
        architecture_args: dict[str, Any],
        provenance: Provenance | None = None,
    ) -> None:
        self.network = network
        self.fingerprint = fingerprint
        self.normaliser = normaliser
        self.architecture = architecture
        self.architecture_args = architecture_args
        self.provenance = provenance or Provenance()

    @staticmethod
    def for_model(
        model: nn.Module,
        architecture: str = "per_block_mlp",
        seed: int = 0,
        normaliser: EnergyNormaliser | None = None,
        provenance: Provenance | None = None,
        **architecture_args: Any,
    ) -> Tuner:
        """A fresh, randomly initialised tuner for the blocks of a model.

        Args:
            architecture: name of a module in ``l2l.tuners``.
            seed: of the initialisation; the global random state is not touched.
            architecture_args: e.g. ``hidden=64``.
        """
        fingerprint = Fingerprint.of(model)
        args = {**architecture_args, "blocks": len(fingerprint.names), "seed": seed}
        config = getattr(model, "config", None)
        found = provenance or Provenance(
            base_model=getattr(config, "_name_or_path", None) or type(model).__name__,
            revision=getattr(config, "_commit_hash", None),
        )
        normaliser = normaliser or EnergyNormaliser()
        return Tuner(build_network(architecture, args), fingerprint, normaliser, architecture, args, found)

    @staticmethod
    def from_pretrained(name: str | Path, revision: str | None = None) -> Tuner:
        """Load a tuner: a directory, the name of a bundled tuner, or a hub id. See :func:`l2l.tuners.store.load`."""
        return import_module("l2l.tuners.store").load(name, revision)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``tuner.safetensors``, ``config.json`` and a card. See :func:`l2l.tuners.store.save`."""
        return import_module("l2l.tuners.store").save(self, Path(directory))

    def push_to_hub(self, repo_id: str, private: bool = False, revision: str | None = None) -> str:
        """Upload the saved form to the hub; gives the commit's address. See :func:`l2l.tuners.store.push`."""
        return import_module("l2l.tuners.store").push(self, repo_id, private, revision)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, naming missing and extra blocks, unless the tuner was made for this model's blocks."""
        found = self.fingerprint.differences(Fingerprint.of(model))
        if found:
            raise ValueError(
                f"the tuner was made for {self.provenance.base_model!r} and does not fit this model: blocks "
                f"{'; '.join(found)}. Use a tuner of this model, or learn one with `l2l meta-train`"
            )

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.fingerprint.names)}

    def rows(self, names: Sequence[str]) -> list[int]:
        """Rows of the network that belong to these blocks.

        Raises:
            ValueError: a block is unknown to the tuner.
        """
        unknown = [name for name in names if name not in self._row]
        if unknown:
            raise ValueError(f"the tuner for {self.provenance.base_model!r} has no block {_some(unknown)}")
        return [self._row[name] for name in names]

    def features(self, history: History) -> Tensor:
        """Features [blocks, features] of the weights and losses that the history remembers."""
        return block_features(history)

    def sigma(self, features: Tensor, names: Sequence[str]) -> Tensor:
        """Sigma [blocks] before normalisation; differentiable in the network's weights."""
        return self.network(features, self.rows(names))

    def factor(self, sigma: Tensor, blocks: Blocks) -> float:
        """The normaliser's common factor for these blocks."""
        return self.normaliser.factor(sigma, self.normaliser.counts(blocks))


def build_network(architecture: str, args: dict[str, Any]) -> TunerNetwork:
    """The network of a module of ``l2l.tuners``. Only names inside this package are ever imported.

    Raises:
        ValueError: no such architecture.
    """
    if not architecture.isidentifier():
        raise ValueError(f"tuner architecture {architecture!r} is not a module name of l2l.tuners")
    try:
        network = import_module(f"l2l.tuners.{architecture}").NETWORK
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"unknown tuner architecture {architecture!r}: l2l.tuners has no such network") from error
    return network(**args)


def load_weights(tuner: Tuner, weights: dict[str, Tensor]) -> None:
    """Put weights into a tuner's network after checking names, shapes and finiteness.

    Raises:
        ValueError: they do not fit or are not finite.
    """
    wanted = {name: tuple(value.shape) for name, value in tuner.network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        raise ValueError(f"tuner weights do not fit their config: expected {wanted}, found {found}")
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"tuner weights {broken} are not finite: the file is broken, get it again")
    tuner.network.load_state_dict(weights)


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
