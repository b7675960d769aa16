"""What leaving untouched embedding rows alone does to speed and to the final loss.

    python benchmarks/sparse_embeddings.py --out runs/sparse_embeddings

Speed: a managed MeZO step on a random OPT-125m shape whose head is untied, 8 x 64 tokens, logits at the last position
only; whole and sparse embedding alternate, medians. Loss: MeZO on ``l2l/tiny`` with its head untied, the same seeds,
passes and learning rates for both; the best learning rate of each by its mean final train loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import l2l
from l2l.methods.mezo import MeZO
from l2l.optim import ZOOptimizer


def untied(model: Any) -> Any:
    """The model with an output embedding of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def speed(repeats: int) -> dict[str, float]:
    """Medians in seconds of a managed step, whole embedding and sparse."""
    from transformers import OPTConfig, OPTForCausalLM

    model = untied(OPTForCausalLM(OPTConfig()).eval())
    ids = torch.randint(0, 50_000, (8, 64), generator=torch.Generator().manual_seed(0))

    def closure() -> torch.Tensor:
        return -model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.log_softmax(-1)[..., 7].mean()

    contenders = {name: ZOOptimizer(model, MeZO(), lr=1e-7, sparse_embeddings=name == "sparse") for name in ("whole", "sparse")}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat, name in itertools.product(range(repeats + 1), contenders):
        with contenders[name].theta.fused_steps():
            contenders[name].step(closure)
            began = time.perf_counter()
            contenders[name].step(closure)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def final_losses(out: Path, tasks: list[str], lrs: list[float], seeds: list[int], steps: int) -> list[dict[str, Any]]:
    """One row per run."""
    rows = []
    for task, lr, seed, sparse in itertools.product(tasks, lrs, seeds, (False, True)):
        model = untied(l2l.load_model("l2l/tiny"))
        name = f"{task}-{lr}-{seed}-{sparse}"
        options: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed, "train_size": 500, "test_size": 250}
        options |= {
            "dev_size": 50,
            "eval_every": steps,
            "checkpoint_every": steps,
            "save": "log",
            "progress": False,
        }
        result = l2l.fine_tune(model, task, sparse_embeddings=sparse, out=str(out / name), overwrite=True, **options)
        row = {"task": task, "lr": lr, "seed": seed, "sparse": sparse}
        rows.append(row | {name: result.summary[name] for name in ("final_loss", "seconds")})
        print(rows[-1], flush=True)
    return rows


def best(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: per task and kind, mean and spread at the best learning rate."""
    lines = ["| task | embedding | lr | final loss | seconds |", "|---|---|---|---|---|"]
    for task, sparse in itertools.product(sorted({row["task"] for row in rows}), (False, True)):
        mine = [row for row in rows if row["task"] == task and row["sparse"] == sparse]
        by_lr = {lr: [r["final_loss"] for r in mine if r["lr"] == lr] for lr in sorted({r["lr"] for r in mine})}
        lr = min(by_lr, key=lambda value: statistics.mean(by_lr[value]))
        spread = statistics.stdev(by_lr[lr]) if len(by_lr[lr]) > 1 else 0.0
        seconds = statistics.median(r["seconds"] for r in mine)
        mean = statistics.mean(by_lr[lr])
        lines.append(f"| {task} | {'sparse' if sparse else 'whole'} | {lr:g} | {mean:.3f} ± {spread:.3f} | {seconds:.1f} |")
    return lines


def main() -> None:
    """Measure, print Markdown, and write it with all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sparse_embeddings"))
    parser.add_argument("--tasks", default="world_stars,world_opposite,world_cause")
    parser.add_argument("--lrs", default="3e-5,1e-4,3e-4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7, help="0: no speed measurement")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    times = speed(given.repeats) if given.repeats else {}
    seeds, lrs = [int(s) for s in given.seeds.split(",")], [float(lr) for lr in given.lrs.split(",")]
    rows = final_losses(given.out, given.tasks.split(","), lrs, seeds, given.steps)
    lines = best(rows)
    if times:
        lines.insert(0, f"Step: whole {times['whole']:.3f} s, sparse {times['sparse']:.3f} s.\n")
    print("\n".join(lines))
    (given.out / "table.md").write_text("\n".join(lines) + "\n")
    (given.out / "rows.json").write_text(json.dumps({"seconds_per_step": times, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
