"""Sigma from gradients and by boosting one block, where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from l2l.experiments.controls import BOOST, MIN_SIGMA, boosted, gradient_agreement, sigma_from
from l2l.params import Blocks


class Linear(nn.Module):
    """A loss whose gradient is the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))

    def loss(self, a: list[float], b: list[float]) -> Tensor:
        return self.a @ torch.tensor(a) + self.b @ torch.tensor(b)


def test_agreement_is_the_mean_inner_product_over_all_pairs_of_batches():
    model = Linear()
    batches = [([1.0, 0.0, 2.0], [1.0, 1.0]), ([3.0, 1.0, 0.0], [-1.0, 0.0]), ([0.0, 1.0, 1.0], [2.0, -3.0])]
    found = gradient_agreement([lambda batch=batch: model.loss(*batch) for batch in batches], Blocks.of(model))
    pairs = [(0, 1), (0, 2), (1, 2)]
    for block in (0, 1):
        dots = [torch.tensor(batches[i][block]) @ torch.tensor(batches[j][block]) for i, j in pairs]
        assert found[block] == pytest.approx(float(sum(dots)) / 3)
    assert found[1] < 0


def test_agreement_needs_two_batches():
    model = Linear()
    with pytest.raises(ValueError, match="1 batches"):
        gradient_agreement([lambda: model.loss([1.0, 0.0, 0.0], [0.0, 0.0])], Blocks.of(model))


def test_sigma_squared_is_agreement_per_coordinate_with_a_floor_and_mean_square_one():
    blocks = Blocks.of(Linear())
    sigma = sigma_from([torch.tensor([3.0, 8.0], dtype=torch.float64)], blocks)
    assert (sigma[1] / sigma[0]) ** 2 == pytest.approx(4.0)
    assert float(3 * sigma[0] ** 2 + 2 * sigma[1] ** 2) == pytest.approx(5.0)
    assert sigma_from([torch.tensor([3.0, -8.0])], blocks)[1] == pytest.approx(MIN_SIGMA)


def test_tasks_weigh_alike_whatever_the_size_of_their_gradients():
    blocks = Blocks.of(Linear())
    large, small = torch.tensor([1e6, 0.0]), torch.tensor([0.0, 1e-6])
    sigma = sigma_from([large, small], blocks)
    assert (sigma[1] / sigma[0]) ** 2 == pytest.approx(3 / 2)
    with pytest.raises(ValueError, match="control_batches"):
        sigma_from([-large, -small], blocks)


class Narrowing(nn.Module):
    """Widens and narrows twice; the second way back is the louder one."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 4)])
        with torch.no_grad():
            self.layers[2].weight.mul_(100)
            self.layers[3].weight.mul_(10)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.lookup(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_the_block_boosted_is_the_loudest_of_the_matrices_that_narrow():
    torch.manual_seed(0)
    model = Narrowing()
    sigma, name = boosted(model, lambda: model(torch.arange(5)))
    assert name == "layers.3.weight"
    names = Blocks.of(model).names
    assert sigma.tolist() == [BOOST if block == name else 1.0 for block in names]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_narrows_nowhere_has_no_block_to_boost():
    model = nn.Linear(4, 8)
    with pytest.raises(ValueError, match="no block to boost"):
        boosted(model, lambda: model(torch.ones(4)))
