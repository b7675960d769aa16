"""Outer steps of meta-training beside the textbook formulation: prints and writes Markdown, and JSON beside it.

python benchmarks/meta.py --help
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from pages import cell, document, markdown_table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from l2l.meta.config import MetaTrainConfig
from l2l.meta.module import MetaTraining
from l2l.meta.pool import MetaInputs, PoolTask
from l2l.models.shapes import shape_config
from l2l.noise import Key, standard_noise
from l2l.params import Blocks
from l2l.report.memory import PeakMemory, current_bytes
from l2l.report.run_directory import RunDirectory, write_json, write_whole
from l2l.tasks import get_task
from l2l.tasks.encode import Encoded, EncodedOption
from l2l.tools.bench import GIB, IGNORED, Contender, build, hardware, ratio, rounds
from l2l.train.inputs import Batcher
from l2l.tuners.api import Tuner

Step: TypeAlias = Callable[[], float]
"""Takes one outer step; returns the meta-loss: the loss after the zeroth-order step."""

SHARED, OWN, TEXTBOOK = "ours, shared gradient", "ours, own gradient", "textbook"
CPU = torch.device("cpu")
NEVER = 10**6
"""Steps until a restart: none happens here, and the learning rate stays what it is."""

NOTE = (
    "Medians over {repeats} rounds in which every contender takes its turn; ratios within a round. Random weights in "
    "fp32, {batch}x{length} tokens, {threads} threads. Both of ours compute logits where the loss reads them, the "
    "textbook everywhere. `shared` takes the model's gradient after the zeroth-order step, where the objective needs "
    "one anyway; `own` takes it before, as the textbook does. Peak memory: weights counted, interpreter and libraries "
    "not, two steps in a fresh process for each. Meta-loss: after the first step; noise {noise}."
)


def parser() -> argparse.ArgumentParser:
    """The options of the script."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="opt-125m-shape")
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--length", type=int, default=64)
    options.add_argument(
        "--answer_tokens", nargs="+", type=int, default=[0], help="the loss is over the last so many tokens; 0: all"
    )
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--lr", type=float, default=1e-6, help="of the zeroth-order step")
    options.add_argument("--clip", type=float, default=1.0, help="limit on the gradient norm of the trajectory")
    options.add_argument("--same_noise", action="store_true", help="the textbook is given ours, to compare the losses")
    options.add_argument("--out", help="Markdown file; default: docs/results/<date>-meta.md")
    return options


def config(given: argparse.Namespace, gradient: str = "shared") -> MetaTrainConfig:
    """The outer step that is measured."""
    taken: Any = "own" if gradient == "own" else "shared"
    return MetaTrainConfig(lr=given.lr, inner_clip=given.clip, restart_every=NEVER, trajectory_gradient=taken)


