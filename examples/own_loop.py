# %% [markdown]
"""Fine-tune a language model in a training loop of your own, with forward passes only.

`l2l.MeZO` is a `torch.optim.Optimizer`. Like LBFGS it takes a closure, because a step reads the loss more than once: at
theta + epsilon * z and at theta - epsilon * z. Their difference is the slope along the random direction z, and theta moves
along z by it. No gradient is computed and no activation is stored, so a step needs the memory of inference.
"""

# %%
import torch

import l2l

TEXTS = [
    "the lamp is in the kitchen .",
    "the rope is in the cellar .",
    "the pillow is in the hallway .",
    "the basket is in the stable .",
    "the plow is in the barn .",
    "the cup is in the bathroom .",
    "the spoon is in the office .",
    "the hammer is in the workshop .",
]
STEPS, BATCH = 90, 4

model = l2l.load_model("l2l/tiny").eval()  # dropout would make the two losses of a step differ by more than the direction
tokenizer = l2l.load_tokenizer("l2l/tiny")


# %%
def encoded(texts: list[str]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels of a batch; padding is not trained on (label -100)."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


everything = encoded(TEXTS)
batches = [encoded(TEXTS[start : start + BATCH]) for start in range(0, len(TEXTS), BATCH)]


def mean_loss() -> float:
    """Over all texts, in nats per token."""
    with torch.no_grad():
        return model(**everything).loss.item()


# %%
# What is trained is chosen by requires_grad, as anywhere in torch. Here the norms stay as they are.
for name, parameter in model.named_parameters():
    parameter.requires_grad_("norm" not in name)

optimizer = l2l.MeZO(model, lr=5e-4, epsilon=1e-3, seed=0)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=STEPS)

# %%
before = mean_loss()
print(f"before: {before:.3f} nats per token")
for step in range(STEPS):
    batch = batches[step % len(batches)]
    optimizer.step(lambda batch=batch: model(**batch).loss)  # the closure is called twice
    scheduler.step()
    if (step + 1) % 30 == 0:
        print(f"step {step + 1}: {mean_loss():.3f}")
print(f"after: {mean_loss():.3f} nats per token, by {2 * STEPS} forward passes")
print(f"gradients stored: {sum(parameter.grad is not None for parameter in model.parameters())}")
