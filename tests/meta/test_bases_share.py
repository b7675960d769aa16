"""What a basis found on the pool holds of the gradient of a task outside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import l2l
from l2l.estimators.backward import consume_gradients
from l2l.meta.bases import Losses, pool_basis
from l2l.meta.config import MetaTrainConfig
from l2l.meta.pool import PoolTask, load_pool
from l2l.meta.trajectory import TrajectoryConfig, at_rest, momentum_step
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.tasks.losses import batch_loss


def losses_of(model: nn.Module, task: PoolTask, batches: int) -> Losses:
    def at(number: int):
        batch = task.feeder.at(number)
        return lambda: batch_loss(model, batch, task.feeder.form)

    return Losses(task.task.name, at, batches)


def step(model: nn.Module, task: Losses, steps: int, lr: float = 1e-2) -> None:
    """First-order steps on batches behind those that are looked at."""
    theta = PerturbedParameters(Blocks.of(model))
    velocity = at_rest(theta.blocks)
    for number in range(steps):
        momentum_step(task.at(task.looked_at + number), theta, velocity, lr, TrajectoryConfig())


def shares(model: nn.Module, task: Losses, bases: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Per basis, the share of the mean gradient's squared norm inside, over the blocks that have one.

    Both norms are without the noise of single batches: |S|^2 - sum |g_i|^2 over k batches with the sum S.
    """
    blocks = Blocks.of(model)
    found = {}
    for label, basis in bases.items():
        total, inside = 0.0, 0.0
        sums = {i: torch.zeros_like(b.tensor.detach()) for i, b in enumerate(blocks) if b.name in basis}

        def take(index: int, gradient: Tensor, basis=basis, sums=sums) -> None:
            nonlocal total, inside
            if index in sums:
                sums[index] += gradient
                total -= gradient.square().sum().item()
                inside -= (gradient @ basis[blocks[index].name]).square().sum().item()

        for number in range(task.looked_at):
            consume_gradients(task.at(number), blocks, take)
        total += sum(value.square().sum().item() for value in sums.values())
        inside += sum((value @ basis[blocks[i].name]).square().sum().item() for i, value in sums.items())
        found[label] = inside / total
    return found


def test_bases_found_on_the_pool_hold_more_than_chance_of_another_tasks_gradient():
    model = l2l.load_model("l2l/tiny")
    model.eval()
    config = MetaTrainConfig(batch_size=8, train_size=64, dev_size=4)
    names = ["world_topic", "world_job", "world_season"]
    *pool, other = load_pool(names, config, model, l2l.load_tokenizer("l2l/tiny"), 128)
    bases = {source: pool_basis(model, pool, source, 8, batches=4) for source in ("gradients", "activations", "random")}
    task = losses_of(model, other, 4)
    step(model, task, 4)
    found = shares(model, task, bases)
    assert found["random"] < 0.15
    assert min(found["gradients"], found["activations"]) > 2 * found["random"]
