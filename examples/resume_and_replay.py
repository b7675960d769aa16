# %% [markdown]
"""Kill a run, continue it to the same bits, and rebuild its weights from its log of a few bytes per step.

Noise is a function of (seed, step, block name, element), never of a generator's state. So a run that continues sees the
noise that it would have seen, and whoever has the base model and each step's losses has the weights: all steps once more,
without data and without forward passes.
"""

# %%
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

import l2l

FOLDER, STEPS = Path("runs/examples/resume_and_replay"), 40

OPTIONS = {
    "model": "l2l/tiny",
    "task": "world_topic",
    "method": "mezo",
    "lr": 3e-4,
    "steps": STEPS,
    "batch_size": 8,
    "train_size": 100,
    "dev_size": 32,
    "test_size": 32,
    "eval_every": STEPS,
    "checkpoint_every": 10,
    "seed": 3,
    "progress": False,
}


def train(out: Path) -> l2l.FineTuneResult:
    """The same call begins a run and continues one that was interrupted: it looks at what is in `out`."""
    return l2l.fine_tune(**OPTIONS, out=str(out))


def farthest(left: torch.nn.Module, right: torch.nn.Module) -> float:
    """The largest difference between two weights."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


# %%
# Begin a run by the command, in another process, and kill it as soon as it has written a checkpoint.
shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)
(FOLDER / "run.yaml").write_text(yaml.safe_dump(OPTIONS))
command = [sys.executable, "-m", "l2l", "fine-tune", "--config", str(FOLDER / "run.yaml"), "--out", str(FOLDER / "killed")]
process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while process.poll() is None and not (FOLDER / "killed" / "checkpoint.safetensors").exists():
    time.sleep(0.02)
process.kill()
process.wait()
print(f"killed: {sorted(path.name for path in (FOLDER / 'killed').iterdir())}")

# %%
# Continue it here, and run the same without a break beside it.
continued, whole = train(FOLDER / "killed"), train(FOLDER / "whole")
print(f"continued to step {continued.summary['steps']}, loss {continued.summary['final_loss']:.4f}")
print(f"largest difference to a run that was not killed: {farthest(continued.model, whole.model)}")

# %%
# Rebuild the weights of the best step from the base model and the log, to the last bit: no data, no forward pass.
log = FOLDER / "whole" / "steps.l2l"
rebuilt = l2l.load_model("l2l/tiny", log=log)
moved = farthest(l2l.load_model("l2l/tiny"), whole.model)
size, off = log.stat().st_size, farthest(rebuilt, whole.model)
print(f"rebuilt from {size:,} bytes: off by {off}, where training moved by {moved:.1e}")