def rows_of_tokens(given: argparse.Namespace, vocabulary: int) -> Tensor:
    """Random ids [batch_size, length + 1]: the last is only predicted."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (given.batch_size, given.length + 1), generator=draw)


def ours(gradient: str, given: argparse.Namespace, answer: int) -> Step:
    """Outer steps as ``l2l meta-train`` takes them, on one batch."""
    model = build(given.model, "fp32", CPU, length=given.length)
    tuner = Tuner.for_model(model)
    ids = rows_of_tokens(given, model.config.vocab_size)
    examples = [Encoded((EncodedOption(tuple(row), answer or given.length),), (0,)) for row in ids.tolist()]
    pool = [PoolTask(get_task("copa"), Batcher(examples, "lm", 0, given.batch_size, 0), [])]
    inputs = MetaInputs(model, None, tuner, pool, [])  # pyright: ignore[reportArgumentType]  # nothing is tokenised
    learner = MetaTraining(inputs, config(given, gradient), RunDirectory("unused", {}))
    sgd = torch.optim.SGD(tuner.network.parameters(), lr=learner.config.outer_lr)
    numbers = iter(range(NEVER))

    def step() -> float:
        number = next(numbers)
        outcome, closure = learner.outer_loss(number)
        sgd.zero_grad()
        outcome.surrogate.backward()
        sgd.step()
        learner.inner_step(number, closure, outcome)
        return outcome.loss

    return step


class Textbook:
    """One outer step as a reader of the paper (arXiv:2510.00419) writes it in torch, for comparison only.

    All parameters are copied, noise and perturbed parameters are tensors, the parameters after the step are a function
    of sigma in autograd's graph, each block has a module of its own, and the model then takes a first-order step.
    """

    def __init__(self, given: argparse.Namespace, answer: int) -> None:
        self.model = build(given.model, "fp32", CPU, length=given.length)
        self.config = config(given)
        tuner = Tuner.for_model(self.model)
        self.counts = tuner.normalizer.counts(Blocks.of(self.model))
        self.networks = one_network_per_block(tuner)
        self.tuner_sgd = torch.optim.SGD(self.networks.parameters(), lr=self.config.outer_lr)
        self.model_sgd = torch.optim.SGD(self.model.parameters(), lr=self.config.inner_lr, momentum=self.config.inner_momentum)
        ids = rows_of_tokens(given, self.model.config.vocab_size)
        self.inputs, self.targets = ids[:, :-1], ids[:, 1:].clone()
        self.targets[:, : given.length - (answer or given.length)] = IGNORED
        self.sigma, self.losses = [1.0] * len(self.counts), (0.0, 0.0)
        self.same_noise, self.number = given.same_noise, 0

    def step(self) -> float:
        """The zeroth-order step and what the tuner learns from it, then the model's own step."""
        after = self.teach()
        self.model_sgd.zero_grad()
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.inner_clip)
        self.model_sgd.step()
        self.model_sgd.zero_grad()
        self.number += 1
        return after

    def teach(self) -> float:
        """Update the networks by the gradient of the loss after the step; that loss."""
        start = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        noise = {name: self.noise(name, value) for name, value in start.items()}
        sigma = {name: n(f).abs() for n, (name, f) in zip(self.networks, self.features(start).items(), strict=True)}
        self.sigma = [value.item() for value in sigma.values()]
        energy = sum(n * s**2 for n, s in zip(self.counts.tolist(), self.sigma, strict=True))
        factor, epsilon = (self.counts.sum().item() / energy) ** 0.5, self.config.epsilon

        def moved(distance: float) -> dict[str, Tensor]:
            return {name: start[name] + distance * factor * sigma[name] * noise[name] for name in start}

        with torch.no_grad():
            self.losses = self.loss(moved(epsilon)).item(), self.loss(moved(-epsilon)).item()
        after = self.loss(moved(-self.config.lr * (self.losses[0] - self.losses[1]) / (2 * epsilon)))
        self.tuner_sgd.zero_grad()
        after.backward()
        self.tuner_sgd.step()
        return after.item()

    def noise(self, name: str, like: Tensor) -> Tensor:
        """Gaussian noise; or that of our step, to compare the losses."""
        return standard_noise(name, Key(0, self.number), like.shape) if self.same_noise else torch.randn_like(like)

    def features(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[5] per block: mean, variance, last losses, last sigma."""
        return {
            name: torch.tensor([value.mean().item(), value.var().item(), *self.losses, sigma])
            for (name, value), sigma in zip(start.items(), self.sigma, strict=True)
        }

    def loss(self, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Mean cross entropy at these parameters, or at the model's own; logits everywhere."""
        arguments = {"input_ids": self.inputs, "use_cache": False}
        if parameters is None:
            logits = self.model(**arguments).logits
        else:
            logits = functional_call(self.model, parameters, kwargs=arguments, tie_weights=True).logits
        return functional.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), ignore_index=IGNORED)


def one_network_per_block(tuner: Tuner) -> nn.ModuleList:
    """The tuner's networks, as modules with the same weights."""
    weights, found = tuner.network.state_dict(), nn.ModuleList()
    for i, bias in enumerate(weights["second_bias"]):
        hidden, features = weights["first_weight"][i].shape
        network = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        values = weights["first_weight"][i], weights["first_bias"][i], weights["second_weight"][i][None], bias[None]
        for parameter, value in zip(network.parameters(), values, strict=True):
            parameter.data.copy_(value)
        found.append(network)
    return found


