"""Where a tuner's basis comes from: a few input-side directions V [n, r] of each weight matrix [m, n], seen on the pool.

``gradients``: the leading right singular directions of the tasks' mean gradients, at the initial weights and some
first-order steps further. ``activations``: the principal directions of what linear layers are fed, as in AGZO; forward passes
only. ``random``: the control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from l2l.estimators.backward import consume_gradients
from l2l.estimators.finite_difference import Closure
from l2l.meta.pool import PoolTask
from l2l.meta.trajectory import TrajectoryConfig, at_rest, momentum_step
from l2l.models.heads import TokenQuery, token_logprobs
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.tasks.losses import batch_loss
from l2l.tuners.model import random_basis

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Source: TypeAlias = Literal["gradients", "activations", "random"]
BATCHES = 8
"""Batches of every task that are looked at, at every point."""
POINTS = (0, 4, 12)
"""First-order steps of a task after which its gradients are looked at."""
ROWS = 4096
"""Rows of a matrix that are widened to float64 at a time."""


@dataclass(frozen=True)
class Losses:
    """The batches of a task: ``at(i)`` is the loss of the i-th where theta stands; the first ``looked_at`` share no example."""

    name: str
    at: Callable[[int], Closure]
    looked_at: int = BATCHES


@dataclass(frozen=True)
class Feed:
    """A forward pass."""

    run: Callable[[], object]
    tokens: Tensor | None = None
    """[R, T] bool: which of the positions fed are tokens, not padding. None: all."""


def pool_basis(
    model: PreTrainedModel,
    pool: Sequence[PoolTask],
    source: Source,
    rank: int,
    seed: int = 0,
    batches: int = BATCHES,
    points: Sequence[int] = POINTS,
    trajectory: TrajectoryConfig | None = None,
) -> dict[str, Tensor]:
    """Orthonormal columns [n, rank] float32 on the CPU, by block name. The model's weights are as before, bit for bit.

    Blocks that get one: matrices [m, n] with n > 2 * rank that are no embeddings; for ``activations``, those of nn.Linear.

    Args:
        seed: of ``random``.
        batches: of every task at every point, fewer where a task has not so many distinct ones, but at least two.
        points, trajectory: for ``gradients``, see :func:`gradient_basis`.

    Raises:
        ValueError: no block can have such a basis.
        FloatingPointError: a loss or a gradient is not finite.
    """
    blocks = Blocks.of(model)
    indices = candidates(blocks, rank)
    if source == "random":
        return random_basis(blocks, {blocks[i].name: rank for i in indices}, seed)
    if source == "activations":
        owned = owners(model, blocks, indices)
        return activation_basis(blocks, owned, [_feeds(model, task, batches) for task in pool], rank)
    losses = [_losses(model, task, batches) for task in pool]
    return gradient_basis(PerturbedParameters(blocks), losses, rank, points, trajectory or TrajectoryConfig())


def candidates(blocks: Blocks, rank: int) -> list[int]:
    """Indices of the matrices [m, n] with n > 2 * rank that are no embeddings.

    Raises:
        ValueError: there are none.
    """
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
    trajectory: TrajectoryConfig | None = None,
) -> dict[str, Tensor]:
    """Leading right singular directions of the tasks' mean gradients, every task and every point having one vote.

    Memory beside the model: a copy and a velocity, where a point is not 0; one gradient; two [n, n] float64 per block.

    Args:
        points: first-order steps on a task, from the weights as they stand, after which its gradients are looked at.
        trajectory: how the model moves between the points.

    Raises:
        ValueError: no point, or one before the start; or no block can have such a basis.
        FloatingPointError: a loss or a gradient is not finite. The weights are back.
    """
    if not points or min(points) < 0:
        raise ValueError(f"points={list(points)} must name numbers of steps, at least 0")
    trajectory, indices = trajectory or TrajectoryConfig(), candidates(theta.blocks, rank)
    total = _squares(theta.blocks, indices)
    for task in tasks:
        with _visited(theta, task, moving=max(points) > 0):
            for _ in _inner_step(theta, task, sorted(set(points)), trajectory):
                closures = [task.at(i) for i in range(task.looked_at)]
                _accumulate(total, mean_gradient_grams(theta.blocks, closures, indices))
    return _columns(theta.blocks, total, rank)


def _inner_step(
    theta: PerturbedParameters, task: Losses, points: Sequence[int], trajectory: TrajectoryConfig
) -> Iterator[int]:
    """Stand at every point in turn, having stepped on batches behind those that are looked at."""
    velocity = at_rest(theta.blocks) if points[-1] else {}
    for step in range(points[-1] + 1):
        if step in points:
            yield step
        if step < points[-1]:
            momentum_step(task.at(task.looked_at + step), theta, velocity, trajectory.lr_at(step), trajectory)


@contextmanager
def _visited(theta: PerturbedParameters, task: Losses, moving: bool) -> Iterator[None]:
    """On the way out the weights are back; an error names the task."""
    kept = {block.name: block.tensor.detach().clone() for block in theta.blocks} if moving else {}
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"task {task.name!r}, gradients for the basis: {error}; or lower inner_lr") from error
    finally:
        if moving:
            theta.assign(kept)


def mean_gradient_grams(blocks: Blocks, closures: Sequence[Closure], indices: Sequence[int]) -> dict[int, Tensor]:
    """G^T G [n, n] float64 of each block's mean gradient G over independent batches, in units of its own trace.

    Of k batch gradients g_i with the sum S, (S^T S - sum g_i^T g_i) / (k (k - 1)) is the mean of g_i^T g_j over i != j: what
    differs between batches has no part in it, up to chance. Its trace may be near 0, or below, where chance is all
    there is; then the unit is what chance leaves in the mean, sum |g_i|^2 / k^2. A block without a gradient is left out.
    """
    k, grams = len(closures), _squares(blocks, indices)
    sums = {i: torch.zeros_like(blocks[i].tensor.detach()) for i in indices}

    def take(index: int, gradient: Tensor) -> None:
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
    blocks: Blocks, owned: Sequence[tuple[int, nn.Module]], tasks: Sequence[Sequence[Feed]], rank: int
) -> dict[str, Tensor]:
    """Principal directions of the second moment of the layers' inputs, every task having one vote.

    AGZO perturbs along those of the batch at hand; here they are those of the pool, and stay.
    """
    indices = sorted({index for index, _ in owned})
    total = _squares(blocks, indices)
    for feeds in tasks:
        moments = _squares(blocks, indices)
        for feed in feeds:
            with _watching(owned, moments, feed.tokens), torch.no_grad():
                feed.run()
        sizes = {i: moment.trace().item() for i, moment in moments.items()}
        _accumulate(total, {i: moment / sizes[i] for i, moment in moments.items() if sizes[i] != 0})
    return _columns(blocks, total, rank)


def owners(model: nn.Module, blocks: Blocks, indices: Sequence[int]) -> list[tuple[int, nn.Module]]:
    """(block, layer) for the layers that multiply their inputs with the rows of these blocks: nn.Linear.

    A layer that keeps its weight the other way round, [inputs, outputs], is fed along the rows, where no basis is.

    Raises:
        ValueError: there are none.
    """
    place = {id(blocks[i].tensor): i for i in indices}
    weights = [(module, id(module.weight)) for module in model.modules() if isinstance(module, nn.Linear)]
    found: list[tuple[int, nn.Module]] = [(place[weight], module) for module, weight in weights if weight in place]
    if not found:
        raise ValueError("basis='activations': no weight matrix belongs to an nn.Linear: use 'gradients'")
    return found


@contextmanager
def _watching(
    owned: Sequence[tuple[int, nn.Module]], moments: Mapping[int, Tensor], tokens: Tensor | None
) -> Iterator[None]:
    """Take each layer's inputs into its moment as it has run: a hook before it would see positions that others drop."""

    def take(index: int, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        rows = args[0] if args else named["input"]
        padded = tokens is not None and rows.shape[:-1] == tokens.shape
        add_gram(moments[index], rows[tokens] if padded else rows.reshape(-1, rows.shape[-1]), 1.0)

    def hook(index: int) -> Callable[..., None]:
        return lambda module, args, named, output: take(index, args, named)

    handles = [module.register_forward_hook(hook(index), with_kwargs=True) for index, module in owned]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_gram(into: Tensor, rows: Tensor, scale: float) -> None:
    """Add scale * rows^T rows to ``into`` [n, n] float64."""
    with torch.no_grad():
        for some in rows.split(ROWS):
            wide = some.double()
            into.addmm_(wide.t(), wide, alpha=scale)


def leading(gram: Tensor, rank: int) -> Tensor:
    """[n, rank] float32: eigenvectors of the largest eigenvalues of a symmetric matrix, the largest first."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).float().contiguous()


def _squares(blocks: Blocks, indices: Sequence[int]) -> dict[int, Tensor]:
    """Zeros [n, n] for each."""
    widths = {i: blocks[i].tensor.shape[1] for i in indices}
    return {i: torch.zeros(n, n, dtype=torch.float64, device=blocks[i].tensor.device) for i, n in widths.items()}


def _accumulate(total: Mapping[int, Tensor], found: Mapping[int, Tensor]) -> None:
    for index, gram in found.items():
        total[index].add_(gram)


def _columns(blocks: Blocks, total: Mapping[int, Tensor], rank: int) -> dict[str, Tensor]:
    """Of blocks of which nothing was seen, none."""
    for index, gram in total.items():
        if not bool(torch.isfinite(gram).all()):
            raise FloatingPointError(f"what the basis of block {blocks[index].name!r} is made from is not finite")
    return {blocks[i].name: leading(gram, rank).cpu() for i, gram in total.items() if bool(gram.any())}


def _losses(model: PreTrainedModel, task: PoolTask, batches: int) -> Losses:
    def at(number: int) -> Closure:
        batch = task.feeder.at(number)
        return lambda: batch_loss(model, batch, task.feeder.form)

    return Losses(task.task.name, at, _distinct(task, batches))


def _feeds(model: PreTrainedModel, task: PoolTask, batches: int) -> list[Feed]:
    def feed(part: TokenQuery) -> Feed:
        mask = part.attention_mask
        return Feed(
            lambda: token_logprobs(model, part), (mask if mask.ndim == 2 else mask.diagonal(dim1=1, dim2=2)) > 0
        )

    chosen = [task.feeder.at(number) for number in range(_distinct(task, batches))]
    return [feed(part) for batch in chosen for part in batch.parts or (batch,)]


def _distinct(task: PoolTask, batches: int) -> int:
    """Batches without a common example: as many as wanted, or as there are; two at least, or noise is all there is."""
    return max(2, min(batches, len(task.feeder.examples) // task.feeder.batch_size))
