"""Score a model on task files of lm-evaluation-harness twice, by the harness and here, and compare row by row.

python benchmarks/harness_agreement.py TASK.yaml … --model DIRECTORY [--batch_size 8]

Needs `pip install 'l2l[harness]'`. The rows are those of the split that the harness reports on, all of them, in float32 on the
CPU. A row is predicted alike where both choose the same option, or write the same answer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2l.models.load import load_model, load_tokenizer
from l2l.report.console import print_table
from l2l.tasks import get_task
from l2l.tasks.evaluate import evaluate
from l2l.tasks.metrics import best_option
from l2l.tasks.rows import TEST_SEED, load_rows

NAMES = {"accuracy": "acc"}
"""Names of metrics in the harness, where they differ."""


@dataclass(frozen=True)
class Agreement:
    """Scores of the same rows by both."""

    task: str
    rows: int
    here: dict[str, float]
    """Metrics by the names of the harness."""
    there: dict[str, float]
    differing: int
    """Rows whose prediction is another one."""
    seconds: tuple[float, float]
    """Here, there."""


def compare(file: str, model: str, batch_size: int = 8) -> Agreement:
    """Score the rows of a task file by both; ``model`` is a directory with weights and tokenizer."""
    began = time.perf_counter()
    task, tokenizer = get_task(file), load_tokenizer(model)
    rows = load_rows(task, "validation", None, seed=TEST_SEED)
    scores = evaluate(load_model(model), tokenizer, task, rows, batch_size)
    here = {NAMES.get(scores.metric, scores.metric): scores.value} | scores.official
    middle = time.perf_counter()
    there, samples = harness_scores(file, model, batch_size)
    found = {key(sample["doc"]): sample for sample in samples}
    # Rows that are twice in a file have the same prediction, so that the last one speaks for all.
    assert task.scoring is not None and len(samples) == len(rows)
    differing = 0
    for row, answer in zip(rows, scores.answers, strict=True):
        sample, example = found[key(row)], task.example(row)
        responses = sample["filtered_resps"]
        if task.generates:
            differing += responses[0] != answer
        elif len(example.options) > 1:
            first = best_option(task.scoring.metrics[0], [one[0] for one in responses], example.choices)
            differing += example.options[first] != answer
    if not task.generates and all(len(task.example(row).options) == 1 for row in rows):
        differing = sum(
            bool(found[key(row)]["filtered_resps"][0][1]) != bool(right)
            for row, right in zip(rows, scores.rowwise, strict=True)
        )
    return Agreement(task.label, len(rows), here, there, differing, (middle - began, time.perf_counter() - middle))


def harness_scores(file: str, model: str, batch_size: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and samples of lm-evaluation-harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    path = Path(file).resolve()
    scored = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=batch_size)
    name = get_task(file).name.removeprefix("harness_")
    tasks = TaskManager(include_path=str(path.parent), include_defaults=False)
    found = simple_evaluate(scored, tasks=[name], task_manager=tasks, log_samples=True, bootstrap_iters=0)
    values = {key.partition(",")[0]: value for key, value in found["results"][name].items()}
    metrics = {key: value for key, value in values.items() if isinstance(value, float | int) and "stderr" not in key}
    return metrics, found["samples"][name]


def key(row: Any) -> str:
    """A row, whatever the order of its fields."""
    return repr(sorted(dict(row).items()))


def table(found: Sequence[Agreement]) -> list[dict[str, object]]:
    """A line per task and metric."""
    return [
        {
            "task": one.task,
            "rows": one.rows,
            "metric": name,
            "l2l": f"{value:.4f}",
            "harness": f"{one.there[name]:.4f}",
            "rows predicted otherwise": one.differing,
            "seconds, l2l / harness": " / ".join(f"{seconds:.0f}" for seconds in one.seconds),
        }
        for one in found
        for name, value in one.here.items()
        if name in one.there
    ]


def main() -> None:
    """Print a line per task and metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    for file in options.tasks:  # one by one, so that what is measured is seen at once
        print_table("agreement", table([compare(file, options.model, options.batch_size)]))


if __name__ == "__main__":
    main()
