"""A loop of your own under accelerate: one process or several, saved in the middle and continued from there.

Run it alone, or as `torchrun --nproc-per-node 2 examples/accelerate_loop.py`. Every process evaluates its own
share of a batch at the same perturbed weights, and the mean of their losses is the loss of the step: one number crosses between
the processes where backpropagation exchanges a gradient per weight. As all know the number, all take the same step.

The model is prepared with `evaluation_mode=True`: it is registered for `save_state`, and not wrapped in
DistributedDataParallel, which would keep buckets for gradients that never come.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import l2l

TEXTS = [f"the {thing} is in the {place} ." for thing in ("lamp", "rope", "cup", "plow") for place in ("kitchen", "cellar")]
EPOCHS, FOLDER = 6, "runs/examples/accelerate_loop"

tokenizer = l2l.load_tokenizer("l2l/tiny")


def encoded(texts: list[str]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels of a batch; padding is not trained on (label -100)."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


accelerator = Accelerator(cpu=True)
model = l2l.load_model("l2l/tiny").eval()  # dropout would make the two losses of a step differ by more than the direction
model = accelerator.prepare_model(model, evaluation_mode=True)
loader = DataLoader(TEXTS, batch_size=8 // accelerator.num_processes, collate_fn=encoded)
optimizer, loader = accelerator.prepare(l2l.MeZO(model, lr=5e-4, epsilon=1e-3, seed=0), loader)


def train(epochs: int) -> float:
    """The loss of the last step."""
    loss = float("nan")
    for _ in range(epochs):
        for batch in loader:
            closure = lambda batch=batch: accelerator.gather(model(**batch).loss.reshape(1)).mean()  # noqa: E731
            loss = optimizer.optimizer.step(closure)  # accelerate's own step gives no loss
    return loss


first = train(1)
train(EPOCHS - 1)
accelerator.save_state(FOLDER, safe_serialization=True)  # weights as safetensors; what the optimizer keeps beside them
through = train(EPOCHS)
accelerator.load_state(FOLDER)
again = train(EPOCHS)

total = torch.stack([parameter.double().sum() for parameter in model.parameters()]).sum()
sums = accelerator.gather(total.reshape(1))
accelerator.print(f"processes: {accelerator.num_processes}, steps: {optimizer.optimizer.steps_done}")
accelerator.print(f"loss: {first:.3f} before, {again:.3f} after")
accelerator.print(f"continued from the saved state to the same loss: {through == again}")
accelerator.print(f"the same weights in all processes: {bool((sums == sums[0]).all())}")
accelerator.end_training()
