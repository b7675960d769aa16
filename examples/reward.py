"""Train on a reward: any number that a Python function gives for the texts that a model writes, without a gradient.

Here the embedded model continues short prompts, and the reward is 1 where it begins to ask whether something is so ("is it",
"can we"), else 0. Sampling, decoding and a string test lie between weights and reward, so backpropagation has nothing to go
through. A zeroth-order method only compares numbers and does not mind.

The same from the command line, in the directory of this file:

    l2l fine-tune --reward ./reward.py:asks --prompts reward_prompts.jsonl --method es ...

Nothing in this reward asks the texts to stay sensible: a reward is optimised as it stands. See docs/rewards.md.
"""

import json
from pathlib import Path

import torch

import l2l
from l2l.train.runlog import read_log

OUT = "runs/examples/reward"


def asks(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float]:
    """TRL's signature: a float for each completion; larger is better."""
    return [float(text.startswith(("is it", "can we"))) for text in completions]


def main() -> None:
    """Train, and rebuild the weights from the run's log."""
    model = l2l.load_model("l2l/tiny")
    result = l2l.fine_tune(
        model,
        reward=asks,
        prompts=Path(__file__).with_name("reward_prompts.jsonl"),
        method="es",  # a population, both signs of 4 directions, weighed by z-scored rewards
        num_directions=4,
        freeze="^(?!.*norm)",  # train the scales of the norms alone, 1,152 numbers
        lr=0.3,
        epsilon=0.1,  # large enough to change some of the texts
        batch_size=64,
        max_new_tokens=4,
        steps=40,
        eval_every=10,
        eval_samples=8,
        save="log",
        progress=False,
        out=OUT,
        overwrite=True,
    )
    reward = result.summary["reward"]
    for name in ("start", "end"):
        print(f"mean reward at the {name}: {reward[name]['value']:.3f}, standard error {reward[name]['standard_error']:.3f}")
    print(f"seconds: {result.summary['train_seconds'] + result.summary['evaluate_seconds']:.0f}")
    for line in (result.out / "completions_after.jsonl").read_text().splitlines()[:40:8]:
        print("  {prompt} -> {completion}".format(**json.loads(line)))

    # The weights again, from the losses in the log: no sampling, no rewards.
    log = read_log(result.out / "steps.l2l")
    again = l2l.load_model("l2l/tiny", log=result.out)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    print(f"{len(log.steps)} steps; the log rebuilds the weights of the best one: {same}")


if __name__ == "__main__":
    main()
