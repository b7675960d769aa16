"""Meta-objectives beside each other: how noisy each one's gradient is, where it points, and what it costs.

python benchmarks/meta_objectives.py --help
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from l2l.estimators import consume_gradients
from l2l.meta.config import MetaTrainConfig, with_defaults
from l2l.meta.curvature import hessian_traces
from l2l.meta.module import MetaTraining
from l2l.meta.objectives import make_objective
from l2l.meta.objectives.closed_forms import (
    ClosedForm,
    closed_form_loss,
    first_order,
    log_progress_rate,
    probe_step,
    second_order,
)
from l2l.meta.objectives.one_step_loss import OneStepLoss
from l2l.meta.run import prepare_meta_training
from l2l.meta.state import MetaLoss, MetaState
from l2l.meta.trajectory import momentum_step
from l2l.report.console import print_table
from l2l.report.run_directory import RunDirectory, write_json
from l2l.tools.bench import hardware

OBJECTIVES = (
    "one_step_loss",
    "held_out_loss",
    "expected",
    'expected_curvature {"trace": "fisher"}',
    'expected_curvature {"trace": "hutchinson"}',
    'expected_curvature {"trace": "seen"}',
    'log_progress_rate {"trace": "fisher"}',
    'unrolled_loss {"steps": 4}',
    'evolution {"population": 2, "steps": 2}',
)
SECOND_ORDER = {"expected_curvature": "second order", "log_progress_rate": "log progress rate"}
"""Which of the references an objective is compared with; the others with the first order."""
PLAIN, FAR = "first order", 10**6
"""Outer steps of measurements are counted from here, so that no key or batch is one that led to the point."""

NOTE = (
    "signal/noise: |mean|^2 / variance of the gradient in the tuner's weights over repeated keys and batches, the share of "
    "the mean that is noise taken off; one step's. cosine: of one gradient, and of the mean, with the closed form from "
    "{reference} batches: for expected_curvature and log_progress_rate that of their own formula, else of the first order; for "
    "evolution through the normaliser, which it sees. Means over {places} places (points x tasks), {repeats} repeats each."
)


def parser() -> argparse.ArgumentParser:
    """The options of the script."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="l2l/tiny")
    options.add_argument("--tasks", nargs="+", default=["world_topic", "world_job"])
    options.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="a name, and its arguments as JSON")
    options.add_argument("--points", nargs="+", type=int, default=[0, 20], help="first-order steps before measuring")
    options.add_argument("--repeats", type=int, default=8, help="keys and batches per point and task")
    options.add_argument("--reference", type=int, default=32, help="batches behind the gradients compared with")
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--lr", type=float, default=1e-4, help="of the zeroth-order step")
    options.add_argument("--inner_lr", type=float, default=3e-3, help="of the trajectory")
    options.add_argument("--data_dir", help="as in l2l meta-train")
    options.add_argument("--start", default="random", help="of the tuner: random or mezo")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--tiny", action="store_true", help="two points, two repeats: whether it runs")
    options.add_argument("--out", help="JSON file; default: docs/results/<date>-meta-objectives.json")
    return options


@dataclass
class Samples:
    """Gradients and costs of an objective at one place."""

    gradients: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    passes: int = 0


def learner_of(given: argparse.Namespace) -> MetaTraining:
    """Meta-training whose model follows the first-order trajectory."""
    config = MetaTrainConfig(
        model=given.model,
        tasks=given.tasks,
        data_dir=given.data_dir,
        lr=given.lr,
        batch_size=given.batch_size,
        inner_lr=given.inner_lr,
        restart_every=max(1, *given.points) + 1,
        trajectory_gradient="own",
        architecture_args={"start": given.start},
        seed=given.seed,
    )
    config = with_defaults(config)
    return MetaTraining(prepare_meta_training(config, None, None), config, RunDirectory("unused", {}))


