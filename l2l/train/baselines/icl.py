"""In-context learning: demonstrations before the prompt, and no training.

Brown et al. 2020, arXiv:2005.14165; with 32 examples, the baseline of Malladi et al. 2023, arXiv:2305.17333."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, final

from l2l.methods.base import check_counts
from l2l.models.load import context_length
from l2l.tasks.base import Example, Row, Task
from l2l.tasks.encode import special_ids, tokenize
from l2l.train.baselines import Baseline, BaselineScores, grouping_of
from l2l.train.inputs import RunInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"


@final
@dataclass(frozen=True)
class InContext(Baseline):
    """Train rows with their answers precede each prompt, the same for all rows, as many as the context holds."""

    shots: int = 32
    """Most demonstrations: the first train rows in the order of the run's seed. Before a row that leaves room for fewer,
    the first are dropped, whole."""

    def __post_init__(self) -> None:
        check_counts(shots=self.shots)

    def measure(self, inputs: RunInputs) -> BaselineScores:
        config, splits, grouping = inputs.config, inputs.splits, grouping_of(inputs)
        initial = inputs.score(inputs.reported_train, grouping)
        room = context_length(inputs.model, config.max_length)
        if inputs.task.generates:
            room -= inputs.task.new_tokens(config.max_new_tokens)
        chosen = splits.train[: self.shots]
        task, fitting = with_demonstrations(inputs.task, chosen, inputs.tokenizer, room)
        # A demonstration's own answer stands in the prompt, so the train figures are those of the rows after them.
        rest = splits.train[len(chosen) :][: inputs.reported] or inputs.reported_train
        train, dev, test = (inputs.score(rows, grouping, task) for rows in (rest, splits.dev, splits.test))
        counts = [fitting(row) for row in splits.test]
        asked, mean = len(chosen), fmean(counts)
        note = (
            f"of {asked} demonstrations {mean:.1f} fit before a test row on average, fewer than asked before "
            f"{sum(count < asked for count in counts)} of {len(counts)} rows, none before {counts.count(0)}"
        )
        details = {"shots": asked, "shots_mean": mean, "shots_least": min(counts)}
        return BaselineScores(initial, train, dev, test, note="" if min(counts) == asked else note, details=details)


def with_demonstrations(
    task: Task, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", room: int
) -> tuple[Task, Callable[[Row], int]]:
    """The task whose prompts begin with demonstrations, and a function that counts those that fit before a row.

    A demonstration is prompt and first right option of one of ``rows``, in their order.

    Args:
        tokenizer: of the model, which counts tokens.
        room: most tokens of demonstrations, prompt and longest option together.
    """

    def tokens(text: str) -> int:
        return len(tokenize(tokenizer, [text])[0])

    examples = [task.example(row) for row in rows]
    shown = [(plain.prompt + plain.options[plain.gold[0]]).strip() + SEPARATOR for plain in examples]
    lengths = [tokens(text) for text in shown]
    around = sum(map(len, special_ids(tokenizer)))

    def fitting(row: Row) -> int:
        example = task.example(row)
        left = room - around - max(tokens(example.prompt + option) for option in example.options)
        count = 0
        for length in reversed(lengths):
            left -= length
            if left < 0:
                break
            count += 1
        return count

    def example(row: Row) -> Example:
        plain = task.example(row)
        return replace(plain, prompt="".join(shown[len(shown) - fitting(row) :]) + plain.prompt)

    return replace(task, example=example), fitting
