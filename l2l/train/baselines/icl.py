"""In-context learning: solved examples before the prompt, and no training.

Brown et al. 2020, arXiv:2005.14165; with 32 examples, the baseline of Malladi et al. 2023, arXiv:2305.17333."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from l2l.methods.base import check_counts
from l2l.models.load import context_length
from l2l.tasks.base import Example, Row, Task
from l2l.tasks.encode import special_ids, tokenize
from l2l.train.baselines.base import Baseline, Found, sampled, scored
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import RunInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"


@final
@dataclass(frozen=True)
class InContext(Baseline):
    """Solved train rows stand before each prompt, the same for all rows; what the context cannot hold is left out."""

    shots: int = 32
    """Most demonstrations: the first train rows in the order of the run's seed. Of a row that leaves room for fewer, the
    first are dropped, whole."""

    def __post_init__(self) -> None:
        check_counts(shots=self.shots)

    def measure(self, ground: RunInputs, config: FineTuneConfig) -> Found:
        initial = scored(ground, config, sampled(ground, config))
        room = context_length(ground.model, config.max_length)
        if ground.task.metric == "f1":
            room -= config.max_new_tokens
        chosen = ground.splits.train[: self.shots]
        task, fitting = with_demonstrations(ground.task, chosen, ground.tokenizer, room)
        # A demonstration must not be asked for: rows after them, as many as there are, stand for the train rows.
        rest = ground.splits.train[len(chosen) :][: config.test_size] or sampled(ground, config)
        train, dev, test = (
            scored(ground, config, rows, task) for rows in (rest, ground.splits.dev, ground.splits.test)
        )
        held = [fitting(row) for row in ground.splits.test]
        return Found(initial, train, dev, test, note=_note(held, len(chosen)), details=_details(held, len(chosen)))


def with_demonstrations(
    task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[Task, Callable[[Row], int]]:
    """The task whose prompts begin with solved rows, and how many of them stand before a row.

    Args:
        rows: to show, in this order.
        tokenizer: of the model, which counts tokens.
        room: most tokens of demonstrations, prompt and longest option together.
    """
    shown = [solved(task.example(row)) for row in rows]
    lengths = [_tokens(tokenizer, text) for text in shown]
    around = sum(map(len, special_ids(tokenizer)))

    def fitting(row: Row) -> int:
        example = task.example(row)
        left = room - around - max(_tokens(tokenizer, example.prompt + option) for option in example.options)
        count = 0
        for length in reversed(lengths):
            left -= length
            if left < 0:
                break
            count += 1
        return count

    def example(row: Row) -> Example:
        plain = task.example(row)
        count = fitting(row)
        return replace(plain, prompt="".join(shown[len(shown) - count :]) + plain.prompt)

    return replace(task, example=example), fitting


def solved(example: Example) -> str:
    """Prompt and first right option, and what stands between examples."""
    return (example.prompt + example.options[example.gold[0]]).strip() + SEPARATOR


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenize(tokenizer, [text])[0])


def _details(held: Sequence[int], asked: int) -> dict[str, float | int]:
    return {"shots": asked, "shots_mean": sum(held) / len(held), "shots_least": min(held)}


def _note(held: Sequence[int], asked: int) -> str:
    """One sentence where rows have fewer demonstrations than were asked for."""
    if min(held) == asked:
        return ""
    short, bare = sum(count < asked for count in held), sum(count == 0 for count in held)
    return (
        f"of {asked} demonstrations {sum(held) / len(held):.1f} fit before a test row on average, fewer than asked before "
        f"{short} of {len(held)} rows, none before {bare}"
    )
