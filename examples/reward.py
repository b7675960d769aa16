# %% [markdown]
"""Train on a reward: any number that a Python function computes from what the model does, without a gradient.

Here the model writes short texts, and the reward is the share of them that contain a question mark. Sampling, decoding and
a string test lie between weights and reward, so backpropagation has nothing to go through. A zeroth-order method only
compares two numbers and does not mind.

For a task's own scores there is no code to write: `l2l.fine_tune(..., objective="accuracy")`, `"f1"`, `"exact_match"`, or
`objective="package.module:function"`.

Nothing here asks the texts to stay sensible, so they get worse as the reward grows: a reward is optimised as it stands.
"""

# %%
import torch

import l2l

STEPS, SAMPLES, TOKENS = 50, 40, 10

model = l2l.load_model("l2l/tiny").eval()
tokenizer = l2l.load_tokenizer("l2l/tiny")


def write(samples: int, seed: int) -> list[str]:
    """Texts that the model writes by itself, after the token that begins a text."""
    start = torch.tensor([[tokenizer.bos_token_id]] * samples)
    # The two evaluations of a step must differ by the weights alone: the same seed, so the same random numbers, in both.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        ids = model.generate(start, do_sample=True, top_k=0, max_new_tokens=TOKENS, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def reward(texts: list[str]) -> float:
    """Between 0 and 1; larger is better."""
    return sum("?" in text for text in texts) / len(texts)


# %%
# A share of 40 texts moves in steps of 1/40: epsilon must be large enough for some of them to change. With 1e-3, which
# suits losses, most steps would see no difference at all.
optimizer = l2l.MeZO(model, lr=1e-3, epsilon=1e-2, seed=0)

# %%
print(f"before: {reward(write(300, seed=10_000)):.2f} of the texts ask something")
for step in range(STEPS):
    # What a closure returns is minimised, so the reward is negated. A float will do; it need not be a tensor.
    optimizer.step(lambda step=step: -reward(write(SAMPLES, seed=step)))
print(f"after: {reward(write(300, seed=10_000)):.2f}")
print("\n".join(f"  {text}" for text in write(5, seed=20_000)))
