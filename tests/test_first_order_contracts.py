"""What every first-order baseline owes its caller: of the contracts of methods, those that need no directions."""

from __future__ import annotations

import inspect
import io
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from cases import Attention, Problem, Quadratic, TiedLM, same_bits, weights
from torch import Tensor, nn

import l2l.methods
from l2l.estimators import MicroBatched
from l2l.methods.adamw import AdamW
from l2l.methods.base import FirstOrder
from l2l.methods.sgd import SGD
from l2l.optim import ZOOptimizer


@dataclass(frozen=True)
class FirstOrderCase:
    name: str
    make: Callable[[], SGD | AdamW]
    reference: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    """The optimizer of torch by whose rule it goes, at LR and DECAY."""


LR, DECAY = 0.02, 0.1
CASES = [
    FirstOrderCase("sgd", SGD, lambda p: torch.optim.SGD(p, LR, weight_decay=DECAY)),
    FirstOrderCase("adamw", AdamW, lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY)),
]
MOMENTUM = FirstOrderCase("sgd_momentum", lambda: SGD(momentum=0.9), lambda p: torch.optim.SGD(p, LR, momentum=0.9))


@pytest.fixture(params=[*CASES, MOMENTUM], ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> FirstOrderCase:
    return request.param


def optimizer_for(case: FirstOrderCase, model: nn.Module, lr: float = LR, decay: float = 0.0) -> ZOOptimizer:
    return ZOOptimizer(model, case.make(), lr=lr, weight_decay=decay)


def trained(case: FirstOrderCase, model: nn.Module, steps: int) -> nn.Module:
    optimizer = optimizer_for(case, model)
    for _ in range(steps):
        optimizer.step(model)
    return model


def test_every_first_order_baseline_of_the_package_is_in_the_cases():
    modules = [import_module(found.name) for found in pkgutil.iter_modules(l2l.methods.__path__, "l2l.methods.")]
    classes = {value for module in modules for _, value in inspect.getmembers(module, inspect.isclass)}
    found = {value for value in classes if issubclass(value, FirstOrder) and not inspect.isabstract(value)}
    assert found == {type(case.make()) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name, indirect=True)
def test_it_steps_as_the_optimizer_of_torch_does(case: FirstOrderCase):
    model, other = Attention(4).double(), Attention(4).double()
    other.load_state_dict(model.state_dict())
    model.qkv.bias.requires_grad_(False)  # torch decays biases too, so there are none here
    model.qkv.bias.zero_()
    other.load_state_dict(model.state_dict())
    other.qkv.bias.requires_grad_(False)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    reference = case.reference([p for p in other.parameters() if p.requires_grad])
    optimizer = optimizer_for(case, model, decay=DECAY)
    for _ in range(8):
        optimizer.step(lambda: (model(x) - 1).square().mean())
        reference.zero_grad()
        (other(x) - 1).square().mean().backward()
        reference.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, other.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_momentum_adds_up_as_in_torch():
    model, other = Quadratic(), Quadratic()
    reference = MOMENTUM.reference(list(other.parameters()))
    optimizer = optimizer_for(MOMENTUM, model)
    for _ in range(8):
        optimizer.step(model)
        reference.zero_grad()
        other().backward()
        reference.step()
    torch.testing.assert_close(weights(model), weights(other))


def test_it_descends(case: FirstOrderCase, problem: Problem):
    before = problem.make()().item()
    assert trained(case, problem.make(), 100)().item() < problem.below * before


def test_two_runs_are_equal_bit_for_bit(case: FirstOrderCase, problem: Problem):
    assert same_bits(weights(trained(case, problem.make(), 5)), weights(trained(case, problem.make(), 5)))


def test_a_step_says_its_loss_at_theta_its_gradient_and_three_passes(case: FirstOrderCase):
    model = Quadratic()
    at_theta = model().item()
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(model(), list(model.parameters()))]).norm().item()
    optimizer = optimizer_for(case, model)
    assert optimizer.step(model) == at_theta
    assert optimizer.report is not None
    assert (optimizer.report.passes, optimizer.report.loss) == (3, at_theta)
    assert optimizer.report.projected_gradient == pytest.approx(norm, rel=1e-5)


