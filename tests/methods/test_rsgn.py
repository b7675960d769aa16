"""Random-subspace Gauss-Newton: exact on a linear model, and each of its parts where it matters."""

import pytest
import torch

import l2l
from l2l.estimators import BatchOutputs, DirectionalStatistics, balanced, directional_statistics, subspace_newton
from l2l.methods.registry import build_method
from l2l.methods.rsgn import RSGN
from l2l.noise import Key
from l2l.optim import zo_step
from l2l.params import Blocks, PerturbedParameters, dense_direction

B, D, K = 6, 5, 3


def problem(seed: int = 0) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(D, K, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(K, D, generator=generator))
    return model, torch.randn(B, D, generator=generator, dtype=torch.float64), torch.randint(0, K, (B,), generator=generator)


def test_a_step_is_the_damped_newton_step_within_its_directions():
    model, x, y = problem()
    theta = PerturbedParameters(Blocks.of(model))
    before = model.weight.detach().clone()
    method = RSGN(num_directions=3, epsilon=1e-6)
    _, report = zo_step(lambda: (model(x), y), theta, method, method.init(theta.blocks), Key(3), [0.5])
    directions = [dense_direction(e.direction, theta.blocks, 0) for e in report.estimates]

    def at(weight: torch.Tensor) -> BatchOutputs:
        return BatchOutputs.of((x @ weight.T, y))

    seen = directional_statistics(at(before), [at(before + 1e-6 * u) for u in directions], None, 1e-6)
    assert seen.signal is not None
    signal = max(seen.signal, 0.002 * seen.curvature_along)
    lengths = subspace_newton(seen, signal, method.damping, method.gain, method.trust)
    wanted = before - 0.5 * sum(a * u for a, u in zip(lengths, directions, strict=True))
    torch.testing.assert_close(model.weight.detach(), wanted, rtol=0, atol=1e-7)
    assert report.passes == 4
    assert [e.projected_gradient for e in report.estimates] == pytest.approx(seen.mean.tolist(), abs=1e-4)


def test_directions_of_the_top_blocks_move_these_alone_and_are_damped_as_the_others_are():
    """Two layers, the upper one a tenth as steep: a step is the damped step within rescaled directions of both kinds."""
    generator = torch.Generator().manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Linear(D, D, bias=False), torch.nn.Linear(D, K, bias=False)).double()
    x, y = torch.randn(B, D, generator=generator, dtype=torch.float64), torch.randint(0, K, (B,), generator=generator)
    theta = PerturbedParameters(Blocks.of(model))
    before = [p.detach().clone() for p in model.parameters()]
    method = RSGN(num_directions=2, top_directions=3, top_blocks=("1.weight",), epsilon=1e-6)
    assert (method.passes, method.whole_passes) == (6, 3)
    _, report = zo_step(lambda: (model(x), y), theta, method, method.init(theta.blocks), Key(3), [0.5, 0.5])
    directions = [[dense_direction(e.direction, theta.blocks, i) for i in (0, 1)] for e in report.estimates]
    assert [bool(lower.any()) for lower, _ in directions] == [True, True, False, False, False]
    assert all(upper.any() for _, upper in directions) and report.passes == 6

    def at(*weights: torch.Tensor) -> BatchOutputs:
        return BatchOutputs.of((x @ weights[0].T @ weights[1].T, y))

    plus = [at(*(w + 1e-6 * u for w, u in zip(before, direction, strict=True))) for direction in directions]
    seen, factors = balanced(directional_statistics(at(*before), plus, None, 1e-6), 2)
    assert seen.signal is not None
    signal = max(seen.signal, 0.002 * seen.curvature_along)
    lengths = factors * subspace_newton(seen, signal, method.damping, method.gain, method.trust)
    for index, (parameter, weight) in enumerate(zip(model.parameters(), before, strict=True)):
        wanted = weight - 0.5 * sum(a * u[index] for a, u in zip(lengths, directions, strict=True))
        torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=1e-7)


