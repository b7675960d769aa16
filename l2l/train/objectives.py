"""Objectives other than the task's loss: accuracy of scored options, scores of generated answers, or any callable.

None of them needs a gradient, because a zeroth-order method only evaluates the objective: the reported metric itself can be
minimised. Malladi et al. 2023, arXiv:2305.17333, Section 3.3, trains on accuracy and F1 in this way."""

import inspect
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from l2l.models.batching import Grouping
from l2l.models.load import context_length
from l2l.plugins import load_module
from l2l.tasks import Row, Task, answer_scores
from l2l.tasks.evaluate import evaluate, generate_answers
from l2l.tasks.metrics import exact_matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Objective: TypeAlias = Callable[[Any, Any, Sequence[Row]], float]
"""``objective(model, tokenizer, rows)``: a finite float to minimise, of the model's current weights on the rows of a batch.
It is called once per evaluation and must return the same number for the same weights."""

LOSS = "loss"
OPTIONS = ("accuracy",)
ANSWERS = ("f1", "exact_match")
AT_ONCE = 32
"""Rows per forward pass where no ``micro_batch`` is given."""


def check_objective(name: str, micro_batch: int | None, batch_size: int) -> None:
    """Raise ValueError where an objective's name or a micro-batch can be seen to be wrong before anything is loaded."""
    if name not in (LOSS, *OPTIONS, *ANSWERS) and ":" not in name:
        known = ", ".join((LOSS, *OPTIONS, *ANSWERS))
        raise ValueError(f"objective is {name!r}; use one of {known}, or a callable as package.module:function")
    if micro_batch is None:
        return
    if not isinstance(micro_batch, int) or isinstance(micro_batch, bool) or not 1 <= micro_batch <= batch_size:
        raise ValueError(f"micro_batch={micro_batch} must be a whole number from 1 to batch_size, which is {batch_size}")
    if ":" in name:
        raise ValueError(f"micro_batch is set, but {name!r} gets all rows of a batch and feeds them itself: leave it out")


def find_objective(
    name: str,
    task: Task,
    example_row: Row,
    max_length: int | None = None,
    max_new_tokens: int = 50,
    micro_batch: int | None = None,
    grouping: Grouping | None = None,
) -> Objective | None:
    """The objective of that name; None for ``loss``, which closures compute by themselves.

    Args:
        name: see :class:`l2l.train.config.FineTuneConfig`. The built-in scores are negated means: less is better.
        example_row: a row of the task, which shows whether there are answers to compare with.
        max_length: most tokens per row; None: the model's context, at most 2048.
        micro_batch: rows per forward pass; None: 32.
        grouping: how options may share rows; see :func:`l2l.tasks.evaluate.evaluate`.

    Raises:
        ValueError: no such objective, or one that the task has no answers or options for.
    """
    if name == LOSS:
        return None
    if ":" in name:
        return imported(name)
    generated, size = bool(task.example(example_row).answers), micro_batch or AT_ONCE
    if name in ANSWERS and not generated:
        raise ValueError(
            f"objective {name!r} compares generated answers, and task {task.name!r} has options: use accuracy or loss"
        )
    if name in OPTIONS:
        if generated or task.generates:
            raise ValueError(
                f"objective {name!r} compares options, and task {task.name!r} generates answers: use f1, exact_match or loss"
            )
        return lambda model, tokenizer, rows: -evaluate(model, tokenizer, task, rows, size, max_length, grouping=grouping).value

    def answers(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> float:
        examples = [task.example(row) for row in rows]
        limit, references = context_length(model, max_length), [example.answers for example in examples]
        texts = generate_answers(model, tokenizer, task, examples, limit, max_new_tokens, size)
        if task.scoring is not None and name == task.metric:
            return -fmean(exact_matches(texts, references, task.scoring))
        return -answer_scores(texts, references)[ANSWERS.index(name)]

    return answers


def imported(path: str) -> Objective:
    """The callable that ``package.module:function`` or ``file.py:function`` names.

    Raises:
        ValueError: there is no such module, file or function, or it does not take (model, tokenizer, rows).
    """
    module, _, name = path.rpartition(":")
    found = getattr(load_module(module, f"objective {path!r}"), name, None)
    if not callable(found):
        raise ValueError(f"objective {path!r}: module {module!r} has no function {name!r}")
    try:
        inspect.signature(found).bind(None, None, None)
    except TypeError as error:
        raise ValueError(f"objective {path!r} must take (model, tokenizer, rows): {error}") from error
    return cast(Objective, found)
