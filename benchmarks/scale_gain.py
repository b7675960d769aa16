"""What a scale of the perturbation could gain over MeZO, if it were learned from other tasks: gradient against curvature.

python benchmarks/scale_gain.py --model DIR --data_dir DIR --tasks sst5 ag_news snli wic --points 0 12 48

A step along u ~ N(0, S) with its size tuned gains by x(S) = g'Sg / tr(SF): g the full gradient, F the Gauss-Newton matrix. So
the gain of a scale S over MeZO is x(S) / x(1): the share of the gradient's energy that it keeps over that of curvature. Both
are measured at points of a first-order trajectory of each task: g'Sg without bias, from the gradients of two disjoint halves
of batches, tr(SF) from losses under labels that are drawn from the model. Scales are learned from the other tasks at the same
point (per block, row and column, element; masks), and bases of the inputs of every matrix from their gradients before the first
step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from l2l.estimators import consume_gradients
from l2l.meta.config import MetaTrainConfig
from l2l.meta.curvature import sampled_loss
from l2l.meta.pool import PoolTask, load_pool
from l2l.models.load import context_length, load_model, load_tokenizer
from l2l.noise import Key
from l2l.params import Blocks
from l2l.report.console import print_table
from l2l.report.run_directory import write_json
from l2l.tasks.losses import batch_loss

APART = 10**5
"""Batches of the trajectory are counted from here, so that no measured batch is one of them."""
RANK = 8
"""Columns of a basis."""
FLOOR = 1e-3
"""Least share of gradient in curvature of a part, over that of the whole, so that noise below 0 is no negative scale."""
Parts: TypeAlias = tuple[Tensor, Tensor]
"""(an unbiased estimate of the squared gradient, the curvature), elementwise, of one block."""


# Scales of one block from what other tasks say of it: pure functions of (squared gradient, curvature), both [m, n].


def ratio(gradient: Tensor, curvature: Tensor, least: float) -> Tensor:
    """Gradient over curvature, at least ``least``; that where there is no curvature."""
    return torch.where(curvature > 0, gradient / curvature.clamp(min=1e-45), least).clamp(min=least)


def per_block(power: float, gradient: Tensor, curvature: Tensor, least: float) -> Tensor:
    """(G / F)^power of the whole block."""
    return ratio(gradient.sum(), curvature.sum(), least).pow(power).expand_as(gradient)


def energy(gradient: Tensor, curvature: Tensor, least: float) -> Tensor:
    """G / d: the mean squared gradient of the block."""
    return gradient.sum().clamp(min=least * curvature.sum()).div(gradient.numel()).expand_as(gradient)


def row_by_column(gradient: Tensor, curvature: Tensor, least: float) -> Tensor:
    """The square root of G / F of the row, times that of the column."""
    if gradient.ndim < 2:
        return per_block(1.0, gradient, curvature, least)
    rows = ratio(gradient.sum(1, keepdim=True), curvature.sum(1, keepdim=True), least)
    return (rows * ratio(gradient.sum(0), curvature.sum(0), least)).sqrt()


def inverse_curvature(gradient: Tensor, curvature: Tensor, least: float) -> Tensor:
    """1 / sqrt(F) of the element, F at least a hundredth of the block's mean."""
    return (curvature + 0.01 * curvature.mean() + 1e-45).rsqrt()


def mask(share: float, by_ratio: bool, gradient: Tensor, curvature: Tensor, least: float) -> Tensor:
    """1 for a share of the block's elements: those of the largest squared gradient, or of the largest over curvature."""
    score = gradient / (curvature + 0.01 * curvature.mean() + 1e-45) if by_ratio else gradient
    kept = max(1, round(share * score.numel()))
    return (score >= score.flatten().kthvalue(score.numel() - kept + 1).values).float()


