"""What is measured: each a context in which a step can be done again and again, and which leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from l2l.bench.config import BenchConfig
from l2l.bench.textbook import textbook_step
from l2l.estimators.base import Closure, finite_loss
from l2l.finetune.optimizer import ZOOptimizer
from l2l.methods.base import Method
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.tuners.tuner import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step: TypeAlias = Callable[[], float]
"""Does one step (or two forwards) and gives its loss."""

Contender: TypeAlias = Callable[[], AbstractContextManager[Step]]

FORWARDS, STEP, PLAIN, LEARNED, TEXTBOOK = "two_forwards", "step", "plain_step", "learned_step", "textbook_step"
"""Names of the contenders in every result."""

IGNORED = -100
"""Target of a position that predicts nothing: torch's cross entropy leaves it out."""


def tokens(config: BenchConfig, vocabulary: int) -> Tensor:
    """Random token ids [batch_size, length]."""
    draw = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(vocabulary, (config.batch_size, config.length), generator=draw)
    return ids.to(config.torch_device)


def causal_loss(model: PreTrainedModel, ids: Tensor, answer_tokens: int | None) -> Closure:
    """Mean float32 cross entropy of the next token; over all of them, or the last ``answer_tokens`` of each row."""
    targets = functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    kept = {} if answer_tokens is None else {"logits_to_keep": answer_tokens + 1}
    targets = targets[:, -(answer_tokens + 1) :] if answer_tokens is not None else targets

    def loss() -> Tensor:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, **kept).logits
            return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    return loss


def contenders(model: PreTrainedModel, closure: Closure, config: BenchConfig) -> dict[str, Contender]:
    """Name -> contender, in the order they take turns in. Every turn has an optimizer and directions of its own."""
    seeds = count(config.seed)

    def fresh(method: Method[Any]) -> ZOOptimizer:
        return ZOOptimizer(model, method, seed=next(seeds), update=config.update)

    found: dict[str, Contender] = {
        FORWARDS: lambda: _forwards(closure),
        STEP: lambda: _managed(fresh(MeZO()), closure),
    }
    if config.learned:
        tuner = Tuner.for_model(model, seed=config.seed)
        found[LEARNED] = lambda: _managed(fresh(Learned(tuner)), closure)
    found[PLAIN] = lambda: _plain(fresh(MeZO()), closure)
    if config.textbook:
        found[TEXTBOOK] = lambda: _textbook(model, closure, next(seeds))
    return found


@contextmanager
def _forwards(closure: Closure) -> Iterator[Step]:
    yield lambda: (finite_loss(closure) + finite_loss(closure)) / 2


@contextmanager
def _managed(optimizer: ZOOptimizer, closure: Closure) -> Iterator[Step]:
    with optimizer.theta.fused_steps():
        yield lambda: optimizer.step(closure)


@contextmanager
def _plain(optimizer: ZOOptimizer, closure: Closure) -> Iterator[Step]:
    yield lambda: optimizer.step(closure)


@contextmanager
def _textbook(model: PreTrainedModel, closure: Closure, seed: int) -> Iterator[Step]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seeds = count(seed)
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        yield lambda: textbook_step(parameters, closure, next(seeds))
