"""The tuner without input and output: a network over block features, its normalizer, its basis, and the blocks it is for.

A basis holds, for some weight matrices [m, n], a few orthonormal input-side columns V [n, r] by block name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch

from l2l.arguments import plain
from l2l.params import Basis, Blocks
from l2l.tuners.features import FEATURES, RunStatistics, feature_set
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.networks import TunerNetwork, build_network, current_network
from l2l.tuners.normalize import EnergyNormalizer, Normalizer
from l2l.tuners.plan import TrainingPlan
from l2l.tuners.schedule import BlockSchedule


def random_basis(blocks: Blocks, r: int | Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random orthonormal columns, uniform over subspaces: the control that a learned basis must beat.

    Args:
        r: columns per block: one number for every matrix that is no embedding (at most the matrix's width), or by the
            names of the blocks that get a basis, as :func:`ranks` gives them.
        seed: fixes the columns; the global random state is not touched.

    Raises:
        ValueError: a rank is below 1, or a block named is not there or no matrix of that width.
    """
    widths = {block.name: block.tensor.shape[1] for block in blocks if block.tensor.ndim == 2}
    wanted = r
    if not isinstance(wanted, Mapping):
        wanted = {b.name: min(wanted, widths[b.name]) for b in blocks if b.name in widths and not b.embedding}
    for name, rank in wanted.items():
        if not 1 <= rank <= widths.get(name, 0):
            raise ValueError(f"no basis of rank {rank} for block {name!r}: the rank is 1 to the width of a matrix")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, rank in wanted.items():  # in float64, so that the columns are orthonormal to the last bits of float32
        normal = torch.randn(widths[name], rank, generator=generator, dtype=torch.float64)
        found[name] = torch.linalg.qr(normal).Q.float().contiguous()
    return found


