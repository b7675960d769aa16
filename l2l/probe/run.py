"""``l2l lr-probe``: probe a model on a task as a run would see it, advise, and write down why."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from l2l.finetune.baselines import baseline_names
from l2l.finetune.run import prepare_fine_tuning
from l2l.finetune.session import RunContext
from l2l.methods import method_class
from l2l.methods.base import Method
from l2l.probe.advice import reasons
from l2l.probe.config import ProbeConfig
from l2l.probe.measure import ProbeResult, measure, pairs
from l2l.probe.picture import draw
from l2l.report.files import write_json
from l2l.report.progress import progress_bar
from l2l.report.rundir import RunDirectory
from l2l.report.tables import print_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_lr_probe(
    config: ProbeConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Probe, write ``probe.json`` and ``probe.png``, print the advice; the summary.

    Args:
        model, tokenizer: None: loaded by name. A model given keeps its weights bit for bit.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
        FloatingPointError: the loss is not finite.
    """
    method = None if config.method in baseline_names() else method_class(config.method)
    if method is None or not issubclass(method, Method):
        raise _no_directions(config)
    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    found = probe(prepare_fine_tuning(config.fine_tune(), model, tokenizer), config)
    folder.create()
    write_json(folder.path / "probe.json", record(found, config))
    draw(folder.path / "probe.png", found)
    summary = headline(found, config)
    folder.finish(summary)
    show(found, config, summary)
    return summary


def probe(parts: RunContext, config: ProbeConfig) -> ProbeResult:
    """Probe what :func:`l2l.finetune.run.prepare` made. Nothing is written; the weights are the same bits afterwards.

    Raises:
        ValueError: the method is of first order.
        FloatingPointError: the loss is not finite.
    """
    optimizer, closures = parts.optimizer, parts.closures
    if not isinstance(optimizer.method, Method):
        raise _no_directions(config)
    total = pairs(config.probes, config.sweep, len(config.epsilons))
    with progress_bar(f"{config.task} {config.method}", total, visible=config.progress) as advance:
        return measure(
            optimizer.theta,
            optimizer.method,
            lambda step, number: closures.further(step, number - 1) if number else closures.at(step),
            config.probes,
            config.sweep,
            config.epsilons,
            config.seed,
            config.step_fraction,
            advance=advance,
        )


def _no_directions(config: ProbeConfig) -> ValueError:
    return ValueError(f"method {config.method!r} looks along no directions: lr-probe serves zeroth-order methods only")


def command(found: ProbeResult, config: ProbeConfig) -> str:
    """The line that runs what is advised."""
    words = ["l2l", "fine-tune"]
    for name, value in config.differing().items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join([*words, "--lr", f"{found.advice.lr:.2g}", "--epsilon", f"{found.advice.epsilon:.3g}"])


def headline(found: ProbeResult, config: ProbeConfig) -> dict[str, Any]:
    """What ``summary.json`` holds."""
    return {
        "task": config.task,
        "method": config.method,
        **{name: value for name, value in asdict(found.advice).items() if name != "figures"},
        "error": found.advice.figures.error,
        "passes": found.passes,
        "reasons": reasons(found.advice, found.sweep.epsilons.tolist(), len(found.chosen.home)),
        "command": command(found, config),
        "config": asdict(config),
    }


def record(found: ProbeResult, config: ProbeConfig) -> dict[str, Any]:
    """What ``probe.json`` holds: every loss seen, and everything made of them."""
    figures = [asdict(one) | {"error": one.error} for one in found.figures]
    return {
        "advice": asdict(found.advice),
        "epsilons": figures,
        "dropped_epsilons": list(found.dropped),
        "sweep": _losses(found.sweep),
        "probes": _losses(found.chosen) | {"slope_on_another_batch": found.again.tolist()},
        "passes": found.passes,
        "config": asdict(config),
    }


def _losses(looks: Any) -> dict[str, Any]:
    names = ("epsilons", "plus", "minus", "home")
    return {name: getattr(looks, name).tolist() for name in names}


def show(found: ProbeResult, config: ProbeConfig, summary: dict[str, Any]) -> None:
    """Print the table of epsilons, the advice, its reasons and the line to run next."""
    chosen = found.advice.epsilon
    rows = [
        {
            "epsilon": f"{one.epsilon:g}{' *' if one.epsilon == chosen else ''}",
            "slope": one.slope,
            "curvature": one.curvature,
            "slope: rounding": f"{one.slope_rounding:.2%}",
            "truncation": f"{one.slope_truncation:.2%}",
            "curvature: rounding": f"{one.curvature_rounding:.2%}",
            "truncation ": f"{one.curvature_truncation:.2%}",
            "together": f"{one.error:.2%}",
        }
        for one in found.figures
    ]
    print_table(f"lr-probe: {config.out}", rows)
    if found.dropped:
        print(f"The loss is not finite at epsilon {', '.join(f'{value:g}' for value in found.dropped)}.")
    names = ("task", "method", "lr", "epsilon", "beta", "curvature", "lr_best", "lr_highest", "passes")
    print_table("advice", [{name: summary[name] for name in names}])
    for sentence in summary["reasons"]:
        print(sentence)
    print(f"\n{summary['command']}")
