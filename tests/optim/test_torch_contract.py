"""The contract of ``torch.optim.Optimizer``, held by every method: copies, states, groups, schedulers, hooks, refusals.

The kind of fault (A4 of the issue): half of the contract was kept, so that copies lost the engine and states shared tensors.
Situations from public trackers, in our words: pytorch/pytorch#196083 (two optimizers share state after ``load_state_dict``),
dotnet/TorchSharp#1172 (a state loaded from another device stays there), huggingface/accelerate#4274 (a wrapped closure
optimizer), skorch-dev/skorch#207 (a trainer that steps without a closure).
"""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import METHODS, PROBLEMS, MethodCase, Quadratic, TiedLM, farthest, named, optimizer_for, same_bits, weights
from torch import Tensor, nn
from torch.optim import lr_scheduler

import l2l
from l2l.methods.adamw import AdamW
from l2l.methods.mezo import MeZO
from l2l.methods.sgd import SGD
from l2l.optim import ZOOptimizer, _copied

pytestmark = pytest.mark.in_turn

SMALL = PROBLEMS[0]
every_method = pytest.mark.parametrize("case", METHODS, ids=named)
Pair = tuple[nn.Module, ZOOptimizer]


def run(pair: Pair, steps: int) -> Pair:
    model, optimizer = pair
    for _ in range(steps):
        optimizer.step(model)
    return pair


def started(case: MethodCase, steps: int = 3) -> Pair:
    model = SMALL.make()
    return run((model, optimizer_for(case, model, SMALL)), steps)


def saved(pair: Pair) -> Pair:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Pair], Pair]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@every_method
def test_a_copy_continues_bit_for_bit_and_apart(case: MethodCase, how: str):
    pair = started(case)
    twin = COPIES[how](pair)
    assert same_bits(weights(pair[0]), weights(twin[0]))
    run(twin, 2)  # does not touch the original
    apart = weights(twin[0])
    assert same_bits(apart, weights(run(pair, 2)[0]))
    run(twin, 1)
    assert not same_bits(weights(pair[0]), weights(twin[0]))


