"""Normalizers: the common factor of sigma that keeps a budget constant, whatever the overall size of sigma."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from l2l.params.blocks import Block, Blocks


class Normalizer(ABC):
    """Abstract normalizer, a frozen dataclass of JSON values: a cost per block, and the factor that spends MeZO's budget.

    The factor is a constant of the step: no gradient flows through it.
    """

    name: ClassVar[str]
    """Its name in a tuner's config."""

    @abstractmethod
    def counts(self, blocks: Blocks, basis: Collection[str] = ()) -> Tensor:
        """Cost of sigma^2 in each block: [blocks] float64; with a basis [blocks, 2], the second of sigma^2 along it.

        Args:
            basis: names of the blocks that have a basis; the second cost of the others is 0.
        """

    @abstractmethod
    def factor(self, sigma: Tensor, counts: Tensor) -> float:
        """The common factor of sigma, which has the shape of the counts.

        Raises:
            ValueError: every sigma is zero, or one is not finite.
        """


@final
@dataclass(frozen=True)
class EnergyNormalizer(Normalizer):
    """factor = sqrt(sum_b N_b) / sqrt(sum_b N_b sigma_b^2), N_b the coordinates of block b that count.

    ZO Fine-tuner, arXiv:2510.00419. All coordinates of a block count, but of an embedding only
    ``embedding_rows_per_sample * batch_size`` rows do: the others take no part in a batch. Noise inside a basis has the
    energy of dense noise, so with a basis N_b (sigma_b^2 + basis_sigma_b^2) is counted.
    """

    name: ClassVar[str] = "energy"

    embedding_rows_per_sample: float = 15.0
    """Distinct rows of an embedding that one sample is expected to touch."""
    batch_size: int = 16
    """Samples per batch in meta-training. Kept in fine-tuning, so that sigma does not depend on the batch there."""
    enabled: bool = True
    """False: factor 1."""

    def __post_init__(self) -> None:
        rows, batch = self.embedding_rows_per_sample, self.batch_size
        if not (0 < rows < float("inf") and 0 < batch < float("inf")):
            raise ValueError(f"embedding_rows_per_sample={rows} and batch_size={batch} must be positive and finite")

    def counts(self, blocks: Blocks, basis: Collection[str] = ()) -> Tensor:
        dense = {block.name: self._count(block) for block in blocks}
        return _table(blocks, dense, {name: dense[name] for name in basis if name in dense})

    def factor(self, sigma: Tensor, counts: Tensor) -> float:
        return _budget(sigma, counts, "energy") if self.enabled else 1.0

    def _count(self, block: Block) -> float:
        rows = block.tensor.shape[0] if block.embedding else block.numel
        width = block.numel / max(rows, 1)
        touched = self.embedding_rows_per_sample * self.batch_size
        return min(rows, touched) * width if block.embedding else rows * width


@final
@dataclass(frozen=True)
class CurvatureNormalizer(Normalizer):
    """factor = sqrt(sum_b T_b) / sqrt(sum_b T_b sigma_b^2), T_b the trace of block b's curvature.

    u^T H u, which bounds the learning rate, then has the expectation it has for MeZO: the best learning rate does not
    depend on sigma. With a basis T_b sigma_b^2 + TB_b basis_sigma_b^2 is counted.
    """

    name: ClassVar[str] = "curvature"

    traces: Mapping[str, float] = field(default_factory=dict)
    """T_b by the block's name, in any unit, measured or estimated: positive."""
    basis_traces: Mapping[str, float] = field(default_factory=dict)
    """TB_b, the expected curvature along the noise inside the basis, in the same unit."""

    def __post_init__(self) -> None:
        for name, value in (*self.traces.items(), *self.basis_traces.items()):
            if not 0 < value < float("inf"):
                raise ValueError(f"the curvature trace of block {name!r} is {value}: it must be positive and finite")

    def counts(self, blocks: Blocks, basis: Collection[str] = ()) -> Tensor:
        inside = [name for name in blocks.names if name in basis]
        for what, names, known in (
            ("trace", blocks.names, self.traces),
            ("trace inside the basis", inside, self.basis_traces),
        ):
            if lacking := [name for name in names if name not in known]:
                raise ValueError(
                    f"the curvature normalizer has no {what} of block {lacking[0]!r} ({len(lacking)} are missing): "
                    "measure the traces of this model, or use another normalizer"
                )
        return _table(blocks, self.traces, {name: self.basis_traces[name] for name in inside})

    def factor(self, sigma: Tensor, counts: Tensor) -> float:
        return _budget(sigma, counts, "curvature")


@final
@dataclass(frozen=True)
class NoNormalizer(Normalizer):
    """factor = 1: the size of sigma is learned too, hence a step-size schedule where sigma follows the run."""

    name: ClassVar[str] = "none"

    def counts(self, blocks: Blocks, basis: Collection[str] = ()) -> Tensor:
        dense = dict.fromkeys(blocks.names, 1.0)
        return _table(blocks, dense, {name: 1.0 for name in basis if name in dense})

    def factor(self, sigma: Tensor, counts: Tensor) -> float:
        return 1.0


NORMALIZERS = {kind.name: kind for kind in (EnergyNormalizer, CurvatureNormalizer, NoNormalizer)}


def normalizer_config(normalizer: Normalizer) -> dict[str, Any]:
    """The JSON values that :func:`build_normalizer` makes it from."""
    return {"name": normalizer.name, **asdict(normalizer)}  # pyright: ignore[reportArgumentType]  # all are dataclasses


def build_normalizer(name: str, **values: Any) -> Normalizer:
    """The normalizer of a name, with its fields.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"unknown tuner normalizer {name!r}: l2l has {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name](**values)


def _table(blocks: Blocks, dense: Mapping[str, float], inside: Mapping[str, float]) -> Tensor:
    rows = [(dense[name], inside.get(name, 0.0)) for name in blocks.names]
    found = torch.tensor(rows, dtype=torch.float64).reshape(len(blocks), 2)
    return found if inside else found[:, 0].clone()


def _budget(sigma: Tensor, counts: Tensor, what: str) -> float:
    """Square root of the cost of sigma 1 without a basis over the cost of this sigma."""
    spent = torch.sum(counts * sigma.detach().double() ** 2).item()
    if not 0 < spent < float("inf"):
        raise ValueError(f"sigma has {what} {spent}: it must be finite and not zero everywhere; check the tuner")
    return (torch.sum(counts if counts.ndim == 1 else counts[:, 0]).item() / spent) ** 0.5
