"""A tuner's basis: a few input-side directions V [n, r] of each weight matrix [m, n], computed on the task pool.

``gradients``: the leading right singular directions of the tasks' mean gradients, at the initial weights and some
first-order steps further. ``activations``: the principal directions of the inputs of linear layers, as in AGZO; forward passes
only. ``random``: the control.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from l2l.estimators import Closure, consume_gradients
from l2l.meta.config import MetaTrainConfig
from l2l.meta.pool import PoolTask
from l2l.meta.trajectory import momentum_step, zero_velocity
from l2l.models.heads import Part, token_logprobs
from l2l.params import Blocks, PerturbedParameters
from l2l.tasks.encode import Batch
from l2l.tuners.model import random_basis

Source: TypeAlias = Literal["gradients", "activations", "random"]
BATCHES = 8
"""Batches of every task that are measured at every point."""
POINTS = (0, 4, 12)
"""First-order steps of a task after which its gradients are measured."""
ROWS = 4096
"""Rows of a matrix that are widened to float64 at a time."""


ForwardPass: TypeAlias = tuple[Callable[[], object], torch.Tensor | None]
"""A forward pass whose layer inputs are measured, and [R, T] bool: which positions are tokens, not padding. None: all."""


@dataclass(frozen=True)
class Losses:
    """``at(i)`` is the loss of a task's i-th batch at the current parameters. The first ``measured`` batches share no example;
    gradients are measured on them."""

    name: str
    at: Callable[[int], Closure]
    measured: int = BATCHES


def pool_basis(
    model: torch.nn.Module,
    pool: Sequence[PoolTask],
    source: Source,
    rank: int,
    seed: int = 0,
    batches: int = BATCHES,
    points: Sequence[int] = POINTS,
    config: MetaTrainConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Orthonormal columns [n, rank] float32 on the CPU, by block name: of matrices [m, n] with n > 2 * rank that are no
    embeddings; for ``activations``, those of nn.Linear. The model's weights are as before, bit for bit.

    Args:
        seed: of ``random``.
        batches: of every task at every point; where a task has fewer without a common example, those, but at least two:
            one gives only noise.
        points, config: for ``gradients``, see :func:`gradient_basis`, as for the errors.
    """

    def chosen(task: PoolTask) -> range:
        return range(max(2, min(batches, len(task.batcher.examples) // task.batcher.batch_size)))

    def forward(part: Part | Batch) -> ForwardPass:
        mask, whole = part.attention_mask, replace(part, at_places=())  # the mask tells which inputs of a layer are tokens
        return lambda: token_logprobs(model, whole), (mask if mask.ndim == 2 else mask.diagonal(dim1=1, dim2=2)) > 0

    blocks = Blocks.of(model)
    indices = candidates(blocks, rank)
    if source == "random":
        return random_basis(blocks, {blocks[i].name: rank for i in indices}, seed)
    if source == "activations":
        layers = linear_layers(model, blocks, indices)
        fed = [[task.batcher.at(number) for number in chosen(task)] for task in pool]
        passes = [[forward(part) for batch in of_task for part in batch.parts or (batch,)] for of_task in fed]
        return activation_basis(blocks, layers, passes, rank)
    losses = [
        Losses(task.task.name, lambda i, task=task: task.loss(model, task.batcher.at(i)), len(chosen(task))) for task in pool
    ]
    return gradient_basis(PerturbedParameters(blocks), losses, rank, points, config)


def candidates(blocks: Blocks, rank: int) -> list[int]:
    """Indices of the matrices [m, n] with n > 2 * rank that are no embeddings; ValueError where there are none."""
    fit = [i for i, b in enumerate(blocks) if b.tensor.ndim == 2 and not b.embedding and b.tensor.shape[1] > 2 * rank]
    if not fit:
        raise ValueError(
            f"basis_rank={rank}: no weight matrix, embeddings aside, has more than {2 * rank} columns: take a lower rank"
        )
    return fit


def gradient_basis(
    theta: PerturbedParameters,
    tasks: Sequence[Losses],
    rank: int,
    points: Sequence[int] = POINTS,
    config: MetaTrainConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Leading right singular directions of the tasks' mean gradients, every task and every point with equal weight.

    Memory beside the model: a copy and a velocity, unless the only point is 0; one gradient; two [n, n] float64 per block.
    FloatingPointError where a loss or a gradient is not finite; the weights are back then.

    Args:
        points: first-order steps on a task, from the current weights, after which its gradients are measured.
        config: its ``inner_`` fields say how these steps are taken; None: the defaults.
    """
    if not points or min(points) < 0:
        raise ValueError(f"points={list(points)} must name numbers of steps, at least 0")
    config, indices, blocks = config or MetaTrainConfig(), candidates(theta.blocks, rank), theta.blocks
    total, last = _zero_grams(blocks, indices), max(points)
    for task in tasks:
        kept = {block.name: block.tensor.detach().clone() for block in blocks} if last else {}
        velocity = zero_velocity(blocks) if last else {}
        try:
            for step in range(last + 1):
                if step in points:
                    closures = [task.at(i) for i in range(task.measured)]
                    for index, gram in mean_gradient_grams(blocks, closures, indices).items():
                        total[index].add_(gram)
                if step < last:
                    motion = config.inner_lr_at(step), config.inner_momentum, config.inner_clip
                    momentum_step(task.at(task.measured + step), theta, velocity, *motion)
        except FloatingPointError as error:
            raise FloatingPointError(f"task {task.name!r}, gradients for the basis: {error}; or lower inner_lr") from error
        finally:
            if last:
                theta.assign(kept)
    return _leading_columns(blocks, total, rank)


def mean_gradient_grams(blocks: Blocks, closures: Sequence[Closure], indices: Sequence[int]) -> dict[int, torch.Tensor]:
    """G^T G [n, n] float64 of each block's mean gradient G over independent batches, in units of its own trace.

    Of k batch gradients g_i with the sum S, (S^T S - sum g_i^T g_i) / (k (k - 1)) is the mean of g_i^T g_j over i != j, an
    unbiased estimate without the sampling noise of single batches. Where noise is all there is, its trace is near 0 or below;
    then the unit is the noise left in the mean, sum |g_i|^2 / k^2. A block without a gradient is left out.
    """
    k, grams = len(closures), _zero_grams(blocks, indices)
    sums = {i: torch.zeros_like(blocks[i].tensor.detach()) for i in indices}

    def take(index: int, gradient: torch.Tensor) -> None:
        if index in sums:
            sums[index] += gradient
            add_gram(grams[index], gradient, -1.0)

    for closure in closures:
        consume_gradients(closure, blocks, take)
    found = {}
    for index, gram in grams.items():
        chance = -gram.trace().item() / k**2
        add_gram(gram, sums.pop(index), 1.0)
        unit = max(gram.trace().item() / (k * (k - 1)), chance)
        if unit != 0:  # nan goes on, and is named
            found[index] = gram.div_(k * (k - 1) * unit)
    return found


def activation_basis(
    blocks: Blocks, layers: Sequence[tuple[int, torch.nn.Module]], tasks: Sequence[Sequence[ForwardPass]], rank: int
) -> dict[str, torch.Tensor]:
    """Principal directions of the second moment of the layers' inputs, every task with equal weight.

    AGZO perturbs along those of each batch; here they are those of the pool, and fixed.
    """
    indices = sorted({index for index, _ in layers})
    total = _zero_grams(blocks, indices)
    for passes in tasks:
        moments = _zero_grams(blocks, indices)
        for run, tokens in passes:

            def take(index: int, _: object, args: Any, named: Any, output: object, tokens=tokens, moments=moments) -> None:
                rows = args[0] if args else named["input"]
                padded = tokens is not None and rows.shape[:-1] == tokens.shape
                add_gram(moments[index], rows[tokens] if padded else rows.reshape(-1, rows.shape[-1]), 1.0)

            # After a layer has run: before, other hooks may still drop positions.
            handles = [layer.register_forward_hook(partial(take, index), with_kwargs=True) for index, layer in layers]
            try:
                with torch.no_grad():
                    run()
            finally:
                for handle in handles:
                    handle.remove()
        for index, moment in moments.items():
            size = moment.trace().item()
            if size != 0:
                total[index].add_(moment / size)
    return _leading_columns(blocks, total, rank)


def linear_layers(model: torch.nn.Module, blocks: Blocks, indices: Sequence[int]) -> list[tuple[int, torch.nn.Module]]:
    """(block, layer) of the nn.Linear layers with these weights. A layer that keeps its weight as [inputs, outputs] has its
    inputs along the rows, where there is no basis. ValueError where there are none."""
    place = {id(blocks[i].tensor): i for i in indices}
    weights = [(module, id(module.weight)) for module in model.modules() if isinstance(module, torch.nn.Linear)]
    found: list[tuple[int, torch.nn.Module]] = [(place[weight], module) for module, weight in weights if weight in place]
    if not found:
        raise ValueError("basis='activations': no weight matrix belongs to an nn.Linear: use 'gradients'")
    return found


def add_gram(into: torch.Tensor, rows: torch.Tensor, scale: float) -> None:
    """Add scale * rows^T rows to ``into`` [n, n] float64."""
    with torch.no_grad():
        for chunk in rows.split(ROWS):
            wide = chunk.double()
            into.addmm_(wide.t(), wide, alpha=scale)


def leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """[n, rank] float32: eigenvectors of the largest eigenvalues of a symmetric matrix, the largest first."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).float().contiguous()


def _zero_grams(blocks: Blocks, indices: Sequence[int]) -> dict[int, torch.Tensor]:
    """Zeros [n, n] float64 for each of these blocks [m, n]."""
    widths = {i: blocks[i].tensor.shape[1] for i in indices}
    return {i: torch.zeros(n, n, dtype=torch.float64, device=blocks[i].tensor.device) for i, n in widths.items()}


def _leading_columns(blocks: Blocks, total: Mapping[int, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """:func:`leading` of each matrix by block name; blocks whose matrix is zero have none."""
    for index, gram in total.items():
        if not bool(torch.isfinite(gram).all()):
            raise FloatingPointError(f"the gradients or inputs of block {blocks[index].name!r} for the basis are not finite")
    return {blocks[i].name: leading(gram, rank).cpu() for i, gram in total.items() if bool(gram.any())}