def named(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an objective as it is written on the command line."""
    name, _, args = text.partition(" ")
    return name, json.loads(args) if args else {}


def weights_gradient(outcome: MetaLoss, learner: MetaTraining) -> Tensor:
    """The meta-gradient in the tuner's weights, [weights] float64."""
    found = torch.autograd.grad(outcome.surrogate, list(learner.inputs.tuner.network.parameters()))
    return torch.cat([value.reshape(-1) for value in found]).double()


def references(learner: MetaTraining, point: MetaState, batches: int) -> dict[str, Tensor]:
    """Gradients in the tuner's weights of the closed forms, their statistics from many batches."""
    probe = probe_step(point)
    components, blocks = probe.components, point.theta.blocks
    halves = [{i: torch.zeros_like(block.tensor.detach()) for i, block in enumerate(blocks)} for _ in range(2)]
    noisy, trace = components.zeros(), components.zeros()
    for number in range(batches):
        closure = point.further(number)

        def take(index: int, gradient: Tensor, half: dict[int, Tensor] = halves[number % 2]) -> None:
            components.add(noisy, index, gradient, gradient, 1 / batches)
            half[index].add_(gradient, alpha=2 / batches)

        consume_gradients(closure, blocks, take)
        at = replace(point, closure=closure, key=point.key.with_draw(number))
        trace += hessian_traces(at, components, probe.direction, "hutchinson", 1)[0] / batches
    signal = components.zeros()
    for index in range(len(blocks)):
        components.add(signal, index, halves[0][index], halves[1][index])
    forms = {
        PLAIN: first_order(probe.energies, signal, point.lr),
        "second order": second_order(probe.energies, signal, noisy, trace, point.lr),
        "log progress rate": log_progress_rate(probe.energies, signal, noisy, trace, 0.01),
    }

    def gradient(form: ClosedForm, through: bool) -> Tensor:
        return weights_gradient(closed_form_loss(point, probe, form, 0.0, 0, through), learner)

    return {name: gradient(form, False) for name, form in forms.items()} | {"evolution": gradient(forms[PLAIN], True)}


def measured(learner: MetaTraining, given: argparse.Namespace, index: int) -> tuple[dict[str, Samples], dict[str, Tensor]]:
    """Every objective in turn, repeatedly, at the current weights on one task; and the references."""
    first = learner.meta_state(FAR, index, 0)
    history = OneStepLoss()(first).history
    objectives = {text: make_objective(named(text)[0], **named(text)[1]) for text in given.objectives}
    found = {text: Samples() for text in objectives}
    for repeat in range(given.repeats):
        point = replace(learner.meta_state(FAR + 1 + repeat, index, 1 + repeat), history=history)
        for text, objective in objectives.items():
            began = time.perf_counter()
            outcome = objective(point)
            gradient = weights_gradient(outcome, learner)
            found[text].seconds.append(time.perf_counter() - began)
            found[text].gradients.append(gradient)
            found[text].passes = outcome.passes
    return found, references(learner, replace(first, history=history), given.reference)


def figures(samples: Samples, reference: Tensor) -> dict[str, float]:
    """Signal to noise and cosines of one objective at one place."""
    gradients = torch.stack(samples.gradients)
    centre = gradients.mean(0)
    variance = gradients.var(0).sum().item()
    squared = torch.dot(centre, centre).item() - variance / len(gradients)
    alone = torch.cosine_similarity(gradients, reference[None], dim=1).mean().item()
    together = torch.cosine_similarity(centre, reference, dim=0).item()
    return {
        "signal_to_noise": squared / variance,
        "cosine": alone,
        "cosine_of_mean": together,
        "norm": gradients.norm(dim=1).mean().item(),
        "seconds": median(samples.seconds),
        "passes": samples.passes,
    }


def move_model(learner: MetaTraining, start: int, end: int) -> None:
    """First-order steps of the model, the tasks in turn."""
    for step in range(start, end):
        index, number = learner.task_of(step)
        closure = learner.meta_state(step, index, number).closure
        momentum_step(closure, learner.theta, learner.velocity, learner.config.inner_lr_at(step))


def measure_places(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All places: one entry per point, task and objective."""
    learner, at, entries = learner_of(given), 0, []
    for point in sorted(given.points):
        move_model(learner, at, point)
        at = point
        for index, task in enumerate(given.tasks):
            found, references_found = measured(learner, given, index)
            for text, samples in found.items():
                name = named(text)[0]
                reference = "evolution" if name == "evolution" else SECOND_ORDER.get(name, PLAIN)
                place = {"point": point, "task": task, "objective": text, "reference": reference}
                entries.append(place | figures(samples, references_found[reference]))
    return entries


def summary(entries: Sequence[dict[str, Any]], objectives: Sequence[str]) -> list[dict[str, Any]]:
    """A row per objective: means over the places, times the median."""
    rows = []
    for text in objectives:
        own = [entry for entry in entries if entry["objective"] == text]
        signal, passes = mean(entry["signal_to_noise"] for entry in own), own[0]["passes"]
        rows.append(
            {
                "objective": text,
                "passes": passes,
                "seconds": median(entry["seconds"] for entry in own),
                "signal/noise": signal,
                "per 100 passes": 100 * signal / passes,
                "cosine": mean(entry["cosine"] for entry in own),
                "cosine of mean": mean(entry["cosine_of_mean"] for entry in own),
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    given = parser().parse_args()
    if given.tiny:
        given.points, given.repeats, given.reference, given.batch_size = [0, 2], 2, 4, 2
    if given.repeats < 2:
        raise SystemExit(f"--repeats {given.repeats}: a variance needs at least 2")
    for text in given.objectives:
        make_objective(named(text)[0], **named(text)[1])  # unknown ones show before long work
    torch.set_num_threads(given.threads)
    machine, began = hardware(), time.perf_counter()
    entries = measure_places(given)
    rows = summary(entries, given.objectives)
    print_table(f"meta-objectives on {given.model}", rows)
    places = len(given.points) * len(given.tasks)
    print(NOTE.format(reference=given.reference, places=places, repeats=given.repeats))
    target = Path(given.out or f"docs/results/{machine['date']}-meta-objectives.json")
    seconds = time.perf_counter() - began
    write_json(target, machine | {"settings": vars(given), "seconds": seconds, "summary": rows, "places": entries})


if __name__ == "__main__":
    main()
