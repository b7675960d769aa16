"""Write docs/tasks.md: every task with its prompt, options, row counts, metric and the zero-shot figures of models.

python benchmarks/task_table.py --data_dir DATA --models l2l/tiny MODEL_DIR --out docs/tasks.md
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from l2l.models.load import load_model, load_tokenizer
from l2l.tasks import get_task, task_names
from l2l.tasks.base import Example, GeneratedData, HubData, Row, Task, render, sample_row
from l2l.tasks.evaluate import Scores, evaluate
from l2l.tasks.metrics import format_interval
from l2l.tasks.rows import TEST_SEED, load_rows, load_splits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ABSENT = "no data here"
"""Text of a cell where the data directory lacks the task."""

USUAL = (1000, 500, 1000)
"""Train, dev and test rows of the field's usual run."""

Models = Mapping[str, "tuple[PreTrainedModel, PreTrainedTokenizerBase]"]
"""Models and their tokenizers, by the name to show."""

TEXT = """# Tasks

This file is written by `python benchmarks/task_table.py --data_dir DATA --models {models} --rows {rows} --out
docs/tasks.md`; do not edit it.

- A task is named as `sst2`; `sst2@1` requires that version, and is refused where the task has another one, because
  figures of different versions do not compare; `sst2:empty` is a variant, and `sst2@1:empty` both.
- **Kind.** `options`: the loss is the cross entropy of the options' mean log-probabilities. `options, LM loss`: it is
  that of the right option's tokens. Both choose the option of the highest mean log-probability. `generation`: greedy,
  one line, at most 50 tokens; the loss is that of the first reference answer.
- **Rows** are those of the data directory these figures were made with, which holds samples of some data sets. `a run
  gets` counts the rows of a run that asks for {usual}; test rows come from the validation split and are the same for
  every seed, dev rows are split off the train rows. `{absent}`: the directory lacks the task, and the hub has it.
- **Figures** are zero-shot, on at most {rows} test rows, prompts cut on the left to the model's context. In square
  brackets stands the 95 % bootstrap interval over rows, in round ones the benchmark's own metrics where they differ:
  MultiRC's F1 over answers (`f1a`) and exact match over questions, of which a sample of rows may hold only some
  answers; exact match beside F1 for SQuAD; ReCoRD's F1 and exact match of the entity; DROP's F1 and exact match, which
  compare numbers by value. `commonest option` is the accuracy of always choosing the option that is right most often
  in the same rows.
- **Prompts** show a field of the row as its name in braces, a line break as ⏎ and the space before an option as ␣.
  Tasks that the package generates (`world_…`) show their first row.
- **Variants** are other prompts of the same rows and answers. `empty` is the input without cue words, to ablate the
  prompt; of `copa`, the alternatives then are sentences of their own. Tasks with `-` there have none.
- **The context-less prompt** is the prompt without the passage, sentence or premise. `evaluate(...,
  calibrate=True)` chooses the option whose log-probability rises most over that after the context-less prompt
  (Holtzman et al., 2021). Tasks with `-` there cannot be calibrated.

"""


@dataclass(frozen=True)
class Sizes:
    """How many rows a task has in a data directory."""

    train: int
    validation: int
    run: tuple[int, int, int]
    """Train, dev and test rows that a run gets which asks for `USUAL`."""


def prompt_shape(task: Task) -> Example:
    """The task's prompt and options around the names of its fields.

    Raises:
        ValueError: a field needs a value of a kind of its own; the task has to name one in ``sample``.
    """
    return render(task, sample_row(task), "the row that shows the prompt")


def row_counts(task: Task, data_dir: str | Path | None) -> Sizes | None:
    """Rows of a task in ``data_dir``; None for generated rows and where there are none. Nothing is downloaded."""
    if isinstance(task.source, GeneratedData) or not _is_here(task, data_dir):
        return None
    splits = load_splits(task, data_dir, *USUAL)
    counts = [len(load_rows(task, split, data_dir)) for split in ("train", "validation")]
    return Sizes(counts[0], counts[1], (len(splits.train), len(splits.dev), len(splits.test)))


def zero_shot(
    task: Task,
    data_dir: str | Path | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int = 200,
    max_length: int | None = None,
) -> Scores | None:
    """Score an untrained model on at most ``rows`` test rows; None where there are no data. Nothing is downloaded.

    ``max_length``: most tokens of prompt and option; None: the model's context.
    """
    test = _test_rows(task, data_dir, rows)
    return evaluate(model, tokenizer, task, test, batch_size=16, max_length=max_length) if test else None


def majority_accuracy(task: Task, data_dir: str | Path | None, rows: int = 200) -> float | None:
    """Accuracy of the majority class on the test rows; None for options that differ by row."""
    examples = [task.example(row) for row in _test_rows(task, data_dir, rows)]
    if not examples or task.metric != "accuracy" or len({example.options for example in examples}) > 1:
        return None
    return max(Counter(example.gold[0] for example in examples).values()) / len(examples)


