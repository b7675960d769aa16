"""Walking exactly: stored weights are never perturbed, and half precision loses neither a step nor its weights."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from cases import ALONG_NOISE, MethodCase, Problem, TiedLM, named, optimizer_for, same_bits, weights
from perturbed import language_loss, perturbed_in_place
from torch import Tensor, nn
from torch.nn import functional

from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO as MeZOMethod
from l2l.models.shapes import tiny_random
from l2l.noise import Key, standard_noise
from l2l.optim import MeZO, ZOOptimizer, choose_update
from l2l.params import Blocks, Direction, PerturbedParameters
from l2l.tuners.api import Tuner

pytestmark = pytest.mark.in_turn

FAMILIES = ("opt", "llama", "qwen2", "mistral", "gpt2", "gemma2", "phi", "gpt_neox", "mixtral")
UPDATES: tuple[Any, ...] = ("master", "stochastic")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transient_evaluation_is_that_of_perturbed_weights_in_every_architecture(family: str):
    model = tiny_random(family)
    theta = PerturbedParameters(Blocks.of(model), perturb="functional")
    u = Direction(Key(7), tuple(0.5 + 0.01 * i for i in range(len(theta.blocks))))
    before, loss = weights(model), language_loss(model)
    for distance in (1e-2, -1e-2):
        theta.perturb(u, distance)
        with torch.no_grad():
            assert theta.evaluate(loss).item() == language_loss(perturbed_in_place(model, u, distance))().item()
    assert same_bits(before, weights(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_it_is_as_well_but_for_norms_which_are_kept_finer(family: str):
    model = tiny_random(family).to(torch.bfloat16)
    theta = PerturbedParameters(Blocks.of(model))
    assert theta.mode == "functional"
    u = Direction(Key(7), (1.0,) * len(theta.blocks))
    theta.perturb(u, 1e-2)
    with torch.no_grad():
        found = theta.evaluate(language_loss(model)).item()
        rounded = language_loss(perturbed_in_place(model, u, 1e-2))().item()
        home = language_loss(model)().item()
    assert found == pytest.approx(rounded, abs=2e-3)
    assert abs(found - home) > abs(found - rounded)


@pytest.mark.parametrize("update", UPDATES)
def test_two_hundred_steps_at_lr_zero_leave_the_same_bits(update: Any):
    model = TiedLM().to(torch.bfloat16)
    theta = PerturbedParameters(Blocks.of(model), update=update)
    before, count = weights(model), len(theta.blocks)
    with torch.no_grad(), theta.fused_steps():
        for step in range(200):
            u = Direction(Key(0, step), (1.0,) * count)
            with theta.step():
                theta.perturb(u, 1e-3)
                theta.evaluate(model)
                theta.perturb(u, -1e-3)
                theta.add(u, [0.0] * count)
    assert same_bits(before, weights(model))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("size", "width", "steps"), [(1e-6, 2048, 1), (1e-5, 768, 100), (1e-4, 768, 100)])
def test_the_update_that_lands_is_the_one_intended(update: Any, size: float, width: int, steps: int):
    """Its projection on the intended one, over steps that are small against the weights' spacing."""
    linear = nn.Linear(width, width)
    with torch.no_grad():
        linear.weight.copy_(0.02 * torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
        linear.bias.fill_(1.0)
    linear.to(torch.bfloat16)
    theta = PerturbedParameters(Blocks.of(linear), update=update)
    before = {name: value.double() for name, value in weights(linear).items()}
    wanted = {name: torch.zeros_like(value) for name, value in before.items()}
    for step in range(steps):
        u = Direction(Key(1, 0), (1.0, 1.0)) if size < 1e-5 else Direction(Key(1, step), (1.0, 1.0))
        with theta.step():
            theta.add(u, [size, size])
        for name, value in wanted.items():
            value.add_(standard_noise(name, u.key, value.shape, dtype=torch.float64), alpha=size)
    for index, (name, aim) in enumerate(wanted.items()):
        landed = theta.value(index).double() - before[name]
        projection = (torch.sum(landed * aim) / torch.sum(aim * aim)).item()
        assert 0.99 <= projection <= 1.01


class HalfLM(TiedLM):
    """Computes in its weights' precision, and its loss in float32, as language models do."""

    def forward(self) -> Tensor:
        x = self.embed(self.tokens)
        logits = self.head(self.norm(x + self.attention(x))).float()
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("make", [lambda _: MeZOMethod(epsilon=1e-2), lambda m: Learned(Tuner.for_model(m), epsilon=1e-2)])
def test_half_precision_descends(make: Any, update: Any):
    model = HalfLM().to(torch.bfloat16)
    optimizer = ZOOptimizer(model, make(model), lr=0.01, update=update)
    first = model().item()
    for _ in range(200):
        optimizer.step(model)
    assert model().item() < 0.85 * first


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("case", ALONG_NOISE, ids=named)
def test_after_an_error_the_same_bits_are_back(case: MethodCase, update: Any):
    model = TiedLM().to(torch.bfloat16)
    optimizer = ZOOptimizer(model, case.make(model), lr=0.01, update=update)
    for _ in range(2):
        optimizer.step(lambda: model().float())
    before = weights(model)
    for failing_call in (1, 2, 4):
        calls = 0

        def failing(failing_call: int = failing_call) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise RuntimeError("out of something")
            return model().float()

        if failing_call > 2 * optimizer.method.num_directions and case.name != "dizo":
            continue
        with pytest.raises(RuntimeError, match="out of something"):
            optimizer.step(failing)
        assert same_bits(before, weights(model))


@pytest.mark.parametrize("update", UPDATES)
def test_a_run_saved_half_way_continues_bit_for_bit(update: Any):
    def fresh() -> tuple[TiedLM, ZOOptimizer]:
        model = TiedLM().to(torch.bfloat16)
        return model, ZOOptimizer(model, MeZOMethod(), lr=0.001, update=update, weight_decay=0.01)

    model, optimizer = fresh()
    for _ in range(4):
        optimizer.step(lambda: model().float())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(5):
        optimizer.step(lambda: model().float())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = fresh()
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for _ in range(5):
        again.step(lambda: resumed().float())
    assert same_bits(weights(model), weights(resumed))


def test_a_state_of_another_update_is_refused():
    model = TiedLM().to(torch.bfloat16)
    state = ZOOptimizer(model, MeZOMethod(), update="master").state_dict()
    with pytest.raises(ValueError, match=r"6 float32 master weights where 3 are needed: .* another choice of perturb"):
        ZOOptimizer(model, MeZOMethod(), update="stochastic").load_state_dict(state)
    with pytest.raises(ValueError, match="float32 master weights; these weights are perturbed in place"):
        ZOOptimizer(TiedLM(), MeZOMethod()).load_state_dict(state)


def test_weights_loaded_from_outside_are_taken_as_they_are():
    model = TiedLM().to(torch.bfloat16)
    optimizer = ZOOptimizer(model, MeZOMethod(), lr=1e-6, update="master")
    optimizer.step(lambda: model().float())
    other = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items() if name != "tokens"}
    model.load_state_dict(other, strict=False)
    optimizer.step(lambda: model().float())
    assert all((value - 0.5).abs().max() < 1e-2 for value in weights(model).values())