SCALES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "block, G/F": partial(per_block, 1.0),
    "block, (G/F)^2": partial(per_block, 2.0),
    "block, G/d": energy,
    "row x column, (G/F)^.5": row_by_column,
    "element, 1/F^.5": inverse_curvature,
    **{f"mask, top {share:.1%} by g^2": partial(mask, share, False) for share in (0.001, 0.01, 0.1)},
    **{f"mask, top {share:.1%} by g^2/F": partial(mask, share, True) for share in (0.001, 0.01, 0.1)},
}
ORACLE = "own task: block, G/F"


def gains(own: Mapping[str, Parts], others: Mapping[str, Parts]) -> dict[str, float]:
    """Scale -> x(S) / x(1) on a task, S learned from the other tasks' sums; and that of a table which has seen the task."""
    whole, seen = shares(own), shares(others)
    least = FLOOR * max(seen, 0.0) or FLOOR
    found = {}
    for name, scale in SCALES.items():
        found[name] = shares({block: times(own[block], scale(*others[block], least)) for block in own}) / whole
    oracle = {block: times(parts, per_block(1.0, *parts, FLOOR * max(whole, 0.0) or FLOOR)) for block, parts in own.items()}
    return found | {ORACLE: shares(oracle) / whole}


def times(parts: Parts, scale: Tensor) -> Parts:
    """Both, weighted."""
    return scale * parts[0], scale * parts[1]


def shares(blocks: Mapping[str, Parts]) -> float:
    """x: all of the squared gradient over all of the curvature."""
    gradient, curvature = (sum(parts[i].sum(dtype=torch.float64).item() for parts in blocks.values()) for i in (0, 1))
    return gradient / curvature


# Measuring.


