"""The torch optimizer: schedulers, groups, weight decay, refusals and exact resuming."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, weights
from torch import Tensor, nn

import l2l
from l2l.methods.mezo import MeZO as MeZOMethod


def displacement(optimizer: l2l.ZOOptimizer, model: nn.Module) -> dict[str, Tensor]:
    before = weights(model)
    optimizer.step(model)
    return {name: value - before[name] for name, value in weights(model).items()}


def test_it_is_a_torch_optimizer_with_named_parameters():
    model = TiedLM()
    optimizer = l2l.MeZO(model, lr=1e-3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    assert group["lr"] == 1e-3
    optimizer.zero_grad()
    assert "lr: 0.001" in repr(optimizer)


def test_step_returns_the_mean_of_the_losses_seen():
    model, seen = Quadratic(), []

    def closure() -> Tensor:
        seen.append(model().item())
        return model()

    loss = l2l.MeZO(model, num_directions=2).step(closure)
    assert type(loss) is float
    assert loss == pytest.approx(sum(seen) / 4, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_loss_of_any_precision_becomes_a_float(dtype: torch.dtype):
    model = Quadratic()
    loss = l2l.MeZO(model).step(lambda: model().to(dtype))
    assert type(loss) is float
    assert loss == pytest.approx(model().item(), rel=0.01)


def test_a_lambda_scheduler_scales_the_step():
    halved, plain = Quadratic().double(), Quadratic().double()
    one, two = l2l.MeZO(halved, lr=0.01), l2l.MeZO(plain, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5**step)
    first = displacement(one, halved), displacement(two, plain)
    scheduler.step()
    with torch.no_grad():
        for left, right in zip(halved.parameters(), plain.parameters(), strict=True):
            left.copy_(right)
    second = displacement(one, halved), displacement(two, plain)
    for name in first[0]:
        torch.testing.assert_close(first[0][name], first[1][name])
        torch.testing.assert_close(second[0][name], 0.5 * second[1][name], rtol=1e-7, atol=1e-11)


def test_a_cosine_scheduler_ends_at_no_step_at_all():
    model = Quadratic()
    optimizer = l2l.MeZO(model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    sizes = []
    for _ in range(5):
        sizes.append(max(value.abs().max().item() for value in displacement(optimizer, model).values()))
        scheduler.step()
    assert sizes[0] > 1e-3
    assert sizes[4] < 1e-6


def test_groups_override_by_name_and_the_first_match_holds():
    model, plain = TiedLM().double(), TiedLM().double()
    groups = [{"match": "attention", "lr": 0.02}, {"match": r"attention|norm", "lr": 0.03, "weight_decay": 0.5}]
    optimizer = l2l.ZOOptimizer(model, MeZOMethod(), lr=0.01, groups=groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.03, 0.01]
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2, 1]
    grouped, whole = displacement(optimizer, model), displacement(l2l.MeZO(plain, lr=0.01), plain)
    for name, value in grouped.items():
        times = 2 if "attention" in name else 3 if "norm" in name else 1
        torch.testing.assert_close(value, times * whole[name], rtol=1e-7, atol=1e-10)


def test_weight_decay_shrinks_matrices_and_spares_blocks_of_one_dimension():
    decayed, plain = TiedLM().double(), TiedLM().double()
    l2l.MeZO(decayed, lr=0.1, weight_decay=0.2).step(decayed)
    l2l.MeZO(plain, lr=0.1).step(plain)
    for name, value in weights(plain).items():
        wanted = value * (1 - 0.1 * 0.2) if value.ndim > 1 else value
        torch.testing.assert_close(weights(decayed)[name], wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf])
def test_lr_and_epsilon_out_of_range_are_refused(value: float):
    with pytest.raises(ValueError, match=f"lr={value} (must be finite and not negative|would move nothing)"):
        l2l.MeZO(Quadratic(), lr=value)
    for make in (l2l.MeZO, l2l.DiZO, lambda model, **options: l2l.ZOFineTuner(model, TUNER, **options)):
        with pytest.raises(ValueError, match=f"epsilon={value} must be positive and finite"):
            make(Quadratic(), epsilon=value)


TUNER = l2l.Tuner.for_model(Quadratic())


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_weight_decay_must_not_be_negative(value: float):
    with pytest.raises(ValueError, match=f"weight_decay={value} must be finite and not negative"):
        l2l.MeZO(Quadratic(), weight_decay=value)


@pytest.mark.parametrize("seed", [2**63, 0.5, "0"])
def test_a_seed_that_is_no_integer_of_64_bits_is_refused(seed: Any):
    with pytest.raises(ValueError, match=f"seed={seed}, .* must be integers of at most 64 bits"):
        l2l.MeZO(Quadratic(), seed=seed)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"match": "decoder"}, "match='decoder' takes no block; names look like 'matrix'"),
        ({"match": "matrix", "lr": -1.0}, "lr=-1.0 must be finite and not negative"),
        ({"match": "matrix", "weight_decay": -1.0}, "weight_decay=-1.0 must be finite"),
        ({"match": "matrix", "learning_rate": 1.0}, "may have 'lr' and 'weight_decay', nothing else"),
        ({"lr": 1.0}, "must have 'match'"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(group: dict, message: str):
    with pytest.raises(ValueError, match=message):
        l2l.ZOOptimizer(Quadratic(), MeZOMethod(), groups=[group])


def test_a_closure_whose_value_means_no_loss_is_refused_and_theta_stays():
    model = Quadratic()
    before = weights(model)
    with pytest.raises(TypeError, match=r"tensor of shape \(2, 2\); return a scalar loss"):
        l2l.MeZO(model).step(lambda: torch.zeros(2, 2))
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_the_state_of_another_optimizer_is_refused():
    model = Quadratic()
    with pytest.raises(ValueError, match="no zeroth-order state: it belongs to another optimizer"):
        l2l.MeZO(model).load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_the_state_of_another_method_is_refused_and_nothing_is_taken_over():
    model = Quadratic()
    made = {
        "mezo": lambda: l2l.MeZO(model, seed=1),
        "dizo": lambda: l2l.DiZO(model, seed=2),
        "learned": lambda: l2l.ZOFineTuner(model, TUNER, seed=3),
    }
    for name, make in made.items():
        for other in made.keys() - {name}:
            optimizer = make()
            seed, state = optimizer.seed, optimizer.method_state
            with pytest.raises(ValueError, match="the saved method state does not fit"):
                optimizer.load_state_dict(made[other]().state_dict())
            assert (optimizer.seed, optimizer.steps_done) == (seed, 0)
            assert optimizer.method_state is state


def test_loading_a_state_takes_over_seed_step_and_learning_rate():
    model, other = Quadratic(), Quadratic()
    optimizer = l2l.MeZO(model, lr=0.01, seed=5)
    for _ in range(3):
        optimizer.step(model)
    resumed = l2l.MeZO(other, lr=0.5, seed=6)
    resumed.load_state_dict(optimizer.state_dict())
    assert (resumed.seed, resumed.steps_done, resumed.param_groups[0]["lr"]) == (5, 3, 0.01)


def test_a_decay_that_would_turn_weights_round_is_refused_and_undone():
    model = Quadratic()
    before = weights(model)
    with pytest.raises(ValueError, match="lr \\* weight_decay must be below 1"):
        l2l.MeZO(model, lr=0.1, weight_decay=20.0).step(model)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=2e-6)


def test_a_tuner_of_another_model_is_refused_by_the_names_of_blocks():
    with pytest.raises(ValueError, match=r"2 missing in the model: 'matrix', 'vector'; 6 not in the tuner: 'embed.weight'"):
        l2l.ZOFineTuner(TiedLM(), TUNER)


def test_a_scheduler_does_not_warn_about_the_order_of_calls():
    model = Quadratic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = l2l.MeZO(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        optimizer.step(model)
        scheduler.step()


def test_hooks_of_torch_optimizers_are_called():
    model, called = Quadratic(), []
    optimizer = l2l.MeZO(model)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.step(model)
    assert called == ["before", "after"]


def test_the_factories_pass_on_how_to_perturb():
    assert l2l.MeZO(TiedLM(), perturb="functional", num_directions=2).theta.mode == "functional"
    assert l2l.DiZO(TiedLM().bfloat16(), update="stochastic", interval=7).theta.update == "stochastic"
    model = TiedLM()
    assert (
        l2l.ZOFineTuner(model, l2l.Tuner.for_model(model), groups=[{"match": "norm", "lr": 0.5}]).param_groups[0]["lr"] == 0.5
    )
    with pytest.raises(ValueError, match="perturb='sideways' must be"):
        l2l.MeZO(TiedLM(), perturb="sideways")