def test_weight_decay_is_not_lost_in_half_precision():
    shrunk = {}
    for update in UPDATES:
        linear = nn.Linear(256, 256).to(torch.bfloat16)
        theta = PerturbedParameters(Blocks.of(linear), update=update)
        before = linear.weight.detach().double()
        for step in range(20):
            with theta.step():
                theta.add(Direction(Key(0, step), (1.0, 1.0)), [1e-9, 1e-9])
                theta.shrink([1 - 1e-3, 1.0])
        now = theta.value(0).double()
        shrunk[update] = (torch.sum(now * before) / torch.sum(before * before)).item()
    assert shrunk["master"] == pytest.approx((1 - 1e-3) ** 20, abs=1e-5)
    assert shrunk["stochastic"] == pytest.approx((1 - 1e-3) ** 20, abs=1e-3)


def test_in_place_walking_of_half_precision_is_refused():
    with pytest.raises(
        ValueError, match=r"perturb='in_place', but block 'embed.weight' is torch.bfloat16.*perturb='functional'"
    ):
        PerturbedParameters(Blocks.of(TiedLM().to(torch.bfloat16)), perturb="in_place")


def test_stochastic_rounding_of_float16_is_refused():
    with pytest.raises(ValueError, match=r"block 'embed\.weight' is float16: use update='master'"):
        PerturbedParameters(Blocks.of(TiedLM().half()), update="stochastic")


def test_float16_works_with_masters():
    model = TiedLM().half()
    optimizer = MeZO(model, lr=0.01)
    assert choose_update(optimizer.blocks) == "master"
    first = optimizer.step(lambda: model().float())
    for _ in range(100):
        last = optimizer.step(lambda: model().float())
    assert last < 0.95 * first


@pytest.mark.parametrize("case", ALONG_NOISE, ids=named)
def test_exact_and_in_place_steps_agree_in_float32(case: MethodCase, problem: Problem):
    ends = []
    for walk in ("functional", "in_place"):
        model = problem.make()
        optimizer = ZOOptimizer(model, case.make(model), lr=problem.lr, perturb=walk)
        losses = [optimizer.step(model) for _ in range(10)]
        ends.append((losses, weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=2e-2, atol=2e-3)
    assert optimizer_for(case, problem.make(), problem).theta.mode == "in_place"
