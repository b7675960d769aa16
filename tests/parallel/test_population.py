"""A population over workers, without a transport: where it can be spread it is the step of one process, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import TiedLM

from l2l.estimators import MicroBatched
from l2l.methods import method_names
from l2l.methods.base import FirstOrder
from l2l.methods.registry import build_method
from l2l.optim import Logged, ZOOptimizer
from l2l.parallel.population import Answers, deal, evaluate_points, members_of, plan_points

REFUSED = {
    **dict.fromkeys(("adamw", "sgd"), "no directions"),
    **dict.fromkeys(("agzo", "conservative", "dizo", "forward_grad", "greedy", "guided", "pseuzo", "svrg"), "earlier ones"),
    "adamu": "1 direction",
}
"""Methods that cannot be spread, and why."""
SPREAD = sorted({*method_names()} - REFUSED.keys() - {"learned"})  # a tuner's sigma is fixed before the step, as a mask's is


MODELS: dict[int, TiedLM] = {}
"""Of optimizers, which do not keep theirs alive."""


def kept(optimizer: ZOOptimizer, model: TiedLM) -> ZOOptimizer:
    MODELS[id(optimizer)] = model
    return optimizer


def optimizer(name: str, **options: Any) -> ZOOptimizer:
    model = TiedLM()
    own = name in REFUSED or build_method(name, 1e-3, {}, None, model).num_directions in (8, 15, 16)
    method = build_method(name, 1e-3, {} if own else {"num_directions": 3}, None, model)
    return kept(ZOOptimizer(model, method, 1e-3, perturb="functional", **options), model)


def model_of(one: ZOOptimizer) -> TiedLM:
    return MODELS[id(one)]


def spread_step(one: ZOOptimizer, workers: int, absent: tuple[int, ...] = ()) -> None:
    """A step of ``one``, whose points as many workers evaluate."""
    points, values = plan_points(one), {}
    for part in deal(points, workers):
        values |= dict(zip(part, evaluate_points(model_of(one), one.theta, [points[i] for i in part]), strict=True))
    there = {i: value for i, value in values.items() if points[i].member not in absent}
    one.step(Answers(one.theta, points, there, absent), left_out=lambda: list(absent))


def weights(one: ZOOptimizer) -> list[torch.Tensor]:
    return [block.tensor.detach().clone() for block in one.blocks]


@pytest.mark.parametrize("name", SPREAD)
def test_a_step_spread_over_three_workers_is_the_step_of_one_process(name: str):
    alone, spread = optimizer(name), optimizer(name)
    for _ in range(2):
        alone.step(model_of(alone))
        spread_step(spread, 3)
    assert all(map(torch.equal, weights(alone), weights(spread)))
    assert alone.report is not None and spread.report is not None
    assert alone.report.passes == spread.report.passes


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_cannot_be_spread_say_why(name: str):
    with pytest.raises(ValueError, match=REFUSED[name]):
        plan_points(optimizer(name))


def test_every_method_is_either_spread_or_refused():
    assert {*SPREAD, *REFUSED, "learned"} == {*method_names()}


def test_every_way_out_of_a_step_that_cannot_be_spread_is_taken():
    model = TiedLM()
    with pytest.raises(ValueError, match="use perturb='functional'"):
        plan_points(ZOOptimizer(model, build_method("es", 1e-3, {}, None, model), 1e-3, perturb="in_place"))
    assert plan_points(ZOOptimizer(model, build_method("es", 1e-3, {}, None, model), 1e-3, perturb="functional"))
    with pytest.raises(ValueError, match="set --num_directions"):
        plan_points(ZOOptimizer(model, build_method("mezo", 1e-3, {}, None, model), 1e-3, perturb="functional"))
    several = build_method("mezo", 1e-3, {"num_directions": 2}, None, model)
    assert len(plan_points(ZOOptimizer(model, several, 1e-3, perturb="functional"))) == 4


@pytest.mark.parametrize("auto", [False, True])
def test_lr_auto_measures_the_same_curvature(auto: bool):
    def made() -> ZOOptimizer:
        model = TiedLM()
        method = build_method("mezo", 1e-3, {"num_directions": 3}, None, model)
        return kept(ZOOptimizer(model, method, "auto" if auto else 1e-3, perturb="functional"), model)

    alone, spread = made(), made()
    for _ in range(4):
        alone.step(model_of(alone))
        spread_step(spread, 2)
    assert alone.curvature_lr_state == spread.curvature_lr_state
    assert all(map(torch.equal, weights(alone), weights(spread)))


@pytest.mark.parametrize("name", ["mezo", "es", "fzoo", "rsgn", "sparse_mezo"])
def test_a_step_without_some_directions_is_logged_and_replayed(name: str):
    run, again = optimizer(name), optimizer(name)
    for absent in [(), (1,), (0, 2), ()]:
        spread_step(run, 2, absent)
        report = run.report
        assert report is not None
        draws = [estimate.direction.key.draw for estimate in report.estimates]
        assert not {*draws} & {*absent}
        assert len(draws) == run.method.num_directions - len(absent)  # type: ignore[union-attr]
        again.step(Logged(report.evaluations, report.readings), left_out=tuple)
    assert all(map(torch.equal, weights(run), weights(again)))


def test_a_step_with_all_directions_but_one_is_another_step():
    whole, part = optimizer("mezo"), optimizer("mezo")
    spread_step(whole, 2)
    spread_step(part, 2, (1,))
    assert not all(map(torch.equal, weights(whole), weights(part)))


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
def test_members_are_dealt_whole_and_the_first_worker_has_theta(workers: int):
    points = plan_points(optimizer("hizoo"))
    parts = deal(points, workers)
    assert sorted(i for part in parts for i in part) == list(range(len(points)))
    for member in members_of(points):
        assert sum(any(points[i].member == member for i in part) for part in parts) == 1
    assert points[parts[0][0]].member is None


def test_planning_and_evaluating_leave_theta_as_it_was():
    one = optimizer("es")
    before = weights(one)
    points = plan_points(one)
    evaluate_points(model_of(one), one.theta, points[:3])
    with pytest.raises(ZeroDivisionError):
        evaluate_points(lambda: 1 / 0, one.theta, points[:1])
    assert all(map(torch.equal, before, weights(one)))
    assert one.theta.displacement.restored


def test_workers_evaluate_theta_first_where_a_closure_keeps_its_first_evaluation():
    one, seen = optimizer("es"), list[float]()

    class Keeps:
        keeps_first = True

        def __call__(self) -> float:
            seen.append(one.theta.displacement.distance)
            return float(len(seen))

    own = [point for point in plan_points(one) if point.member is not None][:2]
    assert evaluate_points(Keeps(), one.theta, own) == [2.0, 3.0], "what theta gives is not sent"
    assert seen[0] == 0 and all(seen[1:])
    seen.clear()
    whole = MicroBatched((Keeps(), Keeps()), (0.5, 0.5))
    evaluate_points(whole, one.theta, own[:1])
    assert seen[:2] == [0, 0] and len(seen) == 4


def test_a_step_that_asks_for_a_point_that_was_not_planned_is_refused():
    one = optimizer("mezo")
    points = plan_points(one)
    with pytest.raises(ValueError, match="elsewhere than was planned"):
        one.step(Answers(one.theta, points[1:], dict.fromkeys(range(len(points)), 1.0)))


def test_first_order_methods_have_no_directions_to_spread():
    assert all(isinstance(optimizer(name).method, FirstOrder) for name in ("adamw", "sgd"))