def ranks(basis: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Columns per block."""
    return {name: vectors.shape[1] for name, vectors in basis.items()}


def bind(basis: Mapping[str, torch.Tensor], blocks: Blocks) -> Basis | None:
    """The basis of those of these blocks that have one, on their devices; None if none has."""
    found = {i: basis[b.name].to(b.tensor.device) for i, b in enumerate(blocks) if b.name in basis}
    return Basis(found) if found else None


def _checked(basis: Mapping[str, torch.Tensor], blocks: Blocks) -> dict[str, torch.Tensor]:
    """A float32 copy of the basis, checked against all blocks of the model, which need no memory."""
    index = {block.name: i for i, block in enumerate(blocks)}
    if unknown := [name for name in basis if name not in index]:
        what = f"a block {unknown[0]!r} that the model does not have"
        raise ValueError(f"the tuner's basis is for {what}: give it one of this model (Tuner.with_basis)")
    own = {name: v.detach().float().clone(memory_format=torch.contiguous_format) for name, v in basis.items()}
    Basis({index[name]: vectors for name, vectors in own.items()}).check(blocks)
    return own


@dataclass(frozen=True)
class Provenance:
    """Origin of a tuner, kept in its config and card."""

    base_model: str = "unknown"
    revision: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class TunerModel:
    """Sigma per block from features per block, and, where it has a basis, sigma along that. Users have :class:`l2l.Tuner`.

    Bound to the blocks of one base model, unless it is size-free.

    Args:
        architecture: name of the network, see :func:`l2l.tuners.networks.network_class`.
        architecture_args: JSON values that a fresh network of the kind is built from.
        feature_set: name of the network's inputs in :data:`l2l.tuners.features.FEATURE_SETS`.
        basis: for some blocks [m, n], orthonormal columns [n, r] by name, copied; the network then needs two outputs.
        block_schedule: groups of blocks of which one moves at a time; None: all move together.
        plan: options of fine-tuning runs that users leave open; None: there are only defaults.

    Raises:
        ValueError: unknown features, a network for another number of them, or a basis or schedule that does not fit.
    """

    network: TunerNetwork
    fingerprint: Fingerprint
    normalizer: Normalizer
    architecture: str
    architecture_args: dict[str, Any]
    provenance: Provenance = field(default_factory=Provenance)
    feature_set: str = "paper"
    basis: Mapping[str, torch.Tensor] | None = None
    block_schedule: BlockSchedule | None = None
    plan: TrainingPlan | None = None

    def __post_init__(self) -> None:
        self._features = feature_set(self.feature_set)
        self.basis = _checked(self.basis, self.fingerprint.blocks()) if self.basis else None
        self._bound: WeakKeyDictionary[Blocks, tuple[Normalizer, torch.Tensor, Basis | None]] = WeakKeyDictionary()
        self._selected: dict[tuple[str, ...], tuple[list[int] | None, torch.Tensor | None]] = {}
        inputs, width = self.architecture_args.get("inputs", FEATURES), len(self._features.columns)
        if inputs != width:
            raise ValueError(f"the tuner's network takes {inputs} features, but {self.feature_set!r} has {width}")
        if self.basis is not None and self.outputs != 2:
            raise ValueError("the tuner has a basis, but its network gives no sigma for it: make it with outputs=2")
        if self.block_schedule is None:
            return
        grouped = {name for group in self.block_schedule.groups for name in group}
        if odd := sorted(grouped.symmetric_difference(self.fingerprint.names)):
            what = f"do not agree on {format_names(odd)}"
            raise ValueError(f"the tuner's block schedule and its blocks {what}: every block needs a group")
        if self.size_free:
            raise ValueError("a size-free tuner belongs to no blocks, which a block schedule names: leave it out")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_bound"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _bound=WeakKeyDictionary())

    @classmethod
    def for_model(
        cls,
        model: torch.nn.Module,
        architecture: str = "per_block_mlp",
        seed: int = 0,
        normalizer: Normalizer | None = None,
        provenance: Provenance | None = None,
        features: str = "paper",
        basis: Mapping[str, torch.Tensor] | None = None,
        block_schedule: BlockSchedule | None = None,
        **architecture_args: Any,
    ) -> Self:
        """A fresh tuner for the blocks of a model, in general randomly initialised.

        Args:
            architecture: ``per_block_mlp``, ``shared_mlp``, ``table``, or ``package.module[:Class]``.
            seed: of the initialisation; the global random state is not touched.
            normalizer: None: :class:`l2l.tuners.normalize.EnergyNormalizer`.
            features: ``paper`` or ``standard``.
            basis: columns [n, r] by block; gives the network a second output.
            block_schedule: e.g. ``BlockSchedule.by_role(Blocks.of(model, trainable=False))``.
            architecture_args: e.g. ``hidden=64``.
        """
        fingerprint = Fingerprint.of(model)
        width = len(feature_set(features).columns)
        sizes = ({"inputs": width} if width != FEATURES else {}) | ({"outputs": 2} if basis else {})
        architecture, architecture_args = current_network(architecture, architecture_args)
        args = plain(architecture_args)
        args = {**sizes, **args, "blocks": len(fingerprint.names), "seed": plain(seed)}
        config, network = getattr(model, "config", None), build_network(architecture, args, trusted=True)
        base = getattr(config, "_name_or_path", None) or type(model).__name__
        origin = provenance or Provenance(base, getattr(config, "_commit_hash", None))
        chosen = normalizer or EnergyNormalizer()
        return cls(network, fingerprint, chosen, architecture, args, origin, features, basis, block_schedule)

    @property
    def outputs(self) -> int:
        """Outputs of the network per block: 1, or 2 with sigma along the basis."""
        return self.architecture_args.get("outputs", 1)

    @property
    def size_free(self) -> bool:
        """Whether no parameter belongs to a block, so that the network serves any model."""
        names = {name for name, _ in self.network.named_parameters()}
        return bool(names) and names <= self.network.shared

    def with_basis(self, basis: Mapping[str, torch.Tensor] | None, model: torch.nn.Module | None = None) -> Self:
        """A tuner of the same network, not a copy of it, with another basis.

        Args:
            model: whose blocks the basis is for, where a size-free tuner goes to another model; None: the tuner's own.

        Raises:
            ValueError: the basis does not fit, or the tuner does not serve the model.
        """
        fingerprint = self.fingerprint if model is None else Fingerprint.of(model)
        if not self.size_free:
            self._check_fingerprint(fingerprint)
        args = {**self.architecture_args, "blocks": len(fingerprint.names)}
        return replace(self, fingerprint=fingerprint, architecture_args=args, basis=basis)

    def with_block_schedule(self, block_schedule: BlockSchedule | None) -> Self:
        """A tuner of the same network, not a copy of it, with another block schedule."""
        return replace(self, block_schedule=block_schedule)

    def with_plan(self, plan: TrainingPlan | None) -> Self:
        """A tuner of the same network, not a copy of it, with another training plan."""
        return replace(self, plan=plan)

    def check(self, model: torch.nn.Module) -> None:
        """Raise ValueError, naming blocks, unless the tuner serves this model.

        A size-free tuner serves any model whose blocks its basis and its normalizer, if they belong to blocks, know.
        """
        if self.size_free:
            _checked(self.basis or {}, Fingerprint.of(model).blocks())
            self.normalizer.counts(Blocks.of(model), self.basis or ())
        else:
            self._check_fingerprint(Fingerprint.of(model))

    def _check_fingerprint(self, other: Fingerprint) -> None:
        if found := "; ".join(self.fingerprint.differences(other)):
            made = f"the tuner was made for {self.provenance.base_model!r} and does not fit this model: blocks {found}"
            raise ValueError(f"{made}. Use a tuner of this model, or learn one with `l2l meta-train`")

    def rows(self, names: Sequence[str]) -> list[int]:
        """The network's rows of these blocks, else ValueError; of a size-free one, which has none, their positions."""
        if self.size_free:
            return list(range(len(names)))
        row_of = {name: row for row, name in enumerate(self.fingerprint.names)}
        if unknown := [name for name in names if name not in row_of]:
            raise ValueError(f"the tuner for {self.provenance.base_model!r} has no block {format_names(unknown)}")
        return [row_of[name] for name in names]

    def features(self, statistics: RunStatistics) -> torch.Tensor:
        """[blocks, features] float32 of a run's record."""
        return self._features.compute(statistics)

    def scales(self, features: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Output of the network before normalisation: sigma [blocks], or with two outputs [blocks, 2].

        The second column is sigma along the basis, 0 where a block has none. Differentiable in the network's weights.
        """
        key = tuple(names)
        if key not in self._selected:
            rows, everything = self.rows(key), self.size_free or key == self.fingerprint.names
            mask = torch.tensor([[1.0, float(name in (self.basis or {}))] for name in key])
            self._selected[key] = None if everything else rows, mask if self.outputs == 2 else None
        rows, mask = self._selected[key]
        found = self.network(features, rows)
        return found if mask is None else found * mask

    def sigma(self, features: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Sigma [blocks] of the dense noise before normalisation; differentiable in the network's weights."""
        found = self.scales(features, names)
        return found if found.ndim == 1 else found[:, 0]

    def factor(self, sigma: torch.Tensor, blocks: Blocks) -> float:
        """The normalizer's common factor for these blocks, of sigma [blocks] or of :meth:`scales` [blocks, 2]."""
        _, counts, _ = self._bind(blocks)
        if sigma.ndim == 2 and counts.ndim == 1:
            sigma = sigma[:, 0]
        return self.normalizer.factor(sigma, counts if sigma.ndim == counts.ndim else counts[:, 0])

    def basis_for(self, blocks: Blocks) -> Basis | None:
        """The basis of these blocks for directions, the same object at every call; None where no block has one."""
        return self._bind(blocks)[2]

    def _bind(self, blocks: Blocks) -> tuple[Normalizer, torch.Tensor, Basis | None]:
        """What depends on the blocks of a run alone, computed once: the normalizer, its counts, and the basis."""
        bound = self._bound.get(blocks)
        if bound is None or bound[0] is not self.normalizer:
            counts = self.normalizer.counts(blocks, self.basis or ())
            bound = self._bound[blocks] = (self.normalizer, counts, bound[2] if bound else bind(self.basis or {}, blocks))
        return bound


def load_weights(tuner: TunerModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into a tuner's network; ValueError where names or shapes do not fit, or one is not finite."""
    wanted = {name: tuple(value.shape) for name, value in tuner.network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        raise ValueError(f"tuner weights do not fit their config: expected {wanted}, found {found}")
    if broken := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"tuner weights {broken} are not finite: the file is broken, get it again")
    tuner.network.load_state_dict(dict(weights))
