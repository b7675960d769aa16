"""AGZO: against its paper's pseudo-code, what it sees of linear maps, and as what it reduces to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LogisticRegression, MethodCase, Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, SEED, Loss, Weights, assert_near, assert_same_run, moved, normal, run
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from l2l.methods.agzo import AGZO, InSpan
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, PerturbedParameters, dense_direction
from l2l.params.inputs import Activations

RANK, ITERATIONS = 2, 3


class Paper:
    """Inputs by hooks on the linear modules; A by K power iterations with QR; Delta = R A^T; g from one side."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.inputs = model, dict[str, Tensor]()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.hooked = [(names[id(linear.weight)], linear) for linear in linears]

    def gather(self, at: Weights) -> float:
        def watch(name: str) -> Callable[..., None]:
            return lambda _, given: self.inputs.update({name: given[0].detach().reshape(-1, given[0].shape[-1])})

        hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in self.hooked]
        value = functional_call(self.model, at, (), tie_weights=True).item()
        for hook in hooks:
            hook.remove()
        return value

    def step(self, loss: Loss, at: Weights, key: Key) -> Weights:
        home, u = self.gather(at), {}
        for name, value in at.items():
            if name not in self.inputs:
                u[name] = normal(name, key, *value.shape)
                continue
            h, n = self.inputs[name], value.shape[1]
            a = normal(f"{name}#activations", key, n, RANK)
            for _ in range(ITERATIONS):
                a = torch.linalg.qr(h.T @ (h @ a)).Q
            u[name] = math.sqrt(n / RANK) * normal(f"{name}#outputs", key, len(value), RANK) @ a.T
        return moved(at, -LR * (loss(moved(at, EPSILON, u)) - home) / EPSILON, u)


@pytest.mark.parametrize("kind", [Quadratic, LogisticRegression, TiedLM])
def test_it_takes_the_steps_of_the_paper(kind: Callable[[], nn.Module]):
    model = kind().double()
    assert_same_run(model, AGZO(EPSILON, rank=RANK, iterations=ITERATIONS), Paper(kind().double()).step)


def test_without_linear_maps_it_moves_along_plain_noise():
    model = Quadratic().double()
    optimizer = run(model, AGZO(), steps=1)
    assert optimizer.report is not None and optimizer.report.passes == 2
    assert optimizer.report.estimates[0].direction.shape is None


def test_a_tied_embedding_moves_in_the_span_of_what_the_head_is_given():
    model = TiedLM()
    optimizer = run(model, AGZO(), steps=1)
    assert optimizer.report is not None
    direction = optimizer.report.estimates[0].direction
    shaped = {block.name for i, block in enumerate(optimizer.blocks) if direction.shaped(i)}
    assert shaped == {"embed.weight", "attention.qkv.weight", "attention.out.weight"}


def spans(parameter: nn.Parameter, read: Callable[[Tensor], Any], rank: int = 2) -> Any:
    """The span that watching gives when ``read`` is called with the parameter, and its basis as a matrix of columns."""
    module = nn.Module()
    module.weight = parameter
    watching = Activations(Blocks.of(module), rank, 3, Key(SEED))
    watching.during(lambda: read(parameter))
    return watching.spans.get(0)


INPUTS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))[:, :1].expand(2, 3, 4).contiguous()
"""[2, 3, 4]: inputs of length 4 in a plane."""
BIAS = torch.zeros(5)


@pytest.mark.parametrize(
    ("form", "read", "over_rows"),
    [
        ((5, 4), lambda w: functional.linear(INPUTS, w), False),
        ((5, 4), lambda w: functional.linear(input=INPUTS, weight=w, bias=BIAS), False),
        ((5, 4), lambda w: INPUTS @ w.t(), False),
        ((5, 4), lambda w: torch.matmul(INPUTS, w.mT), False),
        ((4, 5), lambda w: INPUTS @ w, True),
        ((4, 5), lambda w: torch.addmm(BIAS, INPUTS.view(-1, 4), w), True),
        ((4, 5), lambda w: functional.linear(INPUTS, w.T), True),
    ],
)
def test_every_way_to_read_a_weight_shows_its_inputs(form: tuple[int, int], read: Any, over_rows: bool):
    span = spans(nn.Parameter(torch.zeros(form)), read)
    assert span is not None and span.over_rows is over_rows
    projected = INPUTS @ span.vectors @ span.vectors.T
    torch.testing.assert_close(projected, INPUTS, rtol=0, atol=1e-5)


@pytest.mark.parametrize("read", [lambda w: w.sum(), lambda w: functional.embedding(torch.tensor([1]), w), lambda w: w @ w])
def test_what_is_no_linear_map_of_inputs_shows_none_or_its_own(read: Any):
    span = spans(nn.Parameter(torch.eye(4)), read)
    assert span is None or span.vectors.shape == (4, 2)


