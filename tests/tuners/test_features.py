"""What a tuner sees, how its sigma is normalised, and the network between."""

from __future__ import annotations

import pytest
import torch
from cases import TiedLM
from torch import nn

from l2l.params.blocks import Block, Blocks
from l2l.params.engine import block_moments
from l2l.tuners.api import Tuner
from l2l.tuners.features import FEATURES, RunStatistics, paper_features
from l2l.tuners.networks import PerBlockMLP
from l2l.tuners.normalize import EnergyNormalizer


def block(values: list, embedding: bool = False) -> Block:
    return Block(f"b{values}", torch.tensor(values), embedding)


def test_moments_are_the_mean_and_the_unbiased_variance():
    assert block_moments(Blocks([block([1.0, 2.0, 3.0, 6.0])]))[0] == pytest.approx((3.0, 14 / 3))


def test_the_variance_of_a_single_number_is_zero():
    assert block_moments(Blocks([block([4.0])])) == ((4.0, 0.0),)
    assert block_moments(Blocks([block([[4.0]])])) == ((4.0, 0.0),)


def test_features_are_moments_losses_and_the_last_sigma():
    blocks = Blocks([block([1.0, 3.0]), block([5.0])])
    moments = torch.tensor(block_moments(blocks), dtype=torch.float64)
    features = paper_features(RunStatistics(torch.tensor([0.25, 0.5]), moments, 2.0, 1.5))
    assert features.tolist() == [[2.0, 2.0, 2.0, 1.5, 0.25], [5.0, 0.0, 2.0, 1.5, 0.5]]
    assert features.dtype == torch.float32
    assert not features.requires_grad


def test_a_history_starts_with_sigma_one_and_losses_zero():
    history = RunStatistics.start(Blocks([block([1.0]), block([2.0])]))
    assert history.sigma.tolist() == [1.0, 1.0]
    assert (history.loss_plus, history.loss_minus) == (0.0, 0.0)
    assert history.centre == (1.0, 2.0)


def test_a_history_can_be_brought_up_to_date_with_weights_that_something_else_has_moved():
    blocks = Blocks([block([1.0, 3.0])])
    history = RunStatistics(torch.tensor([0.25]), torch.zeros(1, 2, dtype=torch.float64), 2.0, 1.5)
    now = history.at(blocks)
    assert now.moments.tolist() == [[2.0, 2.0]]
    assert (now.sigma, now.loss_plus, now.loss_minus) == (history.sigma, 2.0, 1.5)


@pytest.mark.parametrize("sizes", [[(3, 4), (5,)], [(100, 2), (7, 7), (1,)]])
def test_normalised_sigma_spends_the_energy_of_mezo(sizes: list[tuple[int, ...]]):
    blocks = Blocks([Block(str(i), torch.zeros(size), i == 0) for i, size in enumerate(sizes)])
    normalizer = EnergyNormalizer(batch_size=2)
    sigma = torch.rand(len(sizes), generator=torch.Generator().manual_seed(0)) * 3
    counts = normalizer.counts(blocks)
    factor = normalizer.factor(sigma, counts)
    assert (counts * (factor * sigma.double()) ** 2).sum().item() == pytest.approx(counts.sum().item(), rel=1e-12)


@pytest.mark.parametrize(("batch", "rows"), [(1, 15), (2, 30), (16, 100)])
def test_only_the_rows_of_an_embedding_that_a_batch_touches_count(batch: int, rows: int):
    blocks = Blocks([Block("embedding", torch.zeros(100, 8), True), Block("matrix", torch.zeros(100, 8))])
    assert EnergyNormalizer(batch_size=batch).counts(blocks).tolist() == [rows * 8, 800]


def test_a_normaliser_can_be_turned_off():
    assert EnergyNormalizer(enabled=False).factor(torch.tensor([3.0]), torch.tensor([1.0])) == 1.0


