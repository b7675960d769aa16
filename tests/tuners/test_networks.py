"""The architectures beside the paper's: one network for all blocks, and none at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TiedLM

from l2l.params import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.features import FEATURES, RunStatistics
from l2l.tuners.networks import PerBlockMLP, SharedMLP, Table, build_network

LEARNING = [("per_block_mlp", {}), ("shared_mlp", {}), ("shared_mlp", {"embedding": 4}), ("table", {})]


def features(blocks: int, width: int = FEATURES) -> torch.Tensor:
    return torch.randn(blocks, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("architecture", "options"), LEARNING)
def test_mezo_s_start_is_sigma_exactly_one_and_can_be_learned_from(architecture: str, options: dict[str, Any]):
    network = build_network(architecture, {"blocks": 7, "start": "mezo", **options})
    sigma = network(features(7))
    assert torch.equal(sigma, torch.ones(7))
    torch.sum(sigma * torch.arange(7)).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert any(gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients)


@pytest.mark.parametrize(("architecture", "options"), LEARNING)
def test_a_second_output_starts_at_the_basis_s_own_scale(architecture: str, options: dict[str, Any]):
    network = build_network(architecture, {"blocks": 7, "start": "mezo", "outputs": 2, "basis_start": 0.25, **options})
    sigma = network(features(7))
    assert torch.equal(sigma[:, 0], torch.ones(7))
    torch.testing.assert_close(sigma[:, 1], torch.full((7,), 0.25))


@pytest.mark.parametrize(("architecture", "options"), LEARNING)
@pytest.mark.parametrize("outputs", [1, 2])
def test_rows_choose_blocks_and_sigma_is_positive(architecture: str, options: dict[str, Any], outputs: int):
    network = build_network(architecture, {"blocks": 5, "outputs": outputs, "start": "random", **options})
    given, rows = features(5), [3, 0, 4]
    whole = network(given)
    assert whole.shape == ((5,) if outputs == 1 else (5, 2))
    assert (whole > 0).all()
    torch.testing.assert_close(network(given[rows], rows), whole[rows])


@pytest.mark.parametrize(("architecture", "options"), LEARNING)
def test_the_seed_fixes_a_random_start_and_the_global_state_is_not_touched(architecture: str, options: dict[str, Any]):
    before = torch.get_rng_state()
    one, same, other = (
        build_network(architecture, {"blocks": 5, "seed": seed, "start": "random", **options})(features(5))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_one_network_serves_all_blocks_unless_they_have_embeddings():
    alike = features(1).expand(6, -1)
    same = SharedMLP(6, start="random")(alike)
    torch.testing.assert_close(same, same[:1].expand(6))
    own = SharedMLP(6, start="random", embedding=3)(alike).tolist()
    assert len(set(own)) == 6


def test_the_shared_network_is_two_linear_layers():
    network = SharedMLP(4, hidden=8, start="random", outputs=2)
    given = features(4)
    hidden = torch.tanh(torch.nn.functional.linear(given, network.first_weight, network.first_bias))
    wanted = torch.nn.functional.linear(hidden, network.second_weight, network.second_bias).exp()
    torch.testing.assert_close(network(given), wanted)


def test_a_table_starts_from_the_values_it_is_given():
    values = [0.5, 2.0, 1e-3, 40.0]
    network = Table(4, values=values)
    torch.testing.assert_close(network(torch.zeros(4, 5)), torch.tensor(values))
    both = Table(4, outputs=2, values=values, basis_values=[1.0, 2.0, 3.0, 4.0])(torch.zeros(4, 5))
    torch.testing.assert_close(both, torch.tensor([values, [1.0, 2.0, 3.0, 4.0]]).t())


def test_a_table_does_not_look():
    network = Table(4, start="random")
    assert torch.equal(network(torch.zeros(4, 5)), network(torch.ones(4, 5)))


def test_a_table_s_values_are_saved_with_the_tuner(tmp_path):
    model = TiedLM()
    values = [float(i + 1) for i in range(6)]
    tuner = Tuner.for_model(model, "table", values=values)
    with torch.no_grad():
        tuner.network.get_parameter("log_sigma").add_(0.5)
    loaded = Tuner.from_pretrained(tuner.save_pretrained(tmp_path))
    history = RunStatistics.start(Blocks.of(model))
    names = Blocks.of(model).names
    assert torch.equal(loaded.sigma(loaded.features(history), names), tuner.sigma(tuner.features(history), names))
    assert loaded.architecture_args["values"] == values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": [1.0]}, "has 1 values for 2 blocks: give one per block"),
        ({"values": [1.0, 0.0]}, r"values hold 0\.0: each must be positive and finite"),
        ({"values": [1.0, float("nan")]}, "values hold nan"),
        ({"basis_values": [1.0, 1.0]}, "basis_values are given for one output"),
        ({"start": "zero"}, "start='zero' must be 'random' or 'mezo'"),
        ({"outputs": 3}, "outputs=3 must be 1"),
        ({"outputs": 2, "basis_start": 0.0}, r"basis_start=0\.0 must be positive"),
    ],
)
def test_a_table_that_cannot_be_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Table(2, **options)


@pytest.mark.parametrize("kind", [PerBlockMLP, SharedMLP])
def test_an_unknown_start_is_refused(kind: Any):
    with pytest.raises(ValueError, match="start='warm' must be 'random' or 'mezo'"):
        kind(2, start="warm")


MINE = """
import torch
from torch import nn
from l2l.tuners.networks import TunerNetwork

class LogLinear(TunerNetwork):
    shared = frozenset({"weight"})

    def __init__(self, blocks, seed=0, inputs=5, outputs=1):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs)), nn.Parameter(torch.zeros(blocks))

    def forward(self, features, rows=None):
        return torch.exp(features @ self.weight + (self.bias if rows is None else self.bias[torch.tensor(rows)]))
"""


@pytest.mark.parametrize("architecture", ["my_net", "my_net:LogLinear"])
def test_a_network_of_another_package_is_one_file_and_a_file_on_disk_imports_none(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "my_net.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    made = Tuner.for_model(TiedLM(), architecture)
    folder = made.save_pretrained(tmp_path / "tuner")
    assert type(Tuner.from_pretrained(folder).network) is type(made.network)
    monkeypatch.delitem(sys.modules, "my_net")
    with pytest.raises(ValueError, match=r"module 'my_net' is neither imported nor named in L2L_NETWORKS"):
        Tuner.from_pretrained(folder)
    assert "my_net" not in sys.modules
    monkeypatch.setenv("L2L_NETWORKS", "other,my_net")
    assert type(Tuner.from_pretrained(folder).network).__name__ == "LogLinear"
    monkeypatch.delitem(sys.modules, "my_net")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("../evil", "it is no path of a module"),
        ("no_such_module_of_mine", "No module named 'no_such_module_of_mine'"),
        ("l2l.tuners.networks:Nothing", "has 0 such networks"),
        ("l2l.tuners.networks", "has 3 such networks"),
    ],
)
def test_a_network_that_is_not_there_is_refused(architecture: str, message: str):
    with pytest.raises(ValueError, match=f"unknown tuner architecture .*{message}"):
        Tuner.for_model(TiedLM(), architecture)


def test_a_table_drawn_at_random_has_mean_one_and_the_spread_asked_for():
    sigma = Table(200_000, start="random", cv=0.5)(torch.zeros(200_000, 5)).detach()
    assert sigma.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (sigma.std() / sigma.mean()).item() == pytest.approx(0.5, rel=0.02)