def test_balanced_statistics_are_those_of_directions_of_another_length():
    generator = torch.Generator().manual_seed(0)
    derivatives = torch.randn(8, 5, generator=generator, dtype=torch.float64) * torch.tensor([1, 1, 0.01, 0.01, 0.01])
    seen = DirectionalStatistics(derivatives, derivatives.T @ derivatives / 8)
    scaled, factors = balanced(seen, 2)
    assert factors[:2].tolist() == [1, 1] and factors[2] == factors[3] == factors[4] > 10
    torch.testing.assert_close(scaled.curvature, scaled.derivatives.T @ scaled.derivatives / 8)
    diagonal = scaled.curvature.diag()
    assert diagonal[:2].mean() == pytest.approx(diagonal[2:].mean().item())
    flat = DirectionalStatistics(derivatives, torch.zeros(5, 5, dtype=torch.float64))
    assert balanced(flat, 2)[1].tolist() == [1] * 5, "nothing to compare: the factors stay 1"


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_a_number_of_top_directions_that_is_none_is_refused(count: object):
    with pytest.raises(ValueError, match=f"top_directions={count!r} must be a whole number, at least 0"):
        RSGN(top_directions=count)  # type: ignore[arg-type]


def test_a_sigma_acts_before_a_direction_is_restricted():
    model = torch.nn.Sequential(torch.nn.Linear(D, D, bias=False), torch.nn.Linear(D, K, bias=False))
    tuner = l2l.Tuner.for_model(model)
    args = {"rsgn": {"num_directions": 1, "top_directions": 2, "top_blocks": ["1.weight"]}}
    optimizer = l2l.ZOOptimizer(model, build_method("learned+rsgn", 1e-3, args, tuner, model), lr=1.0)
    x, y = torch.randn(B, D), torch.randint(0, K, (B,))
    optimizer.step(lambda: (model(x), y))
    assert optimizer.report is not None
    first, *top = [estimate.direction for estimate in optimizer.report.estimates]
    assert [(one.sigma[0], one.sigma[1] == first.sigma[1]) for one in top] == [(0.0, True)] * 2 and first.sigma[0] > 0


@pytest.mark.parametrize("form", ["logits", "losses", "scalar"])
def test_it_descends_whatever_the_closure_returns(form: str):
    model, x, y = problem(1)

    def closure():
        losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        return {"logits": (model(x), y), "losses": losses, "scalar": losses.mean()}[form]

    optimizer = l2l.optim.RSGN(model, num_directions=4, lr=0.3 if form == "scalar" else 1.0)
    first = optimizer.step(closure)
    for _ in range(60):
        last = optimizer.step(closure)
    assert last < 0.8 * first


def test_the_unit_of_the_loss_does_not_change_a_step_by_losses_per_example():
    moves = []
    for unit in (1.0, 1000.0):
        model, x, y = problem(2)
        before = model.weight.detach().clone()
        optimizer = l2l.optim.RSGN(model, num_directions=4, epsilon=1e-6)
        optimizer.step(lambda m=model, x=x, y=y, f=unit: f * torch.nn.functional.cross_entropy(m(x), y, reduction="none"))
        moves.append(model.weight.detach() - before)
    torch.testing.assert_close(moves[0], 1000 * moves[1], rtol=1e-4, atol=1e-9)


def test_stiff_directions_do_not_shorten_the_steps_along_the_others():
    """One input thirty times as long as the others: MeZO's learning rate is bound by it, this method's step is not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    y = (x[:, 1:] @ torch.ones(7, dtype=torch.float64) > 0).long()
    x[:, 0] = 30.0 * torch.sign(torch.randn(64, generator=generator, dtype=torch.float64))
    ends = {}
    for name, steps, options in (("RSGN", 60, {"num_directions": 12, "lr": 1.0}), ("MeZO", 390, {"lr": "auto"})):
        model = torch.nn.Linear(8, 2, bias=False).double()
        with torch.no_grad():
            model.weight.zero_()
        optimizer = getattr(l2l.optim, name)(model, seed=1, **options)
        for _ in range(steps):
            optimizer.step(lambda m=model: (m(x), y))
        ends[name] = torch.nn.functional.cross_entropy(model(x), y).item()
    assert ends["RSGN"] < 0.8 * ends["MeZO"]


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"gain": -1.0}, {"trust": 0.0}, {"signal_decay": 1.0}])
def test_values_out_of_range_are_refused(options: dict):
    with pytest.raises(ValueError, match=next(iter(options))):
        RSGN(**options)