@pytest.mark.parametrize("method", [SGD(), AdamW()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_first_order_baseline_continues_bit_for_bit(how: str, method: Any):
    model = Quadratic()
    pair = run((model, ZOOptimizer(model, method, lr=0.01)), 2)
    twin = COPIES[how](pair)
    assert same_bits(weights(run(pair, 2)[0]), weights(run(twin, 2)[0]))


@pytest.mark.parametrize("update", ["master", "stochastic"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_half_precision_has_its_masters(how: str, update: Any):
    model = TiedLM().bfloat16()
    pair = run((model, l2l.MeZO(model, lr=1e-3, update=update)), 3)
    twin = COPIES[how](pair)
    assert same_bits(weights(run(pair, 3)[0]), weights(run(twin, 3)[0]))
    left, right = pair[1].theta.extra_state(), twin[1].theta.extra_state()
    assert left and same_bits(left, right)


def test_a_copy_keeps_seed_step_groups_and_lr_auto_and_takes_a_model_anew():
    model = TiedLM()
    groups = [{"match": "norm", "lr": 0.5}]
    optimizer = ZOOptimizer(model, MeZO(), lr="auto", seed=7, groups=groups)
    run((model, optimizer), 4)
    twin = copy.deepcopy(optimizer)
    assert (twin.seed, twin.steps_done, twin.curvature_lr_state) == (7, 4, optimizer.curvature_lr_state)
    assert [group["lr"] for group in twin.param_groups] == [0.5, 0.1]
    fresh = copy.deepcopy(model)
    twin.rebind(fresh)  # a copy made without its model
    assert same_bits(weights(run((model, optimizer), 2)[0]), weights(run((fresh, twin), 2)[0]))


def test_copying_inside_fused_steps_is_refused_for_the_weights_are_perturbed():
    model = TiedLM()
    optimizer = l2l.MeZO(model)
    with optimizer.theta.fused_steps():
        optimizer.step(model)
        with pytest.raises(RuntimeError, match="copy or pickle the optimizer outside of it"):
            copy.deepcopy(optimizer)
    copy.deepcopy(optimizer)


@every_method
def test_a_loaded_state_shares_no_tensor_with_where_it_came_from(case: MethodCase):
    pair, other = started(case), started(case, 0)
    lone = COPIES["deepcopy"](pair)
    other[0].load_state_dict(pair[0].state_dict())
    other[1].load_state_dict(pair[1].state_dict())
    run(other, 3)
    assert same_bits(weights(run(pair, 2)[0]), weights(run(lone, 2)[0]))


@pytest.mark.parametrize("model_first", [True, False])
def test_weights_and_state_of_half_precision_load_in_either_order(model_first: bool):
    model = TiedLM().bfloat16()
    pair = run((model, l2l.MeZO(model, lr=1e-3, update="master")), 3)
    states = COPIES["deepcopy"]((pair[0].state_dict(), pair[1].state_dict()))
    twin = TiedLM().bfloat16()
    resumed = l2l.MeZO(twin, update="master")
    loads = [lambda: twin.load_state_dict(states[0]), lambda: resumed.load_state_dict(states[1])]
    for load in loads if model_first else reversed(loads):
        load()
    assert same_bits(weights(run(pair, 5)[0]), weights(run((twin, resumed), 5)[0]))


def test_a_state_holds_the_masters_of_weights_that_were_loaded_since_the_last_step():
    model, other = TiedLM().bfloat16(), TiedLM().bfloat16()
    run((other, l2l.MeZO(other, lr=1e-2)), 3)
    optimizer = l2l.MeZO(model, update="master")
    model.load_state_dict(other.state_dict())
    resumed = l2l.MeZO(model, update="master")
    resumed.load_state_dict(optimizer.state_dict())
    assert same_bits(weights(model), weights(other))


def test_a_state_goes_to_the_device_and_precision_of_the_optimizer_that_takes_it():
    like = (torch.zeros(2, dtype=torch.float64), {"rows": torch.zeros(0)})
    given = (torch.ones(2), {"rows": torch.arange(3), "rank": 4})
    mean, rest = _copied(given, like)
    assert mean.dtype == torch.float64 and mean.data_ptr() != given[0].data_ptr()
    assert torch.equal(rest["rows"], given[1]["rows"]) and rest["rank"] == 4
    assert _copied(given, (torch.zeros(2, device="meta"), {}))[0].device.type == "meta"


def test_a_state_that_does_not_fit_leaves_everything_as_it_was():
    model = TiedLM()
    optimizer = l2l.MeZO(model, lr=0.01, seed=1)
    grouped = ZOOptimizer(TiedLM(), MeZO(), lr=0.5, seed=2, groups=[{"match": "norm"}]).state_dict()
    half = l2l.MeZO(TiedLM().bfloat16(), lr=0.5, seed=2).state_dict()
    for state, message in ((grouped, "different number of parameter groups"), (half, "need none")):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert (optimizer.seed, optimizer.param_groups[0]["lr"]) == (1, 0.01)


SCHEDULES: dict[str, Callable[[ZOOptimizer], lr_scheduler.LRScheduler]] = {
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 2)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], total_steps=9, cycle_momentum=False),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 1e-3, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 6)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@every_method
def test_schedulers_set_the_rate_of_each_step_and_0_moves_nothing(case: MethodCase, name: str):
    model, optimizer = started(case, 0)
    scheduler, before = SCHEDULES[name](optimizer), weights(model)
    for step in range(6):
        wanted = optimizer.param_groups[0]["lr"]
        optimizer.step(model)
        scheduler.step()
        assert optimizer.report is not None and set(optimizer.report.lr) == {wanted}
        if step == 0 and name == "warm-up from 0":
            assert wanted == 0 and farthest(before, weights(model)) < 1e-6
    assert farthest(before, weights(model)) > 1e-6


def test_a_scheduler_and_its_optimizer_resume_together():
    def made() -> tuple[nn.Module, ZOOptimizer, lr_scheduler.LRScheduler]:
        model = Quadratic()
        optimizer = l2l.MeZO(model, lr=0.02)
        return model, optimizer, SCHEDULES["one cycle"](optimizer)

    def ran(parts: tuple[nn.Module, ZOOptimizer, lr_scheduler.LRScheduler]) -> dict[str, Tensor]:
        for _ in range(3):
            parts[1].step(parts[0])
            parts[2].step()
        return weights(parts[0])

    first, second = made(), made()
    ran(first)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())  # pyright: ignore
    assert same_bits(ran(first), ran(second))


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1e-3])
def test_a_rate_out_of_range_from_a_schedule_is_refused_before_anything_is_evaluated(lr: float):
    model = Quadratic()
    optimizer = l2l.MeZO(model)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=f"lr={lr} must be finite and not negative: .* mend its schedule"):
        optimizer.step(lambda: pytest.fail("evaluated"))
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step(model)