def test_inputs_of_several_calls_are_taken_together():
    weight = nn.Parameter(torch.zeros(5, 6))
    calls = torch.eye(6)[:3] * torch.tensor([[3.0], [2.0], [1.0]])
    span = spans(weight, lambda w: [functional.linear(call, w) for call in calls], rank=3)
    torch.testing.assert_close(calls @ span.vectors @ span.vectors.T, calls, rtol=0, atol=1e-5)


def test_the_true_gradient_lies_in_the_span():
    model = LogisticRegression().double()
    model.x = model.x[:3]
    model.y = model.y[:3]
    model().backward()
    watching = Activations(Blocks.of(model), 3, 3, Key(SEED))
    watching.during(model)
    a, gradient = watching.spans[0].vectors, model.linear.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradient @ a @ a.T, gradient)


@pytest.mark.parametrize(("form", "over_rows"), [((5, 4), False), ((4, 5), True)])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_coordinate_has_mean_square_one_whatever_the_rank(form: tuple[int, int], over_rows: bool, rank: int):
    module, weight = nn.Module(), nn.Parameter(torch.zeros(form))
    module.register_parameter("weight", weight)
    blocks, watching = Blocks.of(module), Activations(Blocks.of(module), rank, 3, Key(SEED))
    watching.during(lambda: INPUTS @ weight if over_rows else functional.linear(INPUTS, weight))
    shape = InSpan(watching.spans)
    us = [shape.write(blocks[0], 0, Key(SEED, step), "gaussian") for step in range(400)]
    assert torch.stack(us).square().mean().item() == pytest.approx(1, rel=0.2)
    if rank == 4:  # a whole orthogonal basis: as long as the noise it is made of
        noise = normal("weight#outputs", Key(SEED), 5, 4)
        assert us[0].norm().item() == pytest.approx(noise.norm().item(), rel=1e-3)


def test_in_half_precision_both_losses_are_read_from_the_same_kind_of_weights():
    """At a distance that moves nothing, the losses are equal: norms and biases are float32 in both."""
    model = TiedLM().bfloat16()
    optimizer = ZOOptimizer(model, AGZO(), LR, SEED, update="master")
    for _ in range(5):
        optimizer.step(lambda: model().float())
    optimizer.method = AGZO(epsilon=1e-30)
    optimizer.step(lambda: model().float())
    assert optimizer.report is not None and optimizer.report.projected_gradient == 0


def test_an_evaluation_in_inference_mode_shows_its_inputs_as_well():
    model = TiedLM()

    def closure() -> Tensor:
        with torch.inference_mode():
            return model()

    optimizer, before = ZOOptimizer(model, AGZO(num_directions=2), LR, SEED), weights(model)
    optimizer.step(closure)
    assert optimizer.report is not None and optimizer.report.passes == 3
    seen = optimizer.report.estimates
    wanted = {
        block.name: before[block.name]
        - LR / 2 * sum(one.projected_gradient * dense_direction(one.direction, optimizer.blocks, i) for one in seen)
        for i, block in enumerate(optimizer.blocks)
    }
    assert_near(weights(model), wanted, 1e-4, 1e-6)


def test_watching_ends_with_the_pass(model_with_error: tuple[nn.Module, Callable[[], Tensor]]):
    model, failing = model_with_error
    optimizer = ZOOptimizer(model, AGZO(), LR, SEED)
    before = weights(model)
    with pytest.raises(RuntimeError, match="out of something"):
        optimizer.step(failing)
    assert torch.overrides._get_current_function_mode() is None
    assert_near(weights(model), before, 0, 1e-7)


@pytest.fixture
def model_with_error() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = TiedLM()

    def failing() -> Tensor:
        model()
        raise RuntimeError("out of something")

    return model, failing


def test_a_tuner_scales_what_is_walked_and_what_is_moved():
    model = TiedLM().double()
    before = weights(model)
    optimizer = run(model, MethodCase("learned+agzo", {}).make(model), steps=1)
    assert optimizer.report is not None and isinstance(optimizer.theta, PerturbedParameters)
    (seen,) = optimizer.report.estimates
    us = {block.name: dense_direction(seen.direction, optimizer.blocks, i) for i, block in enumerate(optimizer.blocks)}
    assert len(set(seen.direction.sigma)) == len(us)
    assert_near(weights(model), moved(before, -LR * seen.projected_gradient, us), 1e-9, 1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"rank": 0}, "rank=0 must be a whole number, at least 1"),
        ({"iterations": 0}, "iterations=0 must be a whole number, at least 1"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        AGZO(**wrong)
