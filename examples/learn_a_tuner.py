# %% [markdown]
"""Learn a tuner for a model, look at it, save it, and fine-tune a task that it has never seen with it.

A tuner sets sigma, the perturbation scale of each block (each named parameter tensor). It is learned once per model over a
pool of tasks. This run is far too short to learn a good one: it shows the way. `docs/learn-a-tuner.md` has the rest, and
`docs/is-this-tuner-any-good.md` says how to judge what comes out.
"""

# %%
from pathlib import Path

import l2l

OUT = Path("runs/examples/learn_a_tuner")
POOL, HELD_OUT = ["world_topic", "world_sentiment", "world_job"], "world_cause"

# %%
# Learning takes backward passes, and the memory of one. Using the tuner afterwards takes forward passes only.
tuner = l2l.meta_train(
    "l2l/tiny",
    tasks=POOL,
    steps=20,
    objective="log_progress_rate",  # at the best learning rate: it does not reward a sigma that is merely larger
    architecture="table",  # a number per block; other networks see the losses and the weights' moments as well
    outer_optimizer="adam",
    outer_lr=0.03,
    inner_lr=3e-3,
    batch_size=8,
    train_size=200,
    out=str(OUT / "tuner"),
    overwrite=True,
    progress=False,
)
# %%
tuner.save_pretrained(OUT / "my-tuner")  # three files: weights, config, card; nothing in them is executed
tuner = l2l.Tuner.from_pretrained(OUT / "my-tuner")
print(f"saved: {', '.join(sorted(path.name for path in (OUT / 'my-tuner').iterdir()))}")
print(f"blocks that have a sigma: {len(tuner.fingerprint.names)}")

# %%
# Against MeZO (sigma = 1 in every block) on a task outside the pool: the same seed, steps and rule for the step size, so
# that neither has an advantage but its sigma. One seed and one task prove nothing; `l2l tuners test` and
# `l2l meta-evaluate` do this properly.
for name in ("mezo", "learned"):
    result = l2l.fine_tune(
        "l2l/tiny",
        task=HELD_OUT,
        method=name,
        tuner=tuner if name == "learned" else None,
        lr="auto",
        steps=40,
        train_size=100,
        dev_size=32,
        test_size=32,
        eval_every=40,
        out=str(OUT / name),
        overwrite=True,
        progress=False,
    )
    summary = result.summary
    print(f"{name}: train loss {summary['initial_loss']:.3f} before, {summary['final_loss']:.3f} after")
