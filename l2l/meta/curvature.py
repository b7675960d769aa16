"""Traces of the Hessian's blocks, per component of the direction: three estimates, and their mean over a task pool.

Under labels that the model draws itself, per-example gradients have mean zero and are independent, so n * ||gradient of the
mean loss of n examples||^2 is an unbiased estimate of the trace of the mean loss's Gauss-Newton matrix, from one backward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch

from l2l.estimators import consume_gradients
from l2l.meta.pool import PoolTask
from l2l.meta.state import MetaState, SampledLoss
from l2l.meta.statistics import Components, NoiseDots, squared_norms
from l2l.models.heads import token_logprobs
from l2l.noise import Key, standard_noise
from l2l.params import Blocks, Direction
from l2l.tasks.encode import Batch, Form
from l2l.tasks.losses import classification_loss, lm_loss, predictions, relative_scores
from l2l.tuners.model import bind

Trace: TypeAlias = Literal["fisher", "hutchinson", "seen"]
"""``fisher``: squared gradient norms under labels drawn from the model: the Gauss-Newton matrix, never negative.
``hutchinson``: curvature along Rademacher noise of all blocks: the Hessian itself. ``seen``: curvature along the direction of
the zeroth-order step, so that the very direction is measured that theta moves along."""

PROBES = 2**20
"""Draw number at which the keys of Rademacher probes begin: beyond the directions of any method's step."""
BATCHES = 8
"""Batches of every task that the curvature of the normalizer is averaged over."""
FLOOR = 1e-6
"""Least trace of a block, as a share of the mean over the blocks. A block that the loss does not reach has none, up to
rounding, and could otherwise be given a sigma without bounds."""


def hessian_traces(
    point: MetaState, components: Components, direction: Direction, trace: Trace, probes: int
) -> tuple[torch.Tensor, int]:
    """[components] float64 estimates of trace(P_k H), averaged over the probes, and the forward passes they took.

    ``direction`` is that of the zeroth-order step at theta. ``probes`` are draws of labels, Rademacher directions, or
    (``seen``) batches, A being the first. ValueError where labels are to be drawn and the state offers no way to.
    """
    found, passes = components.zeros(), 0
    for probe in range(probes):
        if trace == "fisher":
            if point.sampled is None:
                raise ValueError(
                    "trace='fisher' draws labels from the model, which this task offers no way to: use 'hutchinson'"
                )
            sampled = point.sampled(probe)
            one, cost = sampled.count * squared_norms(point.theta.blocks, components, sampled.closure), sampled.passes
        elif trace == "hutchinson":
            rademacher = Direction(point.key.with_draw(PROBES + probe), (1.0,) * len(point.theta.blocks), "rademacher")
            one, cost = _curvature_along(point, components, rademacher, 0), 6
        else:
            # u = factor * (sigma_b z_b + ...), so <z_b, (H u)_b> has the mean factor * sigma_b * trace(H_b).
            scale = direction.factor * torch.tensor([direction.sigma[i] for i, _ in components.parts], dtype=torch.float64)
            bend = _curvature_along(point, components, direction, probe)
            one, cost = torch.where(scale > 0, bend / scale, torch.zeros_like(bend)), 6
        found, passes = found + one / probes, passes + cost
    return found, passes


def _curvature_along(point: MetaState, components: Components, direction: Direction, number: int) -> torch.Tensor:
    """<z_b, (H u)_b> under every component [components], from gradients at both sides of theta along u, for batch A or the
    further batch ``number - 1``. Two forward and backward passes."""
    closure = point.closure if number == 0 else point.further(number - 1)
    found, epsilon, blocks, kind = components.zeros(), point.method.epsilon, point.theta.blocks, direction.distribution
    with point.theta.step():
        for side in (1.0, -1.0):
            dense = NoiseDots(blocks, replace(direction, basis=None, basis_sigma=()))
            products = components.zeros()

            def take(index: int, gradient: torch.Tensor, dense: NoiseDots = dense, products: torch.Tensor = products) -> None:
                dense.take(index, gradient)
                if index in components.bases:
                    name, shape = blocks[index].name, gradient.shape
                    z = standard_noise(name, direction.key, shape, kind, gradient.dtype, gradient.device)
                    products[components.inside[index]] += components.basis_product(index, z, gradient)

            point.theta.perturb(direction, side * epsilon)
            consume_gradients(closure, blocks, take)
            products[: len(blocks)] = dense.values()
            found += side * products / (2 * epsilon)
    return found


def sampled_loss(model: Any, batch: Batch, form: Form, key: Key) -> SampledLoss:
    """The loss of a batch under labels drawn from the model at its current parameters.

    For classification the option is drawn from the softmax of the options' scores. For ``lm`` each gold token is drawn
    given the true ones before it, which takes one more forward pass, with logits at all positions.
    """

    def perturbed(scores: torch.Tensor) -> torch.Tensor:
        """The scores plus Gumbel noise, the largest of which is a draw from their softmax."""
        draw = torch.Generator().manual_seed(key.words("drawn labels")[0])
        uniform = torch.rand(scores.shape, generator=draw, dtype=torch.float64).clamp_(1e-300, 1 - 1e-16)
        return scores.double() - torch.log(-torch.log(uniform)).to(scores.device)

    def option_loss() -> torch.Tensor:
        scores = relative_scores(model, batch)
        return classification_loss(scores, replace(batch, gold=predictions(perturbed(scores.detach()), batch)))

    def token_loss() -> torch.Tensor:
        with torch.no_grad():
            rows = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            targets = perturbed(rows[batch.rows, batch.positions][batch.places]).argmax(-1)
        parts = tuple(replace(part, targets=targets[part.tokens]) for part in batch.parts)
        sampled = replace(batch, targets=targets, parts=parts)
        return lm_loss(token_logprobs(model, sampled, parts), sampled)

    if form != "lm":
        return SampledLoss(option_loss, batch.n, 3)
    gold = batch.option_slot == batch.gold[batch.option_example]
    return SampledLoss(token_loss, int(gold[batch.options].sum()), 4)


def pool_traces(
    model: torch.nn.Module,
    pool: Sequence[PoolTask],
    seed: int,
    batches: int = BATCHES,
    basis: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Traces of the Gauss-Newton matrix by block, and (n / r) E|g V|^2 by block with a basis: what the curvature normalizer
    holds. Means over the tasks' first batches; one forward and backward pass per batch."""
    blocks = Blocks.of(model)
    bound = bind(basis or {}, blocks)
    components = Components(blocks, bound.vectors if bound else None)
    total = components.zeros()
    for index, task in enumerate(pool):
        for number in range(batches):
            sampled = sampled_loss(model, task.batcher.at(number), task.batcher.form, Key(seed, number, index))
            total += sampled.count * squared_norms(blocks, components, sampled.closure)
    found = floored(total / (batches * len(pool)), len(blocks)).tolist()
    dense, inside = found[: len(blocks)], found[len(blocks) :]
    return dict(zip(blocks.names, dense, strict=True)), {
        blocks.names[i]: trace for i, trace in zip(components.bases, inside, strict=True)
    }


def floored(traces: torch.Tensor, blocks: int) -> torch.Tensor:
    """[components] traces, each at least ``FLOOR`` of the mean over the first ``blocks``. NaN stays."""
    return traces.clamp(min=FLOOR * traces[:blocks].mean().item())
