"""How far a model is from its ceiling on the embedded tasks: zero-shot, after Adam, after MeZO. Prints a table.

python benchmarks/world_tasks.py --help
"""

from __future__ import annotations

import argparse

import torch

from l2l.tasks.evaluate import Scores, evaluate
from l2l.tasks.losses import batch_loss
from l2l.tasks.tiny_world import HELD_OUT, POOL, VALIDATION
from l2l.train.config import FineTuneConfig
from l2l.train.trainer import RunContext, prepare_fine_tuning

ROLES = {"pool": POOL, "validation": VALIDATION, "held out": HELD_OUT}


def score(parts: RunContext) -> Scores:
    """Loss and metric on the test rows."""
    return evaluate(parts.model, parts.tokenizer, parts.task, parts.splits.test)


def first_order(parts: RunContext, steps: int, lr: float) -> Scores:
    """After Adam, with backpropagation."""
    adam = torch.optim.Adam(parts.model.parameters(), lr=lr)
    for step in range(steps):
        adam.zero_grad()
        batch_loss(parts.model, parts.closures.batcher.at(step), parts.closures.batcher.form).backward()
        adam.step()
    return score(parts)


def zeroth_order(parts: RunContext, steps: int) -> Scores:
    """After MeZO, with forward passes only."""
    for step in range(steps):
        batch = parts.closures.batcher.at(step)
        parts.optimizer.step(lambda batch=batch: batch_loss(parts.model, batch, parts.closures.batcher.form))
    return score(parts)


def main() -> None:
    """Print a row per task; of several MeZO learning rates the best by test loss is shown, with its value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="l2l/tiny")
    parser.add_argument("--tasks", nargs="*", help="default: all of the world's tasks")
    parser.add_argument("--adam_steps", type=int, default=300)
    parser.add_argument("--adam_lr", type=float, default=3e-4)
    parser.add_argument("--mezo_steps", type=int, default=0, help="0: leave MeZO out")
    parser.add_argument("--mezo_lrs", type=float, nargs="*", default=[3e-5, 1e-4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | role | zero-shot loss / metric | Adam | MeZO | lr |")
    print("|---|---|---|---|---|---|")
    for role, names in ROLES.items():
        for name in [name for name in names if not options.tasks or name in options.tasks]:
            config = FineTuneConfig(model=options.model, task=name)
            before = score(prepare_fine_tuning(config))
            ceiling = first_order(prepare_fine_tuning(config), options.adam_steps, options.adam_lr)
            runs = [
                (
                    zeroth_order(
                        prepare_fine_tuning(FineTuneConfig(model=options.model, task=name, lr=lr)), options.mezo_steps
                    ),
                    lr,
                )
                for lr in (options.mezo_lrs if options.mezo_steps else ())
            ]
            best, lr = min(runs, key=lambda run: run[0].loss, default=(None, None))
            cells = [f"{s.loss:.2f} / {s.value:.2f}" if s else "-" for s in (before, ceiling, best)]
            print(f"| {name} | {role} | {' | '.join(cells)} | {lr or '-'} |", flush=True)


if __name__ == "__main__":
    main()
