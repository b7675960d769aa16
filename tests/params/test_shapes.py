"""Walking along a shape: what is written is what is walked, in every way of walking."""

from __future__ import annotations

from typing import Any, final

import pytest
import torch
from cases import TiedLM, farthest, weights
from torch import Tensor

from l2l.noise import Distribution, Key, standard_noise
from l2l.params import Basis, Block, Blocks, Direction, DirectionOperator, PerturbedParameters, dense_direction


@final
class Doubled(DirectionOperator):
    """Twice the noise of another name, in matrices."""

    def covers(self, index: int) -> bool:
        return index in (0, 1)

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        dtype = torch.promote_types(block.tensor.dtype, torch.float32)
        return 2 * standard_noise(f"{block.name}#twice", key, block.tensor.shape, distribution, dtype)


KEY = Key(3, 1)


def direction(blocks: Blocks) -> Direction:
    return Direction(KEY, tuple(0.5 + 0.1 * i for i in range(len(blocks))), factor=0.7, shape=Doubled())


def expected(blocks: Blocks, u: Direction) -> dict[str, Tensor]:
    found = {}
    for i, block in enumerate(blocks):
        name, times = (f"{block.name}#twice", 2) if i in (0, 1) else (block.name, 1)
        z = standard_noise(name, KEY, block.tensor.shape, dtype=torch.float64)
        found[block.name] = times * u.factor * u.sigma[i] * z
    return found


def test_written_is_the_scaled_shape_where_it_covers_and_scaled_noise_elsewhere():
    blocks = Blocks.of(TiedLM().double())
    u = direction(blocks)
    for i, (name, want) in enumerate(expected(blocks, u).items()):
        torch.testing.assert_close(dense_direction(u, blocks, i), want, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("walk", ["in_place", "functional"])
def test_a_look_stands_where_it_says_and_a_move_goes_there(dtype: torch.dtype, walk: Any):
    if dtype == torch.bfloat16 and walk == "in_place":
        pytest.skip("half precision is never walked in place")
    model = TiedLM().to(dtype)
    blocks = Blocks.of(model)
    theta, u, start = PerturbedParameters(blocks, walk), direction(blocks), weights(model)
    seen: dict[str, Tensor] = {}
    with theta.step(), torch.no_grad():
        theta.perturb(u, 0.25)
        theta.evaluate(lambda: seen.update({name: p + 0 for name, p in model.named_parameters()}))
        theta.add(u, (0.5,) * len(blocks))
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 2e-2}[dtype]
    for name, u_b in expected(blocks, u).items():
        looked, moved = seen[name].double() - start[name].double(), weights(model)[name].double() - start[name].double()
        scale = u_b.abs().max().item() + 1
        assert (looked - 0.25 * u_b).abs().max() < tolerance * scale
        assert (moved - 0.5 * u_b).abs().max() < tolerance * scale


def test_theta_returns_from_a_look_along_a_shape_after_an_error():
    model = TiedLM()
    theta, start = PerturbedParameters(Blocks.of(model)), weights(model)
    u = direction(theta.blocks)
    with pytest.raises(RuntimeError, match="here"), theta.step():
        theta.perturb(u, 0.1)
        theta.add(u, (1.0,) * len(theta.blocks))
        theta.perturb(u, -0.1)
        raise RuntimeError("here")
    assert farthest(start, weights(model)) < 1e-6


def test_sparse_embeddings_look_up_rows_of_the_shape():
    embedding = torch.nn.Embedding(50, 4)
    blocks = Blocks.of(embedding)
    theta, u, start = (
        PerturbedParameters(blocks, sparse_embeddings=True),
        direction(blocks),
        embedding.weight.detach().clone(),
    )
    ids = torch.tensor([3, 7, 3])
    with theta.step(), torch.no_grad():
        theta.perturb(u, 0.5)
        seen = theta.evaluate(lambda: embedding(ids).detach())
        theta.add(u, (1.0,))
    u_b = expected(blocks, u)["weight"].float()
    torch.testing.assert_close(seen, start[ids] + 0.5 * u_b[ids])
    torch.testing.assert_close(embedding.weight.detach()[[3, 7]], start[[3, 7]] + u_b[[3, 7]])
    untouched = [i for i in range(50) if i not in (3, 7)]
    assert torch.equal(embedding.weight.detach()[untouched], start[untouched])


def test_a_step_that_lies_along_no_direction_refuses_sparse_embeddings():
    theta = PerturbedParameters(Blocks.of(torch.nn.Embedding(50, 4)), sparse_embeddings=True)
    with pytest.raises(ValueError, match="needs a method that moves along its directions"), theta.step():
        theta.add_dense_each(lambda i: torch.ones(50, 4), [1.0])


def test_a_basis_and_a_shape_are_refused_together():
    basis = Basis({0: torch.eye(4)[:, :1]})
    with pytest.raises(ValueError, match="along a basis or a shape, not both"):
        Direction(KEY, (1.0,), basis=basis, basis_sigma=(1.0,), shape=Doubled())