def collect(model: Any, blocks: Blocks, task: PoolTask, batches: int, bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by ``figure/block``, in bfloat16: ``first`` and ``second``, mean gradients of two halves of the batches; and
    ``curvature``, the diagonal of F. Of a block with a basis [n, r] of its inputs also ``inside``, the trace of F within it.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        found[name] = found[name].add_(value) if name in found else value.clone()

    for number in range(2 * batches):
        batch = task.batcher.at(number)
        half = ("first", "second")[number % 2]
        consume_gradients(
            partial(batch_loss, model, batch, task.batcher.form),
            blocks,
            lambda i, gradient, half=half: add(f"{half}/{blocks.names[i]}", gradient / batches),
        )
        drawn = sampled_loss(model, batch, task.batcher.form, Key(0, number))

        def squares(index: int, gradient: Tensor, weight: float = drawn.count / (2 * batches)) -> None:
            name = blocks.names[index]
            add(f"curvature/{name}", weight * gradient**2)
            if name in bases:
                add(f"inside/{name}", weight * (gradient @ bases[name]).square().sum()[None])

        consume_gradients(drawn.closure, blocks, squares)
    return {name: value if name.startswith("inside") else value.bfloat16() for name, value in found.items()}


def learned_bases(files: Sequence[Path], blocks: Blocks) -> dict[str, Tensor]:
    """For every matrix, the leading RANK directions [n, r] of its inputs in the mean gradients of these files."""
    found = {}
    for block in blocks:
        if block.tensor.ndim == 2 and min(block.tensor.shape) > RANK:
            gradients = [read(file, f"{half}/{block.name}") for file in files for half in ("first", "second")]
            gram = sum(one.T @ one / one.square().sum().clamp(min=1e-45) for one in gradients)
            found[block.name] = torch.linalg.eigh(gram).eigenvectors[:, -RANK:]
    return found


def read(file: Path, name: str) -> Tensor:
    """A tensor of a file, in fp32."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name).float()


def parts_of(files: Sequence[Path], blocks: Blocks) -> dict[str, Parts]:
    """Block -> its parts, summed over files, each over its total so that every task counts alike."""
    found: dict[str, Parts] = {}
    totals = [sum(read(file, f"curvature/{block.name}").sum(dtype=torch.float64).item() for block in blocks) for file in files]
    for block in blocks:
        squared = [read(file, f"first/{block.name}") * read(file, f"second/{block.name}") for file in files]
        curved = [read(file, f"curvature/{block.name}") for file in files]
        found[block.name] = (
            sum(one / total for one, total in zip(squared, totals, strict=True)),
            sum(one / total for one, total in zip(curved, totals, strict=True)),
        )
    return found


def basis_figures(file: Path, blocks: Blocks, bases: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of the gradient's energy and of the curvature of the matrices with a basis that lies within it."""
    inside, whole, curved, trace = 0.0, 0.0, 0.0, 0.0
    for block in blocks:
        if block.name in bases:
            first, second = (read(file, f"{half}/{block.name}") for half in ("first", "second"))
            inside += ((first @ bases[block.name]) * (second @ bases[block.name])).sum(dtype=torch.float64).item()
            whole += (first * second).sum(dtype=torch.float64).item()
            curved += read(file, f"inside/{block.name}").item()
            trace += read(file, f"curvature/{block.name}").sum(dtype=torch.float64).item()
    return {"basis: of G": inside / whole, "basis: of F": curved / trace, "basis: gain": inside / whole / (curved / trace)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what is missing, print, write; gives what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="l2l/tiny")
    parser.add_argument("--data_dir")
    parser.add_argument("--tasks", nargs="+", required=True, help="of a pool, never held-out ones")
    parser.add_argument("--points", nargs="+", type=int, default=[0, 12, 48], help="first-order steps before measuring")
    parser.add_argument("--lr", type=float, default=1e-5, help="of AdamW, by which the trajectory is made")
    parser.add_argument("--batches", type=int, default=6, help="of each half")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--out", default="runs/scale-gain")
    given = parser.parse_args(argv)
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    model.eval()
    shared = {name: getattr(given, name) for name in ("model", "tasks", "data_dir", "batch_size", "max_length")}
    limit = context_length(model, given.max_length)
    pool = load_pool(given.tasks, MetaTrainConfig(**shared), model, tokenizer, limit)
    blocks, out = Blocks.of(model), Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    start = [block.tensor.detach().clone() for block in blocks]

    def file(task: PoolTask, point: int) -> Path:
        return out / f"{task.task.name}-{point}.safetensors"

    def along(task: PoolTask, points: Sequence[int], bases: Mapping[str, Tensor]) -> None:
        """Follow the trajectory, and measure at points that have no file."""
        if all(file(task, point).is_file() for point in points):
            return
        for block, first in zip(blocks, start, strict=True):
            block.tensor.data.copy_(first)
        optimizer, done = torch.optim.AdamW([block.tensor for block in blocks], given.lr, weight_decay=0.0), 0
        for point in points:
            for number in range(done, point):
                optimizer.zero_grad()
                batch_loss(model, task.batcher.at(APART + number), task.batcher.form).backward()
                optimizer.step()
            optimizer.zero_grad()
            done = point
            if not file(task, point).is_file():
                save_file(collect(model, blocks, task, given.batches, bases), file(task, point))
                print(f"{task.task.name} {point}: measured", flush=True)

    first, later = min(given.points), sorted(given.points)[1:]
    for task in pool:
        along(task, [first], {})
    rows, learned = [], {}
    for task in pool:
        learned[task.task.name] = learned_bases([file(other, first) for other in pool if other is not task], blocks)
        along(task, later, learned[task.task.name])
    for task in pool:
        bases = learned[task.task.name]
        for point in given.points:
            others = parts_of([file(other, point) for other in pool if other is not task], blocks)
            own = parts_of([file(task, point)], blocks)
            row = {"task": task.task.name, "point": point, "x": shares(own), **gains(own, others)}
            rows.append(row | (basis_figures(file(task, point), blocks, bases) if point in later else {}))
    write_json(out / "scale_gain.json", {"settings": vars(given), "rows": rows})
    for point in given.points:
        at = [row for row in rows if row["point"] == point]
        named = [name for name in at[0] if name not in ("task", "point")]
        table = [{"figure": name} | {row["task"]: row[name] for row in at} for name in named]
        print_table(f"x = G / tr F, and the gain of a scale over MeZO, after {point} first-order steps", table)
    return {"rows": rows}


if __name__ == "__main__":
    main()
