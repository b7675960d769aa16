"""Prior-informed directions (MeZO-GV and MeZO-Greedy) against their paper, and where the released code is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM, farthest, weights
from torch import Tensor, nn
from torch.func import functional_call

from l2l.methods.greedy import Greedy
from l2l.methods.guided import Combined, Guided, contrast
from l2l.methods.mezo import MeZO
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, Direction, dense_direction

pytestmark = pytest.mark.in_turn

LR, EPSILON, SEED = 0.01, 1e-3, 4
Weights = dict[str, Tensor]
Loss = Callable[[Weights], float]


def loss_of(model: nn.Module) -> Loss:
    return lambda at: functional_call(model, at, (), tie_weights=True).item()


def moved(at: Weights, by: float, u: Weights) -> Weights:
    return {name: value + by * u[name] for name, value in at.items()}


def noise(at: Weights, step: int, draw: int) -> Weights:
    return {n: standard_noise(n, Key(SEED, step, draw), v.shape, dtype=torch.float64) for n, v in at.items()}


def mean(us: list[Weights]) -> Weights:
    return {name: torch.stack([u[name] for u in us]).mean(0) for name in us[0]}


def dense_step(loss: Loss, at: Weights, u: Weights) -> Weights:
    g = (loss(moved(at, EPSILON, u)) - loss(moved(at, -EPSILON, u))) / (2 * EPSILON)
    return moved(at, -LR * g, u)


def ranked(loss: Loss, at: Weights, step: int, probes: int) -> list[Weights]:
    """Probes of a step, the lowest loss first."""
    return sorted((noise(at, step, i) for i in range(probes)), key=lambda z: loss(moved(at, EPSILON, z)))


@pytest.mark.parametrize(("probes", "share", "low"), [(4, 0.5, 2), (5, 0.2, 1), (3, 0.9, 2)])
@pytest.mark.parametrize("make", [Quadratic, LogisticRegression, TiedLM])
def test_guided_takes_the_steps_of_the_paper(make: type[nn.Module], probes: int, share: float, low: int):
    model = make().double()
    loss, at = loss_of(model), weights(model)
    optimizer = ZOOptimizer(model, Guided(EPSILON, probes=probes, share=share), LR, SEED)
    for step in range(20):
        optimizer.step(model)
        order = ranked(loss, at, step, probes)
        v = moved(mean(order[:low]), -1.0, mean(order[low:]))
        size = (1 / low + 1 / (probes - low)) ** 0.5
        at = dense_step(loss, at, {name: value / size for name, value in v.items()})
        assert farthest(weights(model), at) < 1e-6


@pytest.mark.parametrize("make", [Quadratic, LogisticRegression, TiedLM])
def test_greedy_takes_the_steps_of_the_paper(make: type[nn.Module]):
    model = make().double()
    loss, at = loss_of(model), weights(model)
    optimizer = ZOOptimizer(model, Greedy(EPSILON, probes=4), LR, SEED)
    for step in range(20):
        optimizer.step(model)
        at = dense_step(loss, at, ranked(loss, at, step, 4)[0])
        assert farthest(weights(model), at) < 1e-6


def test_greedy_with_one_probe_is_mezo(problem):
    greedy, mezo = problem.make().double(), problem.make().double()
    left, right = ZOOptimizer(greedy, Greedy(probes=1), LR, SEED), ZOOptimizer(mezo, MeZO(), LR, SEED)
    for _ in range(10):
        left.step(greedy)
        right.step(mezo)
    assert farthest(weights(greedy), weights(mezo)) < 1e-10


def test_guided_with_two_probes_is_mezo_along_their_difference_whichever_is_lower():
    """As the released code runs it, the choice is without effect."""
    model = TiedLM().double()
    loss, at = loss_of(model), weights(model)
    optimizer = ZOOptimizer(model, Guided(EPSILON, probes=2), LR, SEED)
    for step in range(20):
        optimizer.step(model)
        u = moved(noise(at, step, 0), -1.0, noise(at, step, 1))
        at = dense_step(loss, at, {name: value / 2**0.5 for name, value in u.items()})
    assert farthest(weights(model), at) < 1e-9


def slopes(method: MeZO | Guided | Greedy, steps: int = 250) -> float:
    """Mean squared projected gradient along a linear loss whose gradient has length 1: 1 along plain noise."""
    model = nn.Linear(16, 1, bias=False).double()
    gradient = torch.full((16,), 0.25, dtype=torch.float64)
    optimizer, total = ZOOptimizer(model, method, 1e-9, SEED), 0.0
    for _ in range(steps):
        optimizer.step(lambda: (model.weight[0] * gradient).sum())
        assert optimizer.report is not None
        total += optimizer.report.projected_gradient**2 / steps
    return total


@pytest.mark.parametrize(("method", "wanted"), [(Guided(), 2.10), (Greedy(), 1.55), (Greedy(probes=2), 1.0)])
def test_how_much_more_of_the_gradient_is_seen_than_by_chance(method: Guided | Greedy, wanted: float):
    """Of four normal numbers the least squared is 1.55 in the mean; half of two upper less two lower squared 2.10."""
    assert slopes(method) == pytest.approx(wanted, rel=0.25)


def test_a_guide_has_mean_square_one_and_is_the_sum_of_its_streams():
    model = nn.Linear(200, 300).double()
    blocks = Blocks.of(model)
    keys = [Key(3, 1, i) for i in range(5)]
    guide = Combined(dict(zip(keys, contrast([0.3, 0.1, 0.5, 0.2, 0.4], 2), strict=True)))
    u = dense_direction(Direction(keys[0], (1.0, 1.0), shape=guide), blocks, 0)
    assert (u**2).mean().item() == pytest.approx(1, rel=0.03)
    z = [standard_noise("weight", key, u.shape, dtype=torch.float64) for key in keys]
    wanted = ((z[1] + z[3]) / 2 - (z[0] + z[2] + z[4]) / 3) / (1 / 2 + 1 / 3) ** 0.5
    torch.testing.assert_close(u, wanted, rtol=1e-9, atol=1e-9)


def test_tensors_of_one_shape_are_guided_by_noise_of_their_own():
    model = nn.ModuleDict({"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 6, bias=False)}).double()
    guide = Combined({Key(3): 1.0, Key(3, 0, 1): -1.0})
    direction = Direction(Key(3), (1.0, 1.0), shape=guide)
    first, second = (dense_direction(direction, Blocks.of(model), i) for i in range(2))
    assert abs(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)) < 0.5


@pytest.mark.parametrize(("method", "passes"), [(Guided(probes=5), 7), (Greedy(probes=5), 6)])
def test_probes_of_a_step_are_its_own(method: Guided | Greedy, passes: int):
    model, looked = TiedLM().double(), []

    def watched() -> Tensor:
        looked.append(model.norm.bias.detach().clone())
        return model()

    optimizer = ZOOptimizer(model, method, 1e-12, SEED)
    for _ in range(2):
        optimizer.step(watched)
    assert len(looked) == 2 * passes
    offsets = torch.stack(looked)[[*range(5), *range(passes, passes + 5)]]
    assert torch.linalg.matrix_rank(offsets) == min(10, model.norm.bias.numel())
    assert len(torch.unique(offsets[:, 0])) == 10


def test_coefficients_tell_low_from_high():
    assert contrast([2.0, 1.0], 1) == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert sum(c**2 for c in contrast([5.0, 1, 4, 2, 3], 2)) == pytest.approx(1)


def test_values_that_make_no_sense_are_refused():
    for kind in (Guided, Greedy):
        with pytest.raises(ValueError, match="probes=0 must be a whole number"):
            kind(probes=0)
        with pytest.raises(ValueError, match="epsilon=-1 must be positive"):
            kind(epsilon=-1)
    with pytest.raises(ValueError, match="probes=1 must be at least 2"):
        Guided(probes=1)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"share={share} must be above 0"):
            Guided(share=share)