@pytest.mark.parametrize("sigma", [[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_sigma_without_energy_or_not_finite_is_refused(sigma: list[float]):
    with pytest.raises(ValueError, match=r"sigma has energy .*: it must be finite and not zero everywhere"):
        EnergyNormalizer().factor(torch.tensor(sigma), torch.ones(2, dtype=torch.float64))


def plain(network: PerBlockMLP, row: int) -> nn.Sequential:
    """Block ``row``'s network as an ordinary module of torch."""
    module = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
    parts = (network.first_weight, network.first_bias, network.second_weight, network.second_bias)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), parts, strict=True):
            parameter.copy_(value[row].reshape(parameter.shape))
    return module


def test_the_batched_network_equals_one_network_of_449_parameters_per_block():
    network = PerBlockMLP(7, seed=1)
    features = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(0))
    sigma = network(features)
    for row in range(7):
        module = plain(network, row)
        assert sum(parameter.numel() for parameter in module.parameters()) == 449
        torch.testing.assert_close(sigma[row], module(features[row]).abs()[0], rtol=1e-6, atol=1e-6)
    assert sum(parameter.numel() for parameter in network.parameters()) == 7 * 449


def test_gradients_of_the_batched_network_equal_those_of_the_single_ones():
    network = PerBlockMLP(3, seed=1)
    features = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0))
    modules = [plain(network, row) for row in range(3)]
    network(features).sum().backward()
    for row, module in enumerate(modules):
        module(features[row]).abs().sum().backward()
        first = module[0]
        assert isinstance(first, nn.Linear)
        assert first.weight.grad is not None
        assert network.first_weight.grad is not None
        torch.testing.assert_close(network.first_weight.grad[row], first.weight.grad, rtol=1e-5, atol=1e-7)


def test_rows_choose_networks():
    network = PerBlockMLP(5)
    features = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(0))
    rows = [3, 0, 4]
    assert torch.equal(network(features[rows], rows), network(features)[rows])


def test_the_initialisation_is_torchs_own_range_fixed_by_the_seed():
    network = PerBlockMLP(200)
    assert network.first_weight.abs().max() <= 5**-0.5
    assert network.second_weight.abs().max() <= 64**-0.5
    assert network.first_weight.std().item() == pytest.approx(5**-0.5 / 3**0.5, rel=0.02)
    assert torch.equal(network.first_weight, PerBlockMLP(200).first_weight)
    assert not torch.equal(network.first_weight, PerBlockMLP(200, seed=1).first_weight)


def test_networks_of_different_blocks_start_different():
    weight = PerBlockMLP(50).first_weight.detach().flatten(1)
    assert len({tuple(row) for row in weight.tolist()}) == 50


def test_sigma_is_differentiable_in_the_network_and_its_features_are_not():
    model = TiedLM()
    tuner = Tuner.for_model(model)
    blocks = Blocks.of(model)
    sigma = tuner.sigma(tuner.features(RunStatistics.start(blocks)), blocks.names)
    assert sigma.requires_grad
    assert (sigma >= 0).all()
    sigma.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(tuner.normalizer.factor(sigma, tuner.normalizer.counts(blocks)), float)


def test_a_frozen_subset_gets_the_sigma_it_has_in_the_whole():
    model = TiedLM()
    tuner = Tuner.for_model(model, seed=2)
    whole = Blocks.of(model)
    history = RunStatistics.start(whole)
    everything = dict(zip(whole.names, tuner.sigma(tuner.features(history), whole.names).tolist(), strict=True))
    model.embed.weight.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    part = Blocks.of(model)
    tuner.check(model)
    found = tuner.sigma(tuner.features(RunStatistics.start(part)), part.names).tolist()
    assert found == pytest.approx([everything[name] for name in part.names], rel=1e-6)


def test_a_block_that_the_tuner_does_not_know_is_named():
    tuner = Tuner.for_model(TiedLM())
    with pytest.raises(ValueError, match="has no block 'a', 'b', 'c' and 1 more"):
        tuner.rows(["embed.weight", "a", "b", "c", "d"])


def test_a_mismatch_names_missing_extra_and_reshaped_blocks():
    left = nn.ModuleDict({"shared": nn.Linear(2, 2), "mine": nn.Linear(2, 2, bias=False)})
    right = nn.ModuleDict({"shared": nn.Linear(3, 2), "theirs": nn.Linear(2, 2, bias=False)})
    with pytest.raises(ValueError) as caught:
        Tuner.for_model(left).check(right)
    message = str(caught.value)
    assert "1 missing in the model: 'mine.weight'" in message
    assert "1 not in the tuner: 'theirs.weight'" in message
    assert "1 of another shape: 'shared.weight'" in message
    assert "l2l meta-train" in message
    assert "\n" not in message