def test_step_hooks_see_the_arguments_and_run_around_the_step():
    model, called = Quadratic(), []
    optimizer = l2l.MeZO(model)
    optimizer.register_step_pre_hook(lambda own, args, kwargs: called.append((own.steps_done, args)))
    optimizer.register_step_post_hook(lambda own, args, kwargs: called.append((own.steps_done, args)))
    optimizer.step(model)
    assert called == [(0, (optimizer, model)), (1, (optimizer, model))]


def test_hooks_of_states_see_and_change_all_of_the_state():
    model, seen = Quadratic(), []
    optimizer = l2l.MeZO(model, seed=3)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": state["zeroth_order"]["seed"]})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "zeroth_order": {**state["zeroth_order"], "step": 11}}
    )
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append((own.seed, own.steps_done)))
    state = optimizer.state_dict()
    assert state["more"] == 3
    optimizer.load_state_dict(state)
    assert seen == [(3, 11)]


def test_zero_grad_frees_gradients_and_changes_nothing_else():
    model = Quadratic()
    model().backward()
    optimizer, before = l2l.MeZO(model), weights(model)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters()) and same_bits(before, weights(model))


def test_a_group_added_later_is_refused_and_its_ways_out_work():
    model = Quadratic()
    model.vector.requires_grad_(False)
    optimizer = l2l.MeZO(model, lr=0.01)
    optimizer.step(model)
    with pytest.raises(ValueError, match=r"set requires_grad .* call optimizer.rebind\(model\), or make a new optimizer"):
        optimizer.add_param_group({"params": [model.vector], "lr": 0.5})
    model.vector.requires_grad_(True)
    optimizer.rebind(model)
    before = weights(model)
    optimizer.step(model)
    assert optimizer.steps_done == 2 and optimizer.param_groups[0]["param_names"] == ["matrix", "vector"]
    assert all(not torch.equal(before[name], after) for name, after in weights(model).items())
    grouped = ZOOptimizer(model, MeZO(), groups=[{"match": "vector", "lr": 0.5}])
    assert [group["lr"] for group in grouped.param_groups] == [0.5, 1e-6]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: l2l.MeZO(m).step(), TypeError, r"given no closure: .* optimizer.step\(lambda: model\(\*\*batch\).loss\)"),
        (lambda m: l2l.MeZO(m).step(m()), TypeError, "given Tensor"),
        (lambda m: l2l.MeZO(m.parameters()), TypeError, r"given as generator: give the module itself, as in l2l.MeZO\(model\)"),
        (lambda m: l2l.DiZO(list(m.named_parameters())), TypeError, "given as list: give the module itself"),
        (lambda m: l2l.ZOFineTuner(m.state_dict(), l2l.Tuner.for_model(m)), TypeError, "given as OrderedDict"),
        (lambda m: l2l.MeZO(m).rebind(m.parameters()), TypeError, "given as generator"),
        (lambda m: l2l.MeZO(m, lr=0.0), ValueError, "lr=0.0 would move nothing: .* param_groups"),
        (lambda m: l2l.MeZO(m, lr=float("nan")), ValueError, "lr=nan must be finite"),
        (lambda m: l2l.MeZO(m, lr="fast"), ValueError, "lr='fast' must be a number or 'auto'"),
    ],
)
def test_what_is_no_model_closure_or_rate_gives_one_error_with_the_way_out(
    call: Callable[[Any], object], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        call(Quadratic())


def test_accelerate_prepares_and_steps_it_as_any_optimizer():
    accelerate = pytest.importorskip("accelerate", reason="accelerate comes with the extra 'gguf'")
    plain, model = TiedLM(), TiedLM()
    lone, accelerator = l2l.MeZO(plain, lr=1e-3), accelerate.Accelerator(cpu=True)
    try:
        prepared, optimizer = accelerator.prepare(model, l2l.MeZO(model, lr=1e-3))
        for _ in range(3):
            lone.step(plain)
            optimizer.step(prepared)
        assert same_bits(weights(plain), weights(model))
    finally:
        reset_accelerate()


def reset_accelerate() -> None:
    """Its state is one for the process."""
    state = sys.modules["accelerate.state"]
    for name in ("AcceleratorState", "PartialState", "GradientState"):
        getattr(state, name)._reset_state()
