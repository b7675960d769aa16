"""Features of blocks: the paper's, raw, and the standard ones, never undefined; the record of a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import TiedLM
from torch import Tensor, nn

from l2l.methods.learned import Learned
from l2l.optim import ZOOptimizer
from l2l.params import Block, Blocks
from l2l.params.engine import block_moments
from l2l.tuners.api import Tuner
from l2l.tuners.features import (
    FEATURE_SETS,
    FEATURES,
    FLOOR,
    LIMIT,
    STANDARD_COLUMNS,
    RunStatistics,
    block_constants,
    depths,
    feature_set,
    kind_of,
    log_ratio,
    paper_features,
    standard_features,
)
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


def column(features: Tensor, name: str) -> list[float]:
    return features[:, STANDARD_COLUMNS.index(name)].tolist()


def pair(first: list, second: list) -> Blocks:
    return Blocks([Block("a", torch.tensor(first)), Block("b", torch.tensor(second))])


def test_at_the_start_only_the_weights_and_what_the_blocks_are_can_be_seen():
    model = TiedLM()
    features = standard_features(RunStatistics.start(Blocks.of(model)))
    assert features.shape == (6, len(STANDARD_COLUMNS))
    assert features.dtype == torch.float32
    for name in ("relative_variance", "last_sigma", "relative_loss", "step_fraction"):
        assert column(features, name) == [0.0] * 6
    for name in ("relative_gradient", "relative_curvature"):
        assert column(features, name) == [0.0] * 6


def test_variance_is_seen_relative_to_the_start_on_a_log_scale():
    start = RunStatistics.start(pair([1.0, -1.0], [0.0, 0.0]))
    now = replace(start, moments=torch.tensor([[0.0, 2.0 * math.e], [0.0, 0.0]], dtype=torch.float64))
    assert column(standard_features(now), "relative_variance") == pytest.approx([1.0, 0.0], abs=1e-5)


def test_a_block_that_starts_constant_has_a_finite_relative_variance():
    start = RunStatistics.start(pair([1.0, 1.0], [0.0, 0.0]))
    now = replace(start, moments=torch.tensor([[1.0, 3 * FLOOR], [0.0, 1e6]], dtype=torch.float64))
    assert column(standard_features(now), "relative_variance") == pytest.approx([math.log(4), LIMIT], rel=1e-4)


def test_the_mean_is_seen_over_the_spread_and_stays_bounded():
    seen = column(standard_features(RunStatistics.start(pair([3.0, 5.0], [1.0, 1.0]))), "mean_over_spread")
    assert seen == pytest.approx([4 / math.sqrt(16 + 2), 1.0], rel=1e-6)


def test_the_last_sigma_is_seen_on_a_log_scale_and_zero_is_not_minus_infinity():
    history = replace(RunStatistics.start(pair([1.0], [2.0])), sigma=torch.tensor([math.e, 0.0]))
    assert column(standard_features(history), "last_sigma") == pytest.approx([1.0, -LIMIT])


def test_losses_and_gradients_are_seen_as_running_means_over_their_first_values():
    history = RunStatistics.start(pair([1.0], [2.0]))
    for losses, gradient in (((3.0, 5.0), -2.0), ((1.0, 1.0), 4.0)):
        history = history.after([1.0, 1.0], history.moments.tolist(), [losses], [gradient])
    features = standard_features(history)
    assert column(features, "relative_loss") == pytest.approx([math.log((0.9 * 4 + 0.1 * 1) / 4)] * 2)
    assert column(features, "relative_gradient") == pytest.approx([math.log((0.9 * 2 + 0.1 * 4) / 2)] * 2)
    assert column(features, "relative_curvature") == [0.0, 0.0]
    assert (history.loss_plus, history.loss_minus, history.step) == (1.0, 1.0, 2)


def test_several_draws_count_as_one_step_of_their_mean():
    start = RunStatistics.start(pair([1.0], [2.0]))
    history = start.after([1.0, 1.0], start.moments.tolist(), [(1.0, 3.0), (5.0, 7.0)], [-2.0, 4.0])
    assert (history.loss, history.gradient, history.step) == ((4.0, 4.0), (3.0, 3.0), 1)
    assert (history.loss_plus, history.loss_minus) == (5.0, 7.0)


def test_curvature_is_kept_where_a_step_did_not_measure_it():
    history = RunStatistics.start(pair([1.0], [2.0]))
    for curvature in (None, 2.0, None, 4.0):
        history = history.after([1.0, 1.0], history.moments.tolist(), [(1.0, 1.0)], [1.0], curvature)
    assert history.curvature == (2.0, pytest.approx(2.2))
    assert column(standard_features(history), "relative_curvature") == pytest.approx([math.log(1.1)] * 2)


@pytest.mark.parametrize(("step", "horizon", "seen"), [(3, 12, 0.25), (20, 10, 1.0), (7, 0, 0.0)])
def test_the_share_of_the_run_is_seen_where_its_length_is_known(step: int, horizon: int, seen: float):
    history = replace(RunStatistics.start(pair([1.0], [2.0]), horizon), step=step)
    assert column(standard_features(history), "step_fraction") == [seen, seen]


@pytest.mark.parametrize(
    ("running", "seen"),
    [((0.0, 0.0), 0.0), ((2.0, 1.0), math.log(0.5)), ((1.0, -1.0), -LIMIT), ((-2.0, -4.0), math.log(2)), ((1, 1e9), 8)],
)
def test_a_ratio_is_defined_whatever_the_sign_of_the_loss(running: tuple[float, float], seen: float):
    assert log_ratio(running) == pytest.approx(seen)


def test_what_is_not_finite_is_not_masked():
    assert math.isnan(log_ratio((1.0, float("nan"))))
    history = RunStatistics.start(pair([1.0], [2.0]))
    assert standard_features(replace(history, sigma=torch.tensor([float("nan"), 1.0])))[0].isnan().any()


def test_the_constants_say_what_a_block_is():
    model = TiedLM()
    blocks = Blocks.of(model)
    kinds = {block.name: kind_of(block) for block in blocks}
    assert kinds["embed.weight"] == "embedding"
    assert kinds["attention.qkv.weight"] == "attention matrix"
    assert kinds["attention.qkv.bias"] == "attention vector"
    assert kinds["norm.weight"] == "vector"
    row = dict(zip(blocks.names, block_constants(blocks, torch.ones(6, 2)).tolist(), strict=True))
    size = [math.log10(192) / 6, math.log10(8) / 3]
    assert row["embed.weight"][1:5] == [1.0, 0.0, 0.0, 0.0]
    assert row["attention.qkv.weight"][1:5] == [0.0, 1.0, 0.0, 1.0]
    assert row["norm.weight"][1:5] == [0.0, 0.0, 1.0, 0.0]
    assert row["attention.qkv.weight"][6:] == pytest.approx(size)
    assert row["norm.weight"][6:] == pytest.approx([math.log10(8) / 6, 0.0])


def test_depth_follows_the_first_number_in_a_name_or_the_position():
    names = ["wte.weight", "h.0.mlp.weight", "h.1.experts.5.weight", "h.3.mlp.weight", "ln_f.weight"]
    assert depths(names) == [0.0, 0.125, 0.375, 0.875, 1.0]
    assert depths(["a", "b", "c"]) == [0.0, 0.5, 1.0]
    assert depths(["a"]) == [0.0]


class Shapes(nn.Module):
    """Blocks of every odd shape."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 2), nn.Conv1d(2, 3, 2)])
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.single = nn.Parameter(torch.randn(1, generator=draw))
        self.norm = nn.LayerNorm(4)

    def forward(self) -> Tensor:
        return torch.stack([(parameter - 1).square().sum() for parameter in self.parameters()]).sum()


