"""Measures a model on the world's tasks, zero-shot and after first-order fine-tuning: the table of the model card.

``python -m l2l.world.measure --help``
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2l.world import HELD_OUT, POOL, VALIDATION

if TYPE_CHECKING:
    from l2l.tasks.base import Task

ROLES = {"pool": POOL, "validation": VALIDATION, "held out": HELD_OUT}
MODEL = Path(__file__).parent.parent / "models" / "tiny"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of its options, and which option is right."""

    prompt: list[int]
    options: list[list[int]]
    gold: int


def load_task(name: str) -> Task:
    """The task of that name."""
    return importlib.import_module(f"l2l.tasks.{name}").TASK


def encode(task: Task, split: str, count: int, tokenize: Callable[..., Any]) -> list[Encoded]:
    """``count`` rows of ``split``, seed 0, as token ids."""
    examples = [task.example(row) for row in task.source.generate(split, count, 0)]  # pyright: ignore
    return [
        Encoded(
            tokenize(example.prompt)["input_ids"],
            [tokenize(option, add_special_tokens=False)["input_ids"] for option in example.options],
            example.gold[0],
        )
        for example in examples
    ]


def scores(model: Any, batch: Sequence[Encoded]) -> torch.Tensor:
    """Mean log-probability of every option's tokens, shaped (rows, options)."""
    index: dict[tuple[int, ...], int] = {}
    owners, rows, columns, targets = [], [], [], []
    for owner, (prompt, option) in enumerate((item.prompt, option) for item in batch for option in item.options):
        row = index.setdefault((*prompt, *option[:-1]), len(index))
        owners += [owner] * len(option)
        rows += [row] * len(option)
        columns += range(len(prompt) - 1, len(prompt) - 1 + len(option))
        targets += option
    hidden = model.base_model(input_ids=_padded(list(index))).last_hidden_state[rows, columns]
    log_probabilities = model.lm_head(hidden).log_softmax(-1)[range(len(targets)), targets]
    sums = torch.zeros(len(batch) * len(batch[0].options)).index_add(0, torch.tensor(owners), log_probabilities)
    return (sums / torch.tensor(owners).bincount()).view(len(batch), -1)


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Right-padded ids; a causal model never looks at the padding."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def loss_of(task: Task, model: Any, batch: Sequence[Encoded]) -> tuple[torch.Tensor, float]:
    """The task's loss on a batch, and the share of rows whose best option is right."""
    table, gold = scores(model, batch), torch.tensor([item.gold for item in batch])
    accuracy = (table.argmax(1) == gold).float().mean().item()
    if task.form == "lm":
        return -table.gather(1, gold[:, None]).mean(), accuracy
    return torch.nn.functional.cross_entropy(table, gold), accuracy


@torch.no_grad()
def evaluate(task: Task, model: Any, data: Sequence[Encoded]) -> tuple[float, float]:
    """Loss and accuracy over all of ``data``."""
    loss, accuracy = loss_of(task, model, data)
    return loss.item(), accuracy


def adam(task: Task, model: Any, data: Sequence[Encoded], steps: int, lr: float) -> None:
    """Trains in place with Adam on batches of 16: what first-order fine-tuning reaches."""
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=lr), torch.Generator().manual_seed(0)
    for _ in range(steps):
        picked = torch.randint(len(data), (16,), generator=generator)
        optimizer.zero_grad()
        loss_of(task, model, [data[i] for i in picked.tolist()])[0].backward()
        optimizer.step()


def table_row(name: str, role: str, options: argparse.Namespace) -> str:
    """One measured line of the table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    task = load_task(name)
    validation = encode(task, "validation", options.rows, tokenizer)
    loss, accuracy = evaluate(task, model, validation)
    adam(task, model, encode(task, "train", 2000, tokenizer), options.steps, options.lr)
    loss_after, accuracy_after = evaluate(task, model, validation)
    choices = len(validation[0].options)
    return f"| {name} | {role} | {choices} | {loss:.3f} | {accuracy:.3f} | {loss_after:.3f} | {accuracy_after:.3f} |"


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m l2l.world.measure", description="Measure a model on the world's tasks."
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of the model (default: the shipped one)")
    parser.add_argument("--tasks", default="", help="task names joined by commas (default: all)")
    parser.add_argument("--rows", type=int, default=500, help="validation rows (default: 500)")
    parser.add_argument("--steps", type=int, default=300, help="Adam steps of batch 16 (default: 300)")
    parser.add_argument("--lr", type=float, default=3e-4, help="Adam's learning rate (default: 3e-4)")
    options = parser.parse_args(argv)
    wanted = [(name, role) for role, names in ROLES.items() for name in names]
    print("| task | role | options | zero-shot loss | zero-shot accuracy | Adam loss | Adam accuracy |")
    print("|---|---|---|---|---|---|---|")
    for name, role in wanted:
        if not options.tasks or name in options.tasks.split(","):
            print(table_row(name, role, options), flush=True)


if __name__ == "__main__":
    main()