MAKERS: dict[str, Callable[[argparse.Namespace, int], Step]] = {
    SHARED: partial(ours, "shared"),
    OWN: partial(ours, "own"),
    TEXTBOOK: lambda given, answer: Textbook(given, answer).step,
}


def peak_bytes(name: str, given: argparse.Namespace, answer: int) -> int:
    """Most bytes that two steps needed, in a process that has done nothing else than a step of a tiny model."""
    torch.set_num_threads(given.threads)
    MAKERS[name](argparse.Namespace(**{**vars(given), "model": "opt-tiny-shape", "length": 2}), 0)()
    gc.collect()
    idle = current_bytes()
    step = MAKERS[name](given, answer)
    with PeakMemory() as peak:
        _ = step(), step()
    return peak.bytes - idle


def in_fresh_process(name: str, given: argparse.Namespace, answer: int) -> int:
    """:func:`peak_bytes`, where nothing has filled the allocator before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(peak_bytes, name, given, answer).result()


def measured(given: argparse.Namespace, answer: int) -> list[dict[str, Any]]:
    """Time, memory and first meta-loss of every contender, for a loss over so many tokens of a row."""
    peaks = {name: in_fresh_process(name, given, answer) for name in MAKERS}
    steps = {name: maker(given, answer) for name, maker in MAKERS.items()}
    losses = {name: [step()] for name, step in steps.items()}  # the warm-up
    found: Mapping[str, Contender] = {name: partial(nullcontext, recorded(steps[name], losses[name])) for name in steps}
    seconds = rounds(found, CPU, given.repeats, lambda _: None)
    return [
        {
            "contender": name,
            "loss over": f"last {answer} tokens" if answer else "all tokens",
            "seconds": median(seconds[name]),
            "textbook_over_this": ratio(seconds, TEXTBOOK, name),
            "peak_bytes": peaks[name],
            "peak_over_textbook": peaks[name] / peaks[TEXTBOOK],
            "seconds_by_round": seconds[name],
            "meta_losses": losses[name],
        }
        for name in MAKERS
    ]


def recorded(step: Step, losses: list[float]) -> Step:
    """The same step; its losses are kept."""

    def kept() -> float:
        losses.append(step())
        return losses[-1]

    return kept


def row(found: Mapping[str, Any]) -> dict[str, str]:
    """A contender's figures as a row of the table."""
    shown = {
        "loss over": found["loss over"],
        "contender": found["contender"],
        "step, s": found["seconds"],
        "steps/s": 1 / found["seconds"],
        "textbook / this": found["textbook_over_this"],
        "peak, GiB": found["peak_bytes"] / GIB,
        "peak / textbook": found["peak_over_textbook"],
        "meta-loss": f"{found['meta_losses'][0]:.5f}",
    }
    return {name: cell(value) for name, value in shown.items()}


def page(given: argparse.Namespace, machine: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """The dated Markdown page."""
    sizes = {"repeats": given.repeats, "batch": given.batch_size, "length": given.length, "threads": given.threads}
    note = NOTE.format(noise="the same for all" if given.same_noise else "of its own for the textbook", **sizes)
    command = shlex.join(["python", "benchmarks/meta.py", *sys.argv[1:]])
    title = f"an outer step of meta-training on {given.model}"
    return document(title, machine, command, [markdown_table([row(one) for one in found]), note])


def main() -> None:
    """Measure every loss with every contender."""
    given = parser().parse_args()
    shape_config(given.model)  # an unknown shape is told before long work
    torch.set_num_threads(given.threads)
    machine = hardware()
    found = [one for answer in given.answer_tokens for one in measured(given, answer)]
    text = page(given, machine, found)
    target = Path(given.out or f"docs/results/{machine['date']}-meta.md")
    write_whole(target, lambda path: path.write_text(text))
    write_json(target.with_suffix(".json"), machine | {"settings": vars(given), "measured": found})
    print(text)


if __name__ == "__main__":
    main()
