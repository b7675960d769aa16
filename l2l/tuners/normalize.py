"""Normalizers: the common factor of sigma that keeps a budget constant, whatever the overall size of sigma."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, final

import torch

from l2l.params import Block, Blocks


class Normalizer(ABC):
    """Abstract normalizer, a frozen dataclass of JSON values: a cost per block, and the factor that spends MeZO's budget.

    The factor is a constant of the step: no gradient flows through it.
    """

    name: ClassVar[str]
    """Its name in a tuner's config."""

    @abstractmethod
    def costs(self, blocks: Sequence[Block], along_basis: bool) -> list[float]:
        """Cost of sigma^2 in each of these blocks, or of sigma^2 along its basis."""

    def counts(self, blocks: Blocks, basis: Collection[str] = ()) -> torch.Tensor:
        """Cost of sigma^2 in each block: [blocks] float64; with a basis [blocks, 2], the second of sigma^2 along it.

        The second is 0 for blocks that ``basis`` does not name.
        """
        dense = torch.tensor(self.costs(blocks, along_basis=False), dtype=torch.float64)
        inside = [i for i, name in enumerate(blocks.names) if name in basis]
        if not inside:
            return dense
        along = torch.zeros_like(dense)
        along[inside] = torch.tensor(self.costs([blocks[i] for i in inside], along_basis=True), dtype=torch.float64)
        return torch.stack([dense, along], 1)

    def factor(self, sigma: torch.Tensor, counts: torch.Tensor) -> float:
        """Square root of the cost of sigma 1 without a basis over that of this sigma, which has the shape of the counts.

        ValueError where every sigma is zero, or one is not finite.
        """
        spent = torch.sum(counts * sigma.detach().double() ** 2).item()
        if not 0 < spent < float("inf"):
            raise ValueError(f"sigma has {self.name} {spent}: it must be finite and not zero everywhere; check the tuner")
        return (torch.sum(counts if counts.ndim == 1 else counts[:, 0]).item() / spent) ** 0.5


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

    def costs(self, blocks: Sequence[Block], along_basis: bool) -> list[float]:
        touched, found = self.embedding_rows_per_sample * self.batch_size, list[float]()
        for block in blocks:
            rows = block.tensor.shape[0] if block.embedding else block.numel
            found.append((min(rows, touched) if block.embedding else rows) * (block.numel / max(rows, 1)))
        return found

    def factor(self, sigma: torch.Tensor, counts: torch.Tensor) -> float:
        return super().factor(sigma, counts) if self.enabled else 1.0


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

    def costs(self, blocks: Sequence[Block], along_basis: bool) -> list[float]:
        known, what = (self.basis_traces, "trace inside the basis") if along_basis else (self.traces, "trace")
        if lacking := [block.name for block in blocks if block.name not in known]:
            absent = f"no {what} of block {lacking[0]!r} ({len(lacking)} are missing)"
            way = "measure the traces of this model, or use another normalizer"
            raise ValueError(f"the curvature normalizer has {absent}: {way}")
        return [known[block.name] for block in blocks]


@final
@dataclass(frozen=True)
class NoNormalizer(Normalizer):
    """factor = 1: the size of sigma is learned too, hence a step-size schedule where sigma follows the run."""

    name: ClassVar[str] = "none"

    def costs(self, blocks: Sequence[Block], along_basis: bool) -> list[float]:
        return [1.0] * len(blocks)

    def factor(self, sigma: torch.Tensor, counts: torch.Tensor) -> float:
        return 1.0


NORMALIZERS = {kind.name: kind for kind in (EnergyNormalizer, CurvatureNormalizer, NoNormalizer)}


def normalizer_config(normalizer: Normalizer) -> dict[str, Any]:
    """The JSON values that :func:`build_normalizer` makes it from."""
    return {"name": normalizer.name, **asdict(normalizer)}  # pyright: ignore[reportArgumentType]  # all are dataclasses


def build_normalizer(name: str, **values: Any) -> Normalizer:
    """The normalizer of a name, with its fields; ValueError where there is none."""
    if name not in NORMALIZERS:
        raise ValueError(f"unknown tuner normalizer {name!r}: l2l has {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name](**values)
