"""MeZO-GV: the two-point estimate along a guide, the contrast of probes with low and with high losses.

Jin et al. 2026, arXiv:2601.04710 (MeZO-GV). Of M probes z_j, v = mean(z of the lowest losses) - mean(z of the rest);
then a two-point estimate along v. Differs from the released code in that
- v has mean square 1 per coordinate (it is divided by sqrt(1 / k + 1 / (M - k)), k of M being low), so that lr and
  epsilon mean what they do for MeZO;
- v is made from its keys whenever it is needed: nothing is stored, and probes, estimate and update use the same noise
  (the code seeds again for each tensor, so that v is no combination of the probes, and equal shapes get equal noise);
- no probe of an earlier step is used again.
A two-point estimate does not depend on the sign of v. With two probes, as in the code, v is their difference, whichever
had the lower loss: MeZO along fresh noise at twice the price. From three on, the choice has an effect.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch

from l2l.methods import base
from l2l.methods.base import Block, DirectionOperator, Distribution, Estimates, Key, LossEvaluator
from l2l.noise import NoiseTerm, TensorSlice, add_noise, computed_in, standard_deviation


@final
class Combined(DirectionOperator):
    """A sum of noise streams, with a coefficient each: sum c_j z_j."""

    def __init__(self, coefficients: Mapping[Key, float]) -> None:
        self._coefficients = dict(coefficients)

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> torch.Tensor:
        out = torch.zeros(block.numel, dtype=computed_in(block.tensor.dtype), device=block.tensor.device)
        unit = 1 / standard_deviation(distribution)
        terms = [NoiseTerm(own, [(weight * unit,)], distribution) for own, weight in self._coefficients.items()]
        add_noise([TensorSlice(out, block.name)], terms)
        return out.view(block.tensor.shape)


@final
@dataclass(frozen=True)
class Guided(base.CustomEstimator[None]):
    """MeZO along a guide: probes of low loss against those of high loss."""

    info: ClassVar = base.MethodInfo("Jin et al. 2026, arXiv:2601.04710, MeZO-GV")
    counts = ("probes",)
    num_directions: int = field(default=1, init=False)
    probes: int = 4
    """M, evaluated to one side."""
    share: float = 0.5
    """Fraction of the probes that count as low, alpha: at least one, and never all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share} must be above 0 and below 1")
        if self.probes == 1:
            raise ValueError("probes=1 must be at least 2: one is low and another is high")

    @property
    def passes(self) -> float:
        return self.probes + 2.0

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[Estimates, None]:
        probes = base.directions_of(self, evaluator, state, self.probes)
        losses = [evaluator.along(probe, self.epsilon) for probe in probes]
        low = min(max(round(self.share * self.probes), 1), self.probes - 1)
        guide = Combined(dict(zip([probe.key for probe in probes], contrast(losses, low), strict=True)))
        towards = self.unit_direction(evaluator.theta.blocks, evaluator.key, guide)
        return (evaluator.two_point(towards, self.epsilon),), state


def contrast(losses: Sequence[float], low: int) -> list[float]:
    """Coefficients whose squares add up to 1: positive for the ``low`` lowest losses, negative for the others."""
    high = len(losses) - low
    order = sorted(range(len(losses)), key=losses.__getitem__)
    unit = math.sqrt(1 / low + 1 / high)
    return [1 / low / unit if i in order[:low] else -1 / high / unit for i in range(len(losses))]
