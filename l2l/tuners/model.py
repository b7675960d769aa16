"""The basis of a tuner: for some weight matrices [m, n], a few orthonormal input-side columns V [n, r] by block name.

The tuner: a network over block features, its normaliser, its basis, and the model that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from l2l.params.basis import Basis
from l2l.params.blocks import Blocks
from l2l.tuners.features import FEATURES, RunStatistics, feature_set
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.networks import TunerNetwork, build_network
from l2l.tuners.normalize import EnergyNormalizer, Normalizer
from l2l.tuners.schedule import BlockSchedule


def random_basis(blocks: Blocks, r: int | Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random orthonormal columns, uniform over subspaces: the control that a learned basis must beat.

    Args:
        r: columns per block: one number for every matrix that is no embedding (at most the matrix's width), or by the
            names of the blocks that get a basis, as :func:`ranks` gives them.
        seed: fixes the columns; the global random state is not touched.

    Raises:
        ValueError: a rank is below 1, or a block named is not there or no matrix of that width.
    """
    matrices = {block.name: block.tensor.shape[1] for block in blocks if block.tensor.ndim == 2}
    if isinstance(r, Mapping):
        wanted = dict(r)
    else:
        wanted = {b.name: min(r, matrices[b.name]) for b in blocks if b.name in matrices and not b.embedding}
    for name, rank in wanted.items():
        if not 1 <= rank <= matrices.get(name, 0):
            raise ValueError(f"no basis of rank {rank} for block {name!r}: the rank is 1 to the width of a matrix")
    generator = torch.Generator().manual_seed(seed)
    return {name: _columns(matrices[name], rank, generator) for name, rank in wanted.items()}


def _columns(n: int, rank: int, generator: torch.Generator) -> Tensor:
    # in float64, so that what is rounded to float32 is orthonormal to its last bits
    drawn = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float().contiguous()


def ranks(basis: Mapping[str, Tensor]) -> dict[str, int]:
    """Columns per block."""
    return {name: vectors.shape[1] for name, vectors in basis.items()}


def bind(basis: Mapping[str, Tensor], blocks: Blocks) -> Basis | None:
    """The basis of those of these blocks that have one, where walking wants it; None if none has."""
    found = {i: basis[b.name].to(b.tensor.device) for i, b in enumerate(blocks) if b.name in basis}
    return Basis(found) if found else None


def checked(basis: Mapping[str, Tensor], blocks: Blocks) -> dict[str, Tensor]:
    """A copy of the basis in float32, each block's in memory of its own.

    Args:
        blocks: all blocks of the model; they need no memory.

    Raises:
        ValueError: a block is unknown or no matrix, or columns are not finite and orthonormal.
    """
    index = {block.name: i for i, block in enumerate(blocks)}
    unknown = [name for name in basis if name not in index]
    if unknown:
        raise ValueError(
            f"the tuner's basis is for a block {unknown[0]!r} that the model does not have: give it one of this model "
            "(Tuner.with_basis)"
        )
    kept = {
        name: vectors.detach().float().clone(memory_format=torch.contiguous_format) for name, vectors in basis.items()
    }
    Basis({index[name]: vectors for name, vectors in kept.items()}).check(blocks)
    return kept


__all__ = ["Fingerprint", "Provenance", "Tuner", "build_network", "load_weights"]


@dataclass(frozen=True)
class Provenance:
    """Where a tuner comes from; free-form values are kept in its card."""

    base_model: str = "unknown"
    revision: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Bound:
    """What a tuner needs of the blocks of a run, found once."""

    normalizer: Normalizer
    counts: Tensor
    basis: Basis | None


