"""What a closure may return, to every method: a scalar, losses per example, or logits and targets."""

import pytest
from cases import METHODS, LogisticRegression, MethodCase, farthest, named, weights
from torch.nn import functional

import l2l
from l2l.estimators import Closure
from l2l.optim import ZOOptimizer


def closure_of(model: LogisticRegression, form: str) -> Closure:
    losses = lambda: functional.cross_entropy(model.linear(model.x), model.y, reduction="none")  # noqa: E731
    return {"scalar": model, "losses": losses, "logits": lambda: (model.linear(model.x), model.y)}[form]


@pytest.mark.parametrize("case", METHODS, ids=named)
def test_the_step_is_that_of_the_mean_loss_whatever_is_returned(case: MethodCase):
    ends = {}
    for form in ("scalar", "losses", "logits"):
        model = LogisticRegression().double()
        method = case.make(model)
        if method.reads_outputs:
            pytest.skip("it makes more of outputs than their mean: tests/methods has its own")
        optimizer = ZOOptimizer(model, method, lr=1e-3, seed=1)
        for _ in range(3):
            loss = optimizer.step(closure_of(model, form))
            assert isinstance(loss, float)
        ends[form] = weights(model)
    assert farthest(ends["scalar"], weights(LogisticRegression().double())) > 0
    for form in ("losses", "logits"):  # pseuzo's outputs are others then, so its difference is of second order
        assert farthest(ends["scalar"], ends[form]) < (1e-4 if case.name == "pseuzo" else 1e-8)


@pytest.mark.parametrize("form", ["losses", "logits"])
def test_auto_reads_curvature_and_signal_from_outputs_in_two_passes_a_step(form: str):
    model = LogisticRegression().double()
    optimizer = l2l.MeZO(model, lr="auto", seed=0)
    first, passes, curvatures = optimizer.step(closure_of(model, form)), [], []
    for _ in range(40):
        last = optimizer.step(closure_of(model, form))
        assert optimizer.report is not None
        passes.append(optimizer.report.passes)
        curvatures.append(optimizer.report.curvature)
    assert set(passes) == {2}
    assert all(value is not None and value > 0 for value in curvatures)
    state = optimizer.curvature_lr_state
    assert state.signal_share is not None
    assert 0 < state.signal_share < 1
    assert optimizer.report.lr[0] == pytest.approx(0.5 * state.signal_share / state.average)
    assert last < 0.9 * first


def test_a_step_fraction_that_is_given_is_obeyed_and_schedulers_scale_the_measured_one():
    rates = {}
    for name, fraction, factor in (("given", 0.2, 1.0), ("measured", None, 1.0), ("scaled", None, 0.5)):
        model = LogisticRegression().double()
        optimizer = l2l.MeZO(model, lr="auto", step_fraction=fraction)
        optimizer.param_groups[0]["lr"] *= factor
        for _ in range(3):
            optimizer.step(closure_of(model, "logits"))
        assert optimizer.report is not None
        rates[name] = optimizer.report.lr[0], optimizer.curvature_lr_state
    rate, state = rates["given"]
    assert rate == pytest.approx(0.2 / state.average)
    assert rates["scaled"][0] == pytest.approx(0.5 * rates["measured"][0])


def test_a_closure_that_turns_to_scalars_is_measured_by_a_third_loss_again():
    model = LogisticRegression().double()
    optimizer = l2l.MeZO(model, lr="auto")
    passes = []
    for form in ("logits", "logits", "scalar", "scalar"):
        optimizer.step(closure_of(model, form))
        assert optimizer.report is not None
        passes.append(optimizer.report.passes)
    assert passes == [3, 2, 2, 3]


@pytest.mark.parametrize("method", ["MeZO", "AGZO", "LOZO"])
def test_one_sided_and_shaped_estimates_read_outputs_too(method: str):
    model = LogisticRegression().double()
    options = {"estimator": "one_sided", "num_directions": 3} if method == "MeZO" else {}
    optimizer = getattr(l2l.optim, method)(model, lr="auto", **options)
    for _ in range(4):
        optimizer.step(closure_of(model, "logits"))
    assert optimizer.report is not None
    assert optimizer.report.curvature is not None
    assert optimizer.report.passes == optimizer.method.passes


@pytest.mark.parametrize("case", METHODS, ids=named)
def test_a_method_that_says_so_evaluates_theta_first_and_then_along_directions_alone(case: MethodCase):
    model = LogisticRegression().double()
    optimizer = ZOOptimizer(model, case.make(model), lr=1e-3, seed=1)
    where = []

    def noted():
        where.append(optimizer.theta.displacement.distance)
        return closure_of(model, "logits")()

    optimizer.step(noted)
    first, *others = where
    if getattr(optimizer.method, "from_center", False):
        assert first == 0
        assert others
        assert all(distance > 0 for distance in others)
    elif case.name in ("rsgn", "fzoo"):
        pytest.fail("these are known to")
