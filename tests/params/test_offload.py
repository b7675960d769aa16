"""Offloaded layers: the run is that of a model in memory, bit for bit, and no more than two layers are on the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from perturbed import language_loss

import l2l
import l2l.models.load
import l2l.train.config
from l2l.methods.registry import build_method
from l2l.models.offload import offload_layers, stream_of
from l2l.models.prefix import layer_list, train_only
from l2l.models.schemes import apply_scheme
from l2l.models.shapes import tiny_random
from l2l.optim import ZOOptimizer

pytestmark = pytest.mark.in_turn

STEPS = 4


def made(dtype: torch.dtype = torch.float32, family: str = "llama") -> Any:
    return tiny_random(family, num_hidden_layers=4).to(dtype).eval()


def trained(model: Any, method: str = "mezo", fused: bool = True, args: dict[str, Any] | None = None, **options: Any) -> Any:
    """Losses of steps, a loss at theta between and after them, and the weights."""
    loss = language_loss(model)
    built = build_method(method, 1e-3, args or {}, None, model)
    optimizer = ZOOptimizer(model, built, 1e-2, 3, perturb="auto" if stream_of(model) else "functional", **options)
    losses: list[float] = []

    def seen() -> float:
        optimizer.theta.restore()
        with torch.inference_mode():
            return loss().item()

    def loop() -> None:
        for step in range(STEPS):
            losses.append(optimizer.step(loss))
            if step == 1:
                losses.append(seen())

    if fused:
        with optimizer.theta.fused_steps():
            loop()
    else:
        loop()
    losses.append(seen())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], own) for name, own in expected[1].items())


@pytest.mark.parametrize(
    ("method", "fused", "dtype", "options"),
    [
        ("mezo", True, torch.float32, {}),
        ("mezo", False, torch.float32, {"weight_decay": 0.1}),
        ("mezo", True, torch.bfloat16, {"update": "master"}),
        ("mezo", True, torch.bfloat16, {"update": "stochastic"}),
        ("fzoo", True, torch.float32, {"on_bad_loss": "rollback:1"}),
        ("adam", True, torch.bfloat16, {"update": "master"}),
        ("lozo", True, torch.float32, {}),
        ("conservative", True, torch.float32, {}),
        ("sparse_mezo", True, torch.float32, {}),
    ],
)
def test_an_offloaded_run_is_that_in_memory(method: str, fused: bool, dtype: torch.dtype, options: dict[str, Any]):
    expected = trained(made(dtype), method, fused, **options)
    model = made(dtype)
    stream = offload_layers(model, "cpu")
    assert_same(trained(model, method, fused, **options), expected)
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in stream.layers)
    assert largest < stream.peak_bytes <= 2 * largest


def test_an_update_is_made_when_its_layer_comes_again():
    model = made()
    offload_layers(model, "cpu")
    optimizer = l2l.MeZO(model, lr=1e-2, seed=3)
    loss, layers = language_loss(model), layer_list(model)
    assert layers is not None
    inside = {id(p) for layer in layers for p in layer.parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.theta.fused_steps():
        optimizer.step(loss)
        still = {name: torch.equal(p, before[name]) for name, p in model.named_parameters()}
        assert still == {name: id(p) in inside for name, p in model.named_parameters()}
        saved = model.state_dict()  # whoever reads the weights gets them as they are
        assert not any(torch.equal(saved[name], own) for name, own in before.items())


def test_weights_written_between_steps_are_those_that_run():
    states = []
    for offloaded in (False, True):
        model = made()
        if offloaded:
            offload_layers(model, "cpu")
        optimizer, loss = l2l.MeZO(model, lr=1e-2, seed=3, perturb="auto" if offloaded else "functional"), language_loss(model)
        with optimizer.theta.fused_steps():
            optimizer.step(loss)
            optimizer.theta.restore()
            with torch.no_grad():
                loss()  # the first layer is on its way again
                for p in model.parameters():
                    p.mul_(0.9)
            states.append([optimizer.step(loss), optimizer.step(loss)])
    assert states[0] == states[1]


def test_after_an_error_in_a_layer_theta_is_where_the_step_began():
    model = made()
    stream = offload_layers(model, "cpu")
    optimizer, loss = l2l.MeZO(model, lr=1e-2, seed=3), language_loss(model)
    twin = made()
    other, reference = l2l.MeZO(twin, lr=1e-2, seed=3, perturb="functional"), language_loss(twin)
    with optimizer.theta.fused_steps():
        assert optimizer.step(loss) == other.step(reference)
        broken = stream.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(loss)
        broken.remove()
        assert stream.resident_bytes == 0
        assert optimizer.step(loss) == other.step(reference)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("how", ["lora", "top", "tuner"])
def test_frozen_layers_adapters_and_tuners(how: str):
    found = []
    for offloaded in (False, True):
        model = made()
        if offloaded:
            offload_layers(model, "cpu")
        if how == "lora":
            model = apply_scheme(model, "lora", {}, 0).eval()
        if how == "top":
            train_only(model, "top:2")
        perturb = "auto" if offloaded else "functional"
        if how == "tuner":
            with torch.random.fork_rng():
                torch.manual_seed(5)
                tuner = l2l.Tuner.for_model(model, "shared_mlp")
                for parameter in tuner.network.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
            optimizer = l2l.ZOFineTuner(model, tuner, lr=1e-2, seed=3, perturb=perturb)
        else:
            optimizer = l2l.MeZO(model, lr=1e-2, seed=3, perturb=perturb)
        loss = language_loss(model)
        with optimizer.theta.fused_steps():
            losses = [optimizer.step(loss) for _ in range(STEPS)]
        found.append((losses, {name: value.clone() for name, value in model.state_dict().items()}))
    assert_same(found[1], found[0])


def test_nothing_of_a_layer_stays_on_the_device():
    model = made()
    stream = offload_layers(model, "cpu")
    with torch.no_grad():
        language_loss(model)()
    one = sum(p.nbytes for p in stream.layers[0].parameters())
    assert stream.resident_bytes == one  # the first is on its way for the next pass
    stream.settle()
    assert stream.resident_bytes == 0


def test_what_cannot_be_offloaded_is_refused_and_every_way_out_leads_out(tmp_path: Any):
    model = made()
    stream = offload_layers(model, "cpu")
    with pytest.raises(ValueError, match="layers that are offloaded already: leave offload off"):
        offload_layers(model, "cpu")
    with pytest.raises(ValueError, match="no list of layers to offload: leave offload off"):
        offload_layers(torch.nn.Linear(2, 2), "cpu")
    shared = made()
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"a layer of .* shares parameters with other parts: leave offload off"):
        offload_layers(shared, "cpu")
    with pytest.raises(ValueError, match="perturb='in_place', but the model is offloaded"):
        l2l.MeZO(model, perturb="in_place")
    with pytest.raises(ValueError, match=r"takes derivatives, and offloaded layers have no backward pass: use .* as mezo is"):
        ZOOptimizer(model, build_method("adamw", 1e-3, {}, None, model), 1e-3)
    loss = language_loss(model)
    with pytest.raises(RuntimeError, match=r"run the model inside torch.no_grad\(\)"):
        loss()
    with torch.no_grad():
        loss()
    l2l.MeZO(model, perturb="auto").step(loss)
    plain = made()
    l2l.MeZO(plain, perturb="in_place").step(language_loss(plain))
    with pytest.raises(TypeError, match="not copied or pickled: save it with save_pretrained"):
        copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    again = l2l.load_model(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert stream.resident_bytes >= 0


@pytest.mark.parametrize("train_layers", ["all", "top:1"])
def test_a_fine_tuning_run_is_that_in_memory(train_layers: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """With the prefix cache too, of which the layers below are never on the device again."""
    monkeypatch.setattr(l2l.train.config, "check_offload", lambda device: None)  # stands in for a device of its own
    monkeypatch.setattr(l2l.models.load, "check_offload", lambda device: None)
    small: dict[str, Any] = {"batch_size": 2, "train_size": 8, "dev_size": 4, "test_size": 4, "steps": 4, "progress": False}
    small |= {"train_layers": train_layers, "perturb": "functional", "lr": 1e-3, "eval_every": 2}
    kept, moved = (l2l.fine_tune(out=str(tmp_path / str(on)), offload=on, **small) for on in (False, True))
    assert stream_of(moved.model) is not None and stream_of(kept.model) is None
    names = ("initial_loss", "final_loss", "dev_loss", "best", "last")
    assert [moved.summary[name] for name in names] == [kept.summary[name] for name in names]
    pairs = zip(moved.model.state_dict().items(), kept.model.state_dict().values(), strict=True)
    assert all(torch.equal(own, other) for (_, own), other in pairs)
    again = l2l.load_model(moved.out / "model")
    assert all(torch.equal(own, moved.model.state_dict()[name]) for name, own in again.state_dict().items())
