"""Does training on the F1 of generated answers raise it? SQuAD, with forward passes only. Prints a table.

python benchmarks/squad_f1.py --model ../shared/models/stories260K --data_dir ../shared/data --out runs/squad-f1

A model that answers nothing right shows F1 no way to go, so `--warm_up` steps of AdamW on the loss can come first.

F1 has no gradient: the generated words jump as weights move. The column is the negative objective as training saw it,
averaged over the first and the last quarter of the steps; one step's batch is small, so single steps say little.
"""

from __future__ import annotations

import argparse
from statistics import mean

import torch

import l2l
from l2l.report.console import print_table
from l2l.tasks.metrics import bootstrap_interval, format_interval
from l2l.train.config import FineTuneConfig
from l2l.train.runlog import read_run_log
from l2l.train.trainer import prepare_fine_tuning


def main() -> None:
    """Train, and print the training F1 of the first and last quarter beside that on the test rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="l2l/tiny")
    parser.add_argument("--data_dir")
    parser.add_argument("--out", default="runs/squad-f1")
    parser.add_argument("--objective", default="f1", choices=("f1", "exact_match", "loss"))
    parser.add_argument("--method", default="mezo")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--train_size", type=int, default=200)
    parser.add_argument("--test_size", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--epsilon", type=float, default=2e-3)
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument("--max_length", type=int, help="most tokens of prompt and answer; default: the model's context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm_up", type=int, default=0, help="steps of AdamW on the loss, before")
    parser.add_argument("--warm_up_lr", type=float, default=1e-3)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    warm_up, lr = options.pop("warm_up"), options.pop("warm_up_lr")
    common = {"task": "squad", "dev_size": 50, "overwrite": True}
    model, tokenizer = options.pop("model"), None
    if warm_up:
        first = options | {"method": "adamw", "objective": "loss", "steps": warm_up, "lr": lr}
        parts = prepare_fine_tuning(FineTuneConfig(model=model, **first, **common))
        for step in range(warm_up):
            parts.optimizer.step(parts.closures.at(step))
        model, tokenizer = parts.model, parts.tokenizer  # where the last step left it: dev knows nothing of these rows
    result = l2l.fine_tune(model, tokenizer=tokenizer, **options, **common, eval_every=options["steps"], save="log")
    _, steps = read_run_log(result.out)
    seen = [-mean(side for _, *sides in step["directions"] for side in sides) for step in steps]
    quarter = max(1, len(seen) // 4)
    best = result.summary["best"]
    rows = {
        "objective": options["objective"],
        "steps": len(seen),
        "first quarter": format_interval(mean(seen[:quarter]), bootstrap_interval(seen[:quarter])),
        "last quarter": format_interval(mean(seen[-quarter:]), bootstrap_interval(seen[-quarter:])),
        "test F1, best step on dev": format_interval(best["test"]["value"], best["test"]["interval"]),
        "best step": best["step"],
        "seconds": result.summary["seconds"],
    }
    print_table("SQuAD: mean of what training maximises [95 % interval]", [rows])


if __name__ == "__main__":
    main()
