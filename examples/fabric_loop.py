"""A loop of your own under Lightning Fabric: one process or several, saved in the middle and continued from there.

Run it alone, or as `torchrun --nproc-per-node 2 examples/fabric_loop.py`. Every process evaluates its own share of a batch at
the same perturbed weights, and `all_reduce` makes the mean of their losses the loss of the step, in which all of them then
agree: one number crosses between the processes where backpropagation exchanges a gradient per weight.

The model is moved, and not set up: `fabric.setup` would wrap it in DistributedDataParallel, which keeps buckets for gradients
that never come.
"""

import os
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

import l2l

TEXTS = [f"the {thing} is in the {place} ." for thing in ("lamp", "rope", "cup", "plow") for place in ("kitchen", "cellar")]
EPOCHS, FILE = 6, Path("runs/examples/fabric_loop/state.ckpt")

tokenizer = l2l.load_tokenizer("l2l/tiny")


def encoded(texts: list[str]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels of a batch; padding is not trained on (label -100)."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


fabric = Fabric(accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")))
fabric.launch()
model = fabric.to_device(l2l.load_model("l2l/tiny").eval())  # dropout would make the two losses of a step differ by chance
optimizer = l2l.MeZO(model, lr=5e-4, epsilon=1e-3, seed=0)
loader = fabric.setup_dataloaders(DataLoader(TEXTS, batch_size=8 // fabric.world_size, collate_fn=encoded))


def train(epochs: int) -> float:
    """The loss of the last step."""
    loss = float("nan")
    for _ in range(epochs):
        for batch in loader:
            loss = optimizer.step(lambda batch=batch: fabric.all_reduce(model(**batch).loss, reduce_op="mean"))
    return loss


first = train(1)
train(EPOCHS - 1)
fabric.save(FILE, {"model": model, "optimizer": optimizer})
through = train(EPOCHS)
fabric.load(FILE, {"model": model, "optimizer": optimizer})
again = train(EPOCHS)

total = torch.stack([parameter.double().sum() for parameter in model.parameters()]).sum()
sums = fabric.all_gather(total).reshape(-1)
fabric.print(f"processes: {fabric.world_size}, steps: {optimizer.steps_done}")
fabric.print(f"loss: {first:.3f} before, {again:.3f} after")
fabric.print(f"continued from the saved state to the same loss: {through == again}")
fabric.print(f"the same weights in all processes: {bool((sums == sums[0]).all())}")
