# %% [markdown]
"""Train a LoRA adapter beside a frozen model, save it, and load it again.

With forward passes only, LoRA saves no memory for gradients: there are none to save. What it gives is a small file, a base
that stays as it is, and fewer numbers to perturb. Those need another learning rate and epsilon than the full model, so
`fine_tune` has defaults for each scheme (`docs/schemes.md`); `lr="auto"` finds the step size by itself.
"""

# %%
from pathlib import Path

import torch

import l2l

OUT = Path("runs/examples/lora")

# %%
result = l2l.fine_tune(
    "l2l/tiny",
    task="world_topic",
    scheme="lora",
    scheme_args={"r": 8, "lora_alpha": 16},
    lr="auto",
    steps=60,
    train_size=200,
    dev_size=32,
    test_size=64,
    eval_every=60,
    out=str(OUT),
    overwrite=True,
    progress=False,
)
summary = result.summary
total = sum(parameter.numel() for parameter in result.model.parameters())
print(f"trained: {summary['trained_parameters']:,} of {total:,} parameters")
print(f"train loss: {summary['initial_loss']:.3f} before, {summary['final_loss']:.3f} after")

# %%
# The folder holds the adapter alone, in peft's format; the base is named in its config and loaded with it.
files = sorted(OUT.joinpath("model").glob("*.safetensors"))
print(f"adapter: {files[0].name}, {files[0].stat().st_size:,} bytes")

tokenizer = l2l.load_tokenizer("l2l/tiny")
batch = tokenizer("these words belong to the world of", return_tensors="pt")
loaded = l2l.load_model(str(OUT / "model")).eval()
with torch.no_grad():
    same = torch.equal(loaded(**batch).logits, result.model(**batch).logits)
print(f"loaded again, the same logits: {same}")
