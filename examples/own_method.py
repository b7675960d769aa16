# %% [markdown]
"""A method of your own in one file: MeZO whose learning rate does not depend on the size of the loss.

MeZO's step is lr * g * z, and g grows with the loss: a loss in another unit needs another lr. Here the step is divided by
the root of the running mean square of g, so its length is lr times something near 1. A method writes down where
it differs from MeZO, here `init` and `update_`; its state is its whole memory, so that its runs resume exactly.
"""

# %%
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

import l2l
from l2l.estimators import Estimate
from l2l.methods.base import Method, MethodInfo, StepContext, descend
from l2l.params import Blocks, PerturbedParameters


# %%
@dataclass(frozen=True)
class RMSState:
    """Running mean of g squared, and the steps that are in it."""

    square: float = 0.0
    steps: int = 0


@final
@dataclass(frozen=True)
class RMSMeZO(Method[RMSState]):
    """theta -= lr * g / rms(g) * z."""

    info: ClassVar = MethodInfo("an example; no paper")
    step_is_normalized = True  # the step's length is lr's alone: lr="auto", a rule for steps that follow g, is refused
    decay: float = 0.9

    def init(self, blocks: Blocks) -> RMSState:
        return RMSState()

    def update_(
        self, theta: PerturbedParameters, state: RMSState, estimates: Sequence[Estimate], context: StepContext
    ) -> RMSState:
        mean = sum(estimate.projected_gradient**2 for estimate in estimates) / len(estimates)
        state = RMSState(self.decay * state.square + (1 - self.decay) * mean, state.steps + 1)
        rms = math.sqrt(state.square / (1 - self.decay**state.steps))  # a mean that begins at 0 is too low at first
        descend(theta, estimates, [lr / rms for lr in context.lr])
        return state


# %%
def train(scale: float, method: Method, lr: float) -> float:
    """Loss after 40 steps on `scale` times the loss."""
    model, tokenizer = l2l.load_model("l2l/tiny").eval(), l2l.load_tokenizer("l2l/tiny")
    batch = tokenizer(["the rope is in the cellar .", "the plow is in the barn ."], return_tensors="pt")
    optimizer = l2l.ZOOptimizer(model, method, lr=lr, seed=0)
    for _ in range(40):
        optimizer.step(lambda: scale * model(**batch, labels=batch["input_ids"]).loss)
    with torch.no_grad():
        return model(**batch, labels=batch["input_ids"]).loss.item()


# %%
if __name__ == "__main__":
    for scale in (1.0, 0.01):
        print(f"loss times {scale:g}: RMSMeZO ends at {train(scale, RMSMeZO(), lr=3e-3):.4f}")
    # A file on the Python path works by its name too: `l2l fine-tune --method my_package.own_method`.
    result = l2l.fine_tune(
        "l2l/tiny",
        task="world_topic",
        method=RMSMeZO(decay=0.8),
        lr=3e-3,
        steps=40,
        train_size=100,
        dev_size=32,
        test_size=32,
        out="runs/examples/own_method",
        overwrite=True,
        progress=False,
    )
    print(f"world_topic: {result.summary['initial_loss']:.3f} before, {result.summary['final_loss']:.3f} after")