def _test_rows(task: Task, data_dir: str | Path | None, rows: int) -> list[Row]:
    return load_rows(task, "validation", data_dir, rows, TEST_SEED) if _is_here(task, data_dir) else []


def _is_here(task: Task, data_dir: str | Path | None) -> bool:
    if not isinstance(task.source, HubData):
        return True
    return data_dir is not None and (Path(data_dir) / task.name / "validation.jsonl").is_file()


def task_row(task: Task, data_dir: str | Path | None, models: Models, rows: int = 200) -> dict[str, str]:
    """One task's line of the table, by column."""
    kind = "generation" if task.metric == "f1" else "options, LM loss" if task.form == "lm" else "options"
    commonest, counts = majority_accuracy(task, data_dir, rows), row_counts(task, data_dir)
    return {
        "task": f"`{task.label}`",
        "kind": kind,
        "metric": task.metric,
        "rows: train / validation": _rows_text(task, counts),
        "a run gets: train / dev / test": _run_text(task, counts),
        "commonest option": "-" if commonest is None else f"{commonest:.3f}",
    } | {name: _score_text(zero_shot(task, data_dir, *model, rows)) for name, model in models.items()}


def prompt_row(task: Task) -> dict[str, str]:
    """One task's prompt, options and ways to score it, by column."""
    shape = prompt_shape(task)
    return {
        "task": f"`{task.name}`",
        "prompt": _code(shape.prompt),
        "options": " ".join(_code(option) for option in shape.options),
        "variants": ", ".join(f"`{name}`: {_code(_variant_prompt(task, name))}" for name in task.variants) or "-",
        "context-less prompt": "-" if task.contextless is None else _code(task.contextless(sample_row(task))),
    }


def _variant_prompt(task: Task, variant: str) -> str:
    return task.variants[variant](sample_row(task)).prompt


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in markdown, with the keys of the first row as columns."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def catalogue(
    data_dir: str | Path | None, models: Models, rows: int = 200, tasks: Sequence[str] = (), progress: bool = False
) -> str:
    """Both tables of the named tasks (default: all) in markdown: figures, then prompts.

    Args:
        data_dir: holds ``<task>/{train,validation}.jsonl``; a task that is not there says so.
        models: what to score before any training.
        rows: most test rows to score on.
        progress: show a bar.

    Raises:
        ValueError: a name is unknown, or a row is malformed.
    """
    chosen = [get_task(name) for name in tasks or task_names()]
    figures = [task_row(task, data_dir, models, rows) for task in tqdm(chosen, desc="tasks", disable=not progress)]
    return f"## Figures\n\n{markdown(figures)}\n## Prompts\n\n{markdown([prompt_row(task) for task in chosen])}"


def _rows_text(task: Task, sizes: Sizes | None) -> str:
    if isinstance(task.source, GeneratedData):
        return "generated"
    return f"{sizes.train} / {sizes.validation}" if sizes else ABSENT


def _run_text(task: Task, sizes: Sizes | None) -> str:
    if isinstance(task.source, GeneratedData):
        return "as asked"
    return " / ".join(map(str, sizes.run)) if sizes else ABSENT


def _score_text(scores: Scores | None) -> str:
    if scores is None:
        return ABSENT
    others = ", ".join(f"{name} {value:.3f}" for name, value in scores.official.items())
    return format_interval(scores.value, scores.interval) + (f" ({others})" if others else "")


def _code(text: str) -> str:
    """Text as code in a cell of a table: line breaks and a leading space made visible."""
    shown = text.replace("\n", "⏎").replace("|", "\\|")
    return f"`␣{shown[1:]}`" if shown.startswith(" ") else f"`{shown}`"


def main() -> None:
    """Score the models on all tasks and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, help="holds <task>/{train,validation}.jsonl")
    parser.add_argument("--models", nargs="*", default=["l2l/tiny"], help="l2l/tiny, directories or hub ids")
    parser.add_argument("--tasks", nargs="*", default=[], help="default: all")
    parser.add_argument("--rows", type=int, default=200, help="most test rows per task")
    parser.add_argument("--out", type=Path, help="file to write; default: print")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums of several threads may differ in the last digit
    models = {_shown(name): (load_model(name), load_tokenizer(name)) for name in options.models}
    usual = " / ".join(map(str, USUAL))
    head = TEXT.format(models=" ".join(models), rows=options.rows, usual=usual, absent=ABSENT)
    text = head + catalogue(options.data_dir, models, options.rows, options.tasks, progress=True)
    if options.out is None:
        print(text)
    else:
        write(options.out, text)


def _shown(name: str) -> str:
    """A directory by its last part."""
    return Path(name).name if Path(name).is_dir() else name


def write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


if __name__ == "__main__":
    main()
