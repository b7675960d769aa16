"""The progress of zeroth-order steps: gradient against curvature by the role of the block, task by task.

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

from l2l.estimators import consume_gradients
from l2l.meta.config import MetaTrainConfig
from l2l.meta.curvature import sampled_loss
from l2l.meta.objectives.evolution import first_of_role
from l2l.meta.pool import PoolTask, load_pool
from l2l.meta.trajectory import momentum_step, zero_velocity
from l2l.models.load import context_length, load_model, load_tokenizer
from l2l.noise import Key
from l2l.params import Blocks, PerturbedParameters
from l2l.report.console import print_table
from l2l.report.run_directory import write_json
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
    """The figures of a task at the current parameters."""
    blocks, batcher = theta.blocks, task.batcher
    total = {i: torch.zeros_like(block.tensor, dtype=torch.float64) for i, block in enumerate(blocks)}
    own, trace = torch.zeros(2, len(blocks), dtype=torch.float64)
    loss = 0.0

    def squares(into: Tensor, index: int, gradient: Tensor, weight: float) -> None:
        into[index] += weight * torch.sum(gradient.double() ** 2).item()

    for number in range(batches):
        batch = batcher.at(number)

        def take(index: int, gradient: Tensor) -> None:
            total[index] += gradient
            squares(own, index, gradient, 1.0)

        loss += consume_gradients(partial(batch_loss, model, batch, batcher.form), blocks, take) / batches
        drawn = sampled_loss(model, batch, batcher.form, Key(0, number))
        share = drawn.count / batches
        consume_gradients(drawn.closure, blocks, lambda i, g, share=share: squares(trace, i, g, share))
    squared = torch.tensor([torch.sum(total[i] ** 2).item() for i in range(len(blocks))], dtype=torch.float64)
    return Figures((squared - own) / (batches * (batches - 1)), own / batches, trace, loss)


def by_role(blocks: Blocks) -> dict[str, Tensor]:
    """Role -> energies [blocks]: 1 for the blocks of the role, else 0."""
    first = torch.tensor(first_of_role(blocks.names))
    return {blocks.names[i]: (first == i).double() for i in sorted(set(first.tolist()))}


def parser() -> argparse.ArgumentParser:
    """The options of the script."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="l2l/tiny")
    found.add_argument("--data_dir")
    found.add_argument("--tasks", nargs="+", help="default: the embedded pool and its validation tasks")
    found.add_argument("--points", nargs="+", type=int, default=[0, 5, 20], help="first-order steps before measuring")
    found.add_argument("--inner_lr", type=float, default=3e-3, help="of the first-order trajectory")
    found.add_argument("--batches", type=int, default=10)
    found.add_argument("--batch_size", type=int, default=16)
    found.add_argument("--max_length", type=int)
    found.add_argument("--out", default="runs/block-progress")
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write; gives what is written."""
    from l2l.tasks.tiny_world import POOL, VALIDATION

    options = parser().parse_args(argv)
    names = options.tasks or [*POOL, *VALIDATION]
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    model.eval()
    config = MetaTrainConfig(
        model=options.model,
        tasks=names,
        data_dir=options.data_dir,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )
    pool = load_pool(names, config, model, tokenizer, context_length(model, options.max_length))
    theta = PerturbedParameters(Blocks.of(model))
    start = {block.name: block.tensor.detach().clone() for block in theta.blocks}
    found: list[dict[str, Any]] = []
    for task in pool:
        theta.assign(start)
        found += list(along(model, theta, task, sorted(options.points), options.inner_lr, options.batches))
    print_table("progress of a tuned step that moves one role only, over one that moves all blocks alike", rows(found))
    result = {"blocks": list(theta.blocks.names), "settings": vars(options), "found": found}
    write_json(Path(options.out) / "block_progress.json", result)
    return result


def along(
    model: Any, theta: PerturbedParameters, task: PoolTask, points: Sequence[int], inner_lr: float, batches: int
) -> Iterator[dict[str, Any]]:
    """The figures at each point of a first-order trajectory, which theta follows."""
    roles, everything = by_role(theta.blocks), torch.ones(len(theta.blocks), dtype=torch.float64)
    velocity, done = zero_velocity(theta.blocks), 0
    for point in points:
        for number in range(done, point):
            closure = partial(batch_loss, model, task.batcher.at(APART + number), task.batcher.form)
            momentum_step(closure, theta, velocity, inner_lr, momentum=0.9)
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
