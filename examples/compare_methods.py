# %% [markdown]
"""Compare methods at equal forward passes and equal tuning effort, and read what the comparison leaves.

A step of one method costs two forward passes, of another nine; each has a learning rate of its own size. `l2l compare` runs
every method with each value of its grid on a seed that is in no table, keeps the best, and then spends the same number of
forward passes on each of the table's seeds. One seed and one task, as here, are a demonstration and no evidence;
`docs/compare.md` says what is fair, and `docs/results` has a full run.
"""

# %%
import csv
from pathlib import Path

from l2l.cli import main

FOLDER = Path("runs/examples/compare_methods")

CONFIG = """\
methods:
- mezo
- {method: learned, tuner: l2l-tiny-ratio, options: {lr: auto}}  # step size from measured curvature
settings: [{name: l2l-tiny, tasks: [world_stars], batch_size: 8}]
grid: [1.0e-4, 3.0e-4]
step_fraction_grid: [0.1, 0.2]
passes: 40
seeds: 1
train_size: 64
dev_size: 32
test_size: 32
evaluations: 1
processes: 1
progress: false
"""

# %%
if __name__ == "__main__":  # runs are processes of their own, which import this file again
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "compare.yaml").write_text(CONFIG)
    out = FOLDER / "out"
    # As on the command line: l2l compare --config compare.yaml --out out. It returns the exit code.
    code = main(["compare", "--config", str(FOLDER / "compare.yaml"), "--out", str(out), "--overwrite", "true"])
    if code:
        raise SystemExit(code)

    with (out / "results.csv").open() as file:  # a row per run, those that chose step sizes marked
        runs = [run for run in csv.DictReader(file) if run["tuning"] == "False"]
    for run in sorted(runs, key=lambda run: float(run["train_loss"])):
        loss, passes = float(run["train_loss"]), run["passes"]
        print(f"{run['label']}: loss {loss:.3f} after {passes} passes, step size {run['step_size']} of its grid")
    print(f"the page to open: {out / 'index.html'}")
