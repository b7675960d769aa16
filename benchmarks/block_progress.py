"""Where a zeroth-order step could gain: gradient against curvature by the role of the block, task by task.

With the learning rate tuned, a step along directions of block energies lambda gains
(sum lambda G)^2 / (2 sum lambda G' sum lambda T): G the squared norm of the full gradient, G' that of one batch's, T the
trace of the Gauss-Newton matrix. This script measures the three per block and prints, for each task and point of a
first-order trajectory, what a step gains that moves the blocks of one role only, over what a step gains that moves all
of them alike (MeZO's).

python benchmarks/block_progress.py --help
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l.estimators.backward import consume_gradients
from l2l.meta.config import MetaTrainConfig
from l2l.meta.labels import sampled_loss
from l2l.meta.objectives.runs import first_of_role
from l2l.meta.pool import PoolTask, load_pool
from l2l.meta.trajectory import TrajectoryConfig, at_rest, momentum_step
from l2l.models.load import context_length, load_model, load_tokenizer
from l2l.noise import Key
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.report.console import print_table
from l2l.report.files import write_json
from l2l.tasks.losses import batch_loss

APART = 10**5
"""Batches that the trajectory sees are counted from here, so that no measured batch is one of them."""


@dataclass(frozen=True)
class Figures:
    """Per block, float64 [blocks]."""

    signal: Tensor
    """G, from all pairs of different batches: without bias."""
    noisy: Tensor
    """G'."""
    trace: Tensor
    """T."""
    loss: float

    def gain(self, energies: Tensor) -> float:
        """(sum lambda G)^2 / (sum lambda G' * sum lambda T); 0 where the estimate of sum lambda G is not positive."""
        top = max(0.0, torch.dot(energies, self.signal).item())
        bottom = torch.dot(energies, self.noisy).item() * torch.dot(energies, self.trace).item()
        return top**2 / bottom if bottom > 0 else 0.0


def measure(model: Any, theta: PerturbedParameters, task: PoolTask, batches: int) -> Figures:
    """The figures of a task where theta stands."""
    blocks, feeder = theta.blocks, task.feeder
    total = {i: torch.zeros_like(block.tensor, dtype=torch.float64) for i, block in enumerate(blocks)}
    own, trace = torch.zeros(2, len(blocks), dtype=torch.float64)
    loss = 0.0

    def squares(into: Tensor, index: int, gradient: Tensor, weight: float) -> None:
        into[index] += weight * torch.sum(gradient.double() ** 2).item()

    for number in range(batches):
        batch = feeder.at(number)

        def take(index: int, gradient: Tensor) -> None:
            total[index] += gradient
            squares(own, index, gradient, 1.0)

        loss += consume_gradients(partial(batch_loss, model, batch, feeder.form), blocks, take) / batches
        drawn = sampled_loss(model, batch, feeder.form, Key(0, number))
        share = drawn.count / batches
        consume_gradients(drawn.closure, blocks, lambda i, g, share=share: squares(trace, i, g, share))
    squared = torch.tensor([torch.sum(total[i] ** 2).item() for i in range(len(blocks))], dtype=torch.float64)
    return Figures((squared - own) / (batches * (batches - 1)), own / batches, trace, loss)


def by_role(blocks: Blocks) -> dict[str, Tensor]:
    """Role -> energies [blocks]: 1 for the blocks of the role, else 0."""
    first = torch.tensor(first_of_role(blocks.names))
    return {blocks.names[i]: (first == i).double() for i in sorted(set(first.tolist()))}


def parser() -> argparse.ArgumentParser:
    """What the script is told."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="l2l/tiny")
    options.add_argument("--data_dir")
    options.add_argument("--tasks", nargs="+", help="default: the embedded pool and its validation tasks")
    options.add_argument("--points", nargs="+", type=int, default=[0, 5, 20], help="first-order steps before measuring")
    options.add_argument("--inner_lr", type=float, default=3e-3, help="of the first-order trajectory")
    options.add_argument("--batches", type=int, default=10)
    options.add_argument("--batch_size", type=int, default=16)
    options.add_argument("--max_length", type=int)
    options.add_argument("--out", default="runs/block-progress")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write; gives what is written."""
    from l2l.tasks.tiny_world import POOL, VALIDATION

    told = parser().parse_args(argv)
    names = told.tasks or [*POOL, *VALIDATION]
    model, tokenizer = load_model(told.model), load_tokenizer(told.model)
    model.eval()
    config = MetaTrainConfig(
        model=told.model, tasks=names, data_dir=told.data_dir, batch_size=told.batch_size, max_length=told.max_length
    )
    pool = load_pool(names, config, model, tokenizer, context_length(model, told.max_length))
    theta = PerturbedParameters(Blocks.of(model))
    start = {block.name: block.tensor.detach().clone() for block in theta.blocks}
    found: list[dict[str, Any]] = []
    for task in pool:
        theta.assign(start)
        found += list(along(model, theta, task, sorted(told.points), told.inner_lr, told.batches))
    print_table("progress of a tuned step that moves one role only, over one that moves all blocks alike", rows(found))
    result = {"blocks": list(theta.blocks.names), "settings": vars(told), "found": found}
    write_json(Path(told.out) / "block_progress.json", result)
    return result


def along(
    model: Any, theta: PerturbedParameters, task: PoolTask, points: Sequence[int], inner_lr: float, batches: int
) -> Iterator[dict[str, Any]]:
    """The figures at each point of a first-order trajectory, which theta follows."""
    roles, everything = by_role(theta.blocks), torch.ones(len(theta.blocks), dtype=torch.float64)
    travel, velocity, done = TrajectoryConfig(lr=inner_lr, momentum=0.9), at_rest(theta.blocks), 0
    for point in points:
        for number in range(done, point):
            closure = partial(batch_loss, model, task.feeder.at(APART + number), task.feeder.form)
            momentum_step(closure, theta, velocity, inner_lr, travel)
        done, figures = point, measure(model, theta, task, batches)
        plain = figures.gain(everything)
        yield {
            "task": task.task.name,
            "point": point,
            "loss": figures.loss,
            "signal_share": (figures.signal.sum() / figures.noisy.sum()).item(),
            "gain": plain,
            "gain_of_role": {role: figures.gain(chosen) / plain if plain else 0.0 for role, chosen in roles.items()},
            "signal": figures.signal.tolist(),
            "noisy": figures.noisy.tolist(),
            "trace": figures.trace.tolist(),
        }


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The table."""
    return [
        {"task": f"{one['task']} {one['point']}", "loss": f"{one['loss']:.2f}", "G/G'": f"{one['signal_share']:.2f}"}
        | {short(role): f"{gain:.1f}" for role, gain in one["gain_of_role"].items()}
        for one in found
    ]


def short(role: str) -> str:
    """The part of a block's name that tells its role."""
    words = [word for word in role.split(".") if word not in ("weight", "model", "layers") and not word.isdigit()]
    return words[-1]


if __name__ == "__main__":
    main()