@final
class Tuner:
    """Sigma per block from features per block, and where it has a basis sigma inside that. Small, inert on disk.

    Bound to the blocks of one base model, unless it is size-free.

    Args:
        architecture: name of the network's module in ``l2l.tuners``.
        architecture_args: JSON values that a fresh network of the kind is built from.
        features: name of what the network sees, in :data:`l2l.tuners.features.FEATURE_SETS`.
        basis: for some blocks [m, n], orthonormal columns [n, r] by name; the network then needs two outputs.
        turns: groups of blocks of which one moves at a time; None: all move together.

    Raises:
        ValueError: unknown features, a network for another number of them, or a basis or turns that do not fit.
    """

    def __init__(
        self,
        network: TunerNetwork,
        fingerprint: Fingerprint,
        normalizer: Normalizer,
        architecture: str,
        architecture_args: dict[str, Any],
        provenance: Provenance | None = None,
        features: str = "paper",
        basis: Mapping[str, Tensor] | None = None,
        turns: BlockSchedule | None = None,
    ) -> None:
        self.network = network
        self.fingerprint = fingerprint
        self.normalizer = normalizer
        self.architecture = architecture
        self.architecture_args = architecture_args
        self.provenance = provenance or Provenance()
        self._features = feature_set(features)
        self.feature_set = features
        self._basis = checked(basis, fingerprint.blocks()) if basis else None
        self._bound: WeakKeyDictionary[Blocks, _Bound] = WeakKeyDictionary()
        self._found: dict[tuple[str, ...], tuple[list[int] | None, Tensor | None]] = {}
        self.block_schedule = turns
        self._check_sizes()
        self._check_turns()

    def _check_sizes(self) -> None:
        inputs, width = self.architecture_args.get("inputs", FEATURES), len(self._features.columns)
        if inputs != width:
            raise ValueError(f"the tuner's network takes {inputs} features, but {self.feature_set!r} has {width}")
        if self._basis is not None and self.outputs != 2:
            raise ValueError("the tuner has a basis, but its network gives no sigma for it: make it with outputs=2")

    def _check_turns(self) -> None:
        grouped = (
            {name for group in self.block_schedule.groups for name in group}
            if self.block_schedule
            else set(self.fingerprint.names)
        )
        odd = sorted(grouped.symmetric_difference(self.fingerprint.names))
        if odd:
            raise ValueError(
                f"the tuner's turns and its blocks do not agree on {format_names(odd)}: every block needs a group"
            )
        if self.block_schedule and self.size_free:
            raise ValueError("a size-free tuner belongs to no blocks, and turns name them: leave turns out")

    @staticmethod
    def for_model(
        model: nn.Module,
        architecture: str = "per_block_mlp",
        seed: int = 0,
        normalizer: Normalizer | None = None,
        provenance: Provenance | None = None,
        features: str = "paper",
        basis: Mapping[str, Tensor] | None = None,
        turns: BlockSchedule | None = None,
        **architecture_args: Any,
    ) -> Tuner:
        """A fresh tuner for the blocks of a model, in general randomly initialised.

        Args:
            architecture: name of a module in ``l2l.tuners``.
            seed: of the initialisation; the global random state is not touched.
            features: ``paper`` or ``standard``.
            basis: columns [n, r] by block; gives the network a second output.
            turns: e.g. ``Turns.by_role(Blocks.of(model, trainable=False))``.
            architecture_args: e.g. ``hidden=64``.
        """
        fingerprint = Fingerprint.of(model)
        width = len(feature_set(features).columns)
        sizes = ({"inputs": width} if width != FEATURES else {}) | ({"outputs": 2} if basis else {})
        args = {**sizes, **architecture_args, "blocks": len(fingerprint.names), "seed": seed}
        config = getattr(model, "config", None)
        found = provenance or Provenance(
            base_model=getattr(config, "_name_or_path", None) or type(model).__name__,
            revision=getattr(config, "_commit_hash", None),
        )
        normalizer = normalizer or EnergyNormalizer()
        network = build_network(architecture, args)
        return Tuner(network, fingerprint, normalizer, architecture, args, found, features, basis, turns)

    @staticmethod
    def from_pretrained(name: str | Path, revision: str | None = None) -> Tuner:
        """Load a tuner: a directory, the name of a bundled tuner, or a hub id. See :func:`l2l.tuners.io.load`."""
        return import_module("l2l.tuners.io").load(name, revision)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``tuner.safetensors``, ``config.json`` and a card. See :func:`l2l.tuners.io.save`."""
        return import_module("l2l.tuners.io").save(self, Path(directory))

    def push_to_hub(
        self, repo_id: str, private: bool = False, revision: str | None = None, licence: str | None = None
    ) -> str:
        """Upload the saved form to the hub; gives the commit's address. See :func:`l2l.tuners.sources.push`."""
        return import_module("l2l.tuners.sources").push(self, repo_id, private, revision, licence)

    @property
    def outputs(self) -> int:
        """Scales per block that the network gives: 1, or 2 with that of the basis."""
        return self.architecture_args.get("outputs", 1)

    @property
    def basis(self) -> dict[str, Tensor] | None:
        """Columns [n, r] float32 by block name; None: the tuner has none. Not to be written: see :meth:`with_basis`."""
        return self._basis

    def with_basis(self, basis: Mapping[str, Tensor] | None, model: nn.Module | None = None) -> Tuner:
        """A tuner of the same network, not a copy of it, with another basis.

        Args:
            model: whose blocks the basis is for, where a size-free tuner goes to another model; None: the tuner's own.

        Raises:
            ValueError: the basis does not fit, or the tuner does not serve the model.
        """
        prints = self.fingerprint if model is None else Fingerprint.of(model)
        if not self.size_free:
            self._check_fingerprint(prints)
        args = {**self.architecture_args, "blocks": len(prints.names)}
        known = (self.normalizer, self.architecture, args, self.provenance, self.feature_set)
        return Tuner(self.network, prints, *known, basis, self.block_schedule)

    def with_turns(self, turns: BlockSchedule | None) -> Tuner:
        """A tuner of the same network, not a copy of it, whose blocks take other turns."""
        found = copy(self)
        found.block_schedule = turns
        found._check_turns()
        return found

    def matched(self, model: nn.Module, match: Literal["exact", "shape", "kind"] = "exact") -> Tuner:
        """The tuner bound to the blocks of a model that is like its own. See :func:`l2l.tuners.transfer.matched`."""
        return import_module("l2l.tuners.transfer").matched(self, model, match)

    @property
    def size_free(self) -> bool:
        """Whether no parameter belongs to a block, so that the network serves any model."""
        names = {name for name, _ in self.network.named_parameters()}
        return bool(names) and names <= self.network.shared

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, naming blocks, unless the tuner serves this model.

        A size-free tuner serves any whose blocks its basis and its normaliser, if they belong to blocks, know.
        """
        if self.size_free:
            checked(self._basis or {}, Fingerprint.of(model).blocks())
            self.normalizer.counts(Blocks.of(model), self._basis or ())
        else:
            self._check_fingerprint(Fingerprint.of(model))

    def _check_fingerprint(self, other: Fingerprint) -> None:
        found = self.fingerprint.differences(other)
        if found:
            raise ValueError(
                f"the tuner was made for {self.provenance.base_model!r} and does not fit this model: blocks "
                f"{'; '.join(found)}. Use a tuner of this model, or learn one with `l2l meta-train`"
            )

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.fingerprint.names)}

    def rows(self, names: Sequence[str]) -> list[int]:
        """Rows of the network that belong to these blocks; of a size-free one, which has none, their places.

        Raises:
            ValueError: a block is unknown to the tuner.
        """
        if self.size_free:
            return list(range(len(names)))
        unknown = [name for name in names if name not in self._row]
        if unknown:
            raise ValueError(f"the tuner for {self.provenance.base_model!r} has no block {format_names(unknown)}")
        return [self._row[name] for name in names]

    def features(self, history: RunStatistics) -> Tensor:
        """Features [blocks, features] of what the history remembers."""
        return self._features.compute(history)

    def scales(self, features: Tensor, names: Sequence[str]) -> Tensor:
        """What the network gives, before normalisation: sigma [blocks], or with two outputs [blocks, 2].

        The second column is sigma inside the basis, 0 where a block has none. Differentiable in the network's weights.
        """
        key = tuple(names)
        if key not in self._found:
            self._found[key] = self._find(key)
        rows, inside = self._found[key]
        found = self.network(features, rows)
        return found if inside is None else found * inside

    def _find(self, names: tuple[str, ...]) -> tuple[list[int] | None, Tensor | None]:
        """Rows of the blocks, None for all in order; and, with two outputs, a mask [blocks, 2] of what there is."""
        rows = self.rows(names)
        everything = self.size_free or names == self.fingerprint.names
        mask = torch.tensor([[1.0, float(name in (self._basis or {}))] for name in names])
        return None if everything else rows, mask if self.outputs == 2 else None

    def sigma(self, features: Tensor, names: Sequence[str]) -> Tensor:
        """Sigma [blocks] of the dense noise before normalisation; differentiable in the network's weights."""
        found = self.scales(features, names)
        return found if found.ndim == 1 else found[:, 0]

    def factor(self, sigma: Tensor, blocks: Blocks) -> float:
        """The normaliser's common factor for these blocks, of sigma [blocks] or of :meth:`scales` [blocks, 2]."""
        counts = self._bind(blocks).counts
        if sigma.ndim == 2 and counts.ndim == 1:
            sigma = sigma[:, 0]
        return self.normalizer.factor(sigma, counts if sigma.ndim == counts.ndim else counts[:, 0])

    def basis_for(self, blocks: Blocks) -> Basis | None:
        """The basis of these blocks as directions take it, the same object at every call; None where none has one."""
        return self._bind(blocks).basis

    def _bind(self, blocks: Blocks) -> _Bound:
        bound = self._bound.get(blocks)
        if bound is None or bound.normalizer is not self.normalizer:
            present = {name for name in blocks.names if name in (self._basis or {})}
            basis = bound.basis if bound else bind(self._basis or {}, blocks)
            bound = _Bound(self.normalizer, self.normalizer.counts(blocks, present), basis)
            self._bound[blocks] = bound
        return bound


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
