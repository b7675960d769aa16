"""Where one method is another in disguise, the two agree bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from cases import ALONG_NOISE, MethodCase, Problem, TiedLM, named, same_bits, weights
from torch import Tensor, nn

from l2l.methods.base import Method
from l2l.methods.dizo import DiZO
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, Direction
from l2l.tuners.api import Tuner
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.networks import TunerNetwork
from l2l.tuners.normalize import EnergyNormalizer


@final
class AlwaysOne(TunerNetwork):
    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        return torch.ones(len(features))


def run(model: nn.Module, method: Method, steps: int = 10, seed: int = 0) -> dict[str, Tensor]:
    optimizer = ZOOptimizer(model, method, lr=0.01, seed=seed)
    for _ in range(steps):
        optimizer.step(model)
    return weights(model)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("num_directions", [1, 2])
def test_learned_with_a_tuner_that_says_one_is_mezo(problem: Problem, distribution: Any, num_directions: int):
    model = problem.make()
    tuner = Tuner(AlwaysOne(), Fingerprint.of(model), EnergyNormalizer(), "always_one", {})
    learned = run(model, Learned(tuner, num_directions=num_directions, distribution=distribution))
    mezo = run(problem.make(), MeZO(num_directions=num_directions, distribution=distribution))
    assert same_bits(learned, mezo)


@pytest.mark.parametrize("search", ["zo", "fo"])
def test_dizo_before_its_first_search_is_mezo(problem: Problem, search: Any):
    model, other = problem.make(), problem.make()
    dizo = run(model, DiZO(interval=11, search=search))
    assert same_bits(dizo, run(other, MeZO()))


def test_a_search_of_dizo_that_stays_at_ratio_one_is_mezo(problem: Problem):
    still = DiZO(interval=2, iterations=1, step_size=1e-300)
    assert same_bits(run(problem.make(), still), run(problem.make(), MeZO()))


def test_scaling_every_sigma_changes_nothing_once_normalised(problem: Problem):
    model = problem.make().double()
    blocks = Blocks.of(model)
    normalizer = EnergyNormalizer()
    sigma = torch.rand(len(blocks), generator=torch.Generator().manual_seed(0)) + 0.1
    factors = [normalizer.factor(scale * sigma, normalizer.counts(blocks)) * scale for scale in (1.0, 4.0, 0.25)]
    assert factors == pytest.approx([factors[0]] * 3, rel=1e-7)


@final
@dataclass(frozen=True)
class SameDrawEveryTime(Method[None]):
    """MeZO whose directions are all the first one."""

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        return super().direction(blocks, state, key.with_draw(0))


def test_the_same_draw_taken_four_times_is_that_draw_taken_once(problem: Problem):
    once, often = problem.make().double(), problem.make().double()
    left, right = run(once, MeZO(), 3), run(often, SameDrawEveryTime(num_directions=4), 3)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-9, atol=1e-11)


def test_more_draws_begin_with_the_same_draw(problem: Problem):
    directions = []
    for num_directions in (1, 3):
        model = problem.make()
        optimizer = ZOOptimizer(model, MeZO(num_directions=num_directions))
        optimizer.step(model)
        assert optimizer.report is not None
        directions.append(optimizer.report.estimates[0].direction)
    assert directions[0] == directions[1]


@pytest.mark.parametrize("case", ALONG_NOISE, ids=named)
def test_freezing_one_block_does_not_change_where_the_others_look(case: MethodCase):
    looks = []
    for frozen in (None, "attention.out.weight"):
        model = TiedLM()
        method = case.make(model)
        if frozen:
            model.get_parameter(frozen).requires_grad_(False)
        optimizer = ZOOptimizer(model, method)
        before, seen = weights(model), []

        def watched(model: TiedLM = model, seen: list = seen) -> Tensor:
            seen.append(weights(model))
            return model()

        optimizer.step(watched)
        assert optimizer.report is not None
        factor = optimizer.report.estimates[0].direction.factor
        looks.append({name: (seen[0][name] - value) / factor for name, value in before.items() if name != frozen})
    whole, part = looks
    for name in part:
        torch.testing.assert_close(part[name], whole[name], rtol=1e-3, atol=1e-6)


class Swapped(nn.Module):
    """The parameters of two linear maps, registered in one order or the other."""

    a: Tensor
    b: Tensor

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            generator = torch.Generator().manual_seed(ord(name))
            self.register_parameter(name, nn.Parameter(torch.randn(4, 4, generator=generator)))

    def forward(self) -> Tensor:
        return ((self.a @ self.b - 1) ** 2).mean()


def test_the_order_of_parameters_changes_no_bit_of_mezo():
    left, right = Swapped(("a", "b")), Swapped(("b", "a"))
    assert [name for name, _ in left.named_parameters()] != [name for name, _ in right.named_parameters()]
    one, two = run(left, MeZO()), run(right, MeZO())
    assert all(torch.equal(one[name], two[name]) for name in one)