@pytest.mark.parametrize("make", [TiedLM, Shapes])
def test_features_are_finite_and_of_order_one_at_step_0_and_ever_after(make: type[nn.Module]):
    model = make()
    tuner = Tuner.for_model(model, "shared_mlp", features="standard", start="random")
    optimizer = ZOOptimizer(model, Learned(tuner, horizon=20), lr=0.01)
    for step in range(21):
        features = tuner.features(optimizer.method_state)
        assert torch.isfinite(features).all()
        assert features.abs().max() <= LIMIT
        assert column(features, "step_fraction")[0] == pytest.approx(step / 20)
        if step < 20:
            optimizer.step(model)
    assert column(tuner.features(optimizer.method_state), "relative_loss")[0] < 0


def test_a_run_saved_without_the_constants_is_refused_with_a_way_out_and_serves_the_paper_features():
    old = RunStatistics(torch.ones(2), torch.ones(2, 2, dtype=torch.float64), 2.0, 1.0)
    with pytest.raises(ValueError, match="saved by an earlier l2l that kept too little for the features 'standard'"):
        standard_features(old)
    assert FEATURE_SETS["paper"].compute(old).tolist() == [[1.0, 1.0, 2.0, 1.0, 1.0]] * 2


def test_every_feature_set_has_as_many_columns_as_it_names():
    history = RunStatistics.start(Blocks.of(TiedLM()))
    for found in FEATURE_SETS.values():
        assert found.compute(history).shape == (6, len(found.columns))
    with pytest.raises(ValueError, match="unknown tuner features 'mine': l2l has paper, standard"):
        feature_set("mine")


def test_a_network_for_another_number_of_features_is_refused():
    with pytest.raises(ValueError, match="takes 3 features, but 'paper' has 5"):
        Tuner.for_model(TiedLM(), inputs=3)