def test_frozen_blocks_never_move_and_no_gradient_is_left(case: FirstOrderCase, problem: Problem):
    model = problem.make()
    name, frozen = next(iter(model.named_parameters()))
    frozen.requires_grad_(False)
    before = weights(model)
    after = weights(trained(case, model, 3))
    assert torch.equal(before[name], after[name])
    assert all(not torch.equal(before[other], after[other]) for other in before if other != name)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, FloatingPointError])
def test_nothing_has_moved_when_the_closure_raises(case: FirstOrderCase, error: type[BaseException]):
    model = Quadratic()
    optimizer = optimizer_for(case, model, decay=DECAY)
    optimizer.step(model)
    before, state = weights(model), optimizer.method_state

    def failing() -> Tensor:
        if error is FloatingPointError:
            return model() * float("nan")
        raise error("out of something")

    with pytest.raises(error):
        optimizer.step(failing)
    assert same_bits(before, weights(model))
    assert optimizer.method_state is state
    assert optimizer.steps_done == 1


def test_a_loss_without_a_graph_is_refused(case: FirstOrderCase):
    model = Quadratic()
    with pytest.raises(TypeError, match="without a graph"):
        optimizer_for(case, model).step(lambda: model().item())


def test_a_gradient_that_is_not_finite_is_refused_and_nothing_moves(case: FirstOrderCase):
    model = Quadratic()
    before = weights(model)
    with pytest.raises(FloatingPointError, match="norm of the gradient is inf"):
        optimizer_for(case, model).step(lambda: (model() * 1e-10) * 1e30 * 1e10)
    assert same_bits(before, weights(model))


def test_a_run_saved_half_way_continues_bit_for_bit(case: FirstOrderCase, problem: Problem):
    model = problem.make()
    optimizer = optimizer_for(case, model)
    for _ in range(3):
        optimizer.step(model)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(3):
        optimizer.step(model)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = problem.make()
    again = optimizer_for(case, resumed, lr=123.0)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for _ in range(3):
        again.step(resumed)
    assert same_bits(weights(model), weights(resumed))


def test_its_state_is_as_large_as_it_says(case: FirstOrderCase):
    optimizer = optimizer_for(case, TiedLM())
    tensors = [tensor for field in vars(optimizer.method_state).values() if isinstance(field, tuple) for tensor in field]
    assert sum(tensor.nbytes for tensor in tensors) == case.make().state_bytes(optimizer.blocks)


def test_tied_weights_move_once(case: FirstOrderCase):
    model = trained(case, TiedLM(), 2)
    assert isinstance(model, TiedLM)
    assert model.head.weight is model.embed.weight


def test_pieces_of_a_batch_give_the_step_of_the_whole(case: FirstOrderCase):
    whole, pieced = Quadratic().double(), Quadratic().double()
    optimizer_for(case, whole).step(whole)
    optimizer = optimizer_for(case, pieced)
    optimizer.step(MicroBatched((lambda: 0.25 * pieced(), lambda: 0.75 * pieced())))
    assert optimizer.report is not None
    assert optimizer.report.passes == 3
    torch.testing.assert_close(weights(whole), weights(pieced), rtol=1e-12, atol=1e-12)


def test_bfloat16_weights_follow_a_float32_copy(case: FirstOrderCase):
    model = Quadratic().bfloat16()
    optimizer = optimizer_for(case, model, lr=1e-5)
    start = optimizer.theta.value(0).clone()
    for _ in range(3):
        optimizer.step(model)
    moved = optimizer.theta.value(0)
    assert moved.dtype == torch.float32
    assert not torch.equal(moved, start)
    assert torch.equal(moved.bfloat16(), dict(model.named_parameters())[optimizer.blocks[0].name].detach())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"lr": "auto"}, "give lr as a number"), ({"update": "stochastic"}, "use update='master'")],
)
def test_what_only_looks_along_directions_can_do_is_refused(case: FirstOrderCase, options, words):
    with pytest.raises(ValueError, match=words):
        ZOOptimizer(Quadratic().bfloat16(), case.make(), **options)
