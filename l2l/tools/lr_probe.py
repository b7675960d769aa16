"""``l2l lr-probe``: recommend a learning rate and an epsilon for a run from losses along a few dozen random directions.

Losses L+, L0 and L- are evaluated on training batches as the run would evaluate them; nothing is trained, and the weights
keep every bit. :mod:`l2l.tools.lr_probe_maths` computes the recommendation.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from l2l.estimators.finite_difference import Closure, center_loss, two_point
from l2l.methods import method_class
from l2l.methods.base import Method, check_counts, check_positive
from l2l.models.kinds import Head
from l2l.models.load import Quantize
from l2l.models.schemes import Scheme
from l2l.noise import Key
from l2l.optim import CurvatureLR
from l2l.params import Direction, PerturbedParameters
from l2l.report.console import print_table, progress_bar
from l2l.report.files import write_json, write_whole
from l2l.report.run_directory import RunDirectory
from l2l.tools import lr_probe_maths as maths
from l2l.tools.lr_probe_maths import LEAST_EPSILONS, Advice, Exactness, LineLosses, Values
from l2l.train.baselines import baseline_names
from l2l.train.config import FineTuneConfig, PerturbMode
from l2l.train.trainer import prepare_fine_tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class ProbeConfig:
    """Recommend a learning rate and an epsilon from a few dozen probes of the loss; nothing is trained."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, or a hub id."""
    task: str = "world_topic"
    """Name of a task; `l2l tasks list` shows them."""
    method: str = "mezo"
    """The method that is to be run: it chooses the directions."""
    tuner: str | None = None
    """Directory, bundled name or hub id of the tuner that ``learned`` needs."""
    scheme: Scheme = "full"
    """What is to be trained, and so probed: every weight, an adapter, or the output head; as in ``l2l fine-tune``."""
    scheme_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of peft's configuration of the scheme."""
    out: str = "runs/lr-probe"
    """Directory for ``probe.json``, ``probe.png``, ``config.yaml`` and ``summary.json``."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub. Embedded tasks need neither."""
    probes: int = 24
    """Directions probed, each on a training batch of its own, and once more on a second batch: five forward passes."""
    sweep: int = 4
    """The first directions, along which every epsilon is tried: two more passes per epsilon."""
    epsilons: list[float] = field(default_factory=lambda: list(EPSILONS))
    """Epsilons to try, at least three; those at which the loss is not finite are left out."""
    step_fraction: float | None = None
    """Share to go of the step to the bottom of the parabola seen. None: 0.1 to 0.2, by the noise of the batches."""
    batch_size: int = 16
    """Examples per step of the run to come: the noise is that of such batches."""
    micro_batch: int | None = None
    """Most examples whose loss is computed at once; None: the whole batch."""
    objective: str = "loss"
    """What training is to minimise, as in ``l2l fine-tune``."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    train_size: int = 1000
    """Rows to train on."""
    perturb: PerturbMode = "auto"
    """How perturbed weights are made, as in ``l2l fine-tune``."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method."""
    seed: int = 0
    """Fixes rows, batches and directions."""
    dtype: str = "float32"
    """Dtype the weights are loaded in: in half precision larger epsilons are needed."""
    quantize: Quantize = "none"
    """Load the frozen base in 4 or 8 bits, as in ``l2l fine-tune``."""
    device: str | None = None
    """Torch device; None: the CPU."""
    device_map: str | None = None
    """``auto`` and the like spread the layers over the devices there are. Not beside ``device``."""
    head: Head = "auto"
    """Kind of model to load, as in ``l2l fine-tune``."""
    attn_implementation: str | None = None
    """``eager``, ``sdpa``, … as transformers names them; None lets it choose."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. It can do whatever you can."""
    revision: str | None = None
    """Revision of a hub model."""
    overwrite: bool = False
    """Remove what an earlier probe left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_counts(probes=self.probes, sweep=self.sweep, batch_size=self.batch_size, train_size=self.train_size)
        if self.probes < 2:
            raise ValueError(f"probes={self.probes} must be at least 2: one direction shows no spread")
        if self.sweep > self.probes:
            raise ValueError(f"sweep={self.sweep} must be at most probes={self.probes}: it takes the first of them")
        if len(set(self.epsilons)) != len(self.epsilons) or len(self.epsilons) < LEAST_EPSILONS:
            raise ValueError(f"epsilons={self.epsilons} must be at least {LEAST_EPSILONS} different numbers")
        for epsilon in self.epsilons:
            check_positive(epsilons=epsilon)
        check_positive(step_fraction=1.0 if self.step_fraction is None else self.step_fraction)
        self.fine_tune()  # refuses what a run would

    def fine_tune(self) -> FineTuneConfig:
        """The run that is probed for. Its lr and epsilon are still open: ``auto`` passes every check of a range."""
        return FineTuneConfig(lr="auto", **self._shared())

    def _shared(self) -> dict[str, Any]:
        """Fields that a run has too. Its ``step_fraction`` applies at every step of the run, and is left to the run."""
        names = {one.name for one in fields(FineTuneConfig)} - {"step_fraction"}
        return {name: value for name, value in asdict(self).items() if name in names}

    def differing(self) -> dict[str, Any]:
        """Options of the run beside lr and epsilon that differ from its defaults; model, task and method in any case."""
        always, never, default = {"model", "task", "method"}, {"out", "overwrite", "progress"}, FineTuneConfig()
        return {
            name: value
            for name, value in self._shared().items()
            if name not in never and (name in always or value != getattr(default, name))
        }


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
    kind = None if config.method in baseline_names() else method_class(config.method)
    if kind is None or not issubclass(kind, Method):
        raise ValueError(f"method {config.method!r} has no directions: lr-probe serves zeroth-order methods only")
    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    context = prepare_fine_tuning(config.fine_tune(), model, tokenizer)
    theta, method, closures = context.optimizer.theta, context.optimizer.method, context.closures
    assert isinstance(method, Method), "the class was checked above"

    def batches(step: int, number: int) -> Closure:
        return closures.further(step, number - 1) if number else closures.at(step)

    with progress_bar(f"{config.task} {config.method}", pairs(config), visible=config.progress) as advance:
        found = probe(theta, method, batches, config, advance=advance)
    advice = found.advice
    summary = {
        "task": config.task,
        "method": config.method,
        **{name: value for name, value in asdict(advice).items() if name != "figures"},
        "error": advice.figures.error,
        "passes": found.passes,
        "reasons": maths.reasons(advice, found.sweep.epsilons.tolist(), len(found.chosen.center)),
        "command": command(advice, config),
        "config": asdict(config),
    }
    folder.create()
    write_json(folder.path / "probe.json", record(found, config))
    draw(folder.path / "probe.png", found)
    folder.finish(summary)
    _print(found, config, summary)
    return summary


Batches: TypeAlias = Callable[[int, int], Closure]
"""``batches(step, number)``: the loss on the batch of a step (number 0), or on another batch of the same step (1)."""


@dataclass(frozen=True)
class ProbeResult:
    """The losses measured, and the advice that follows from them."""

    sweep: LineLosses
    """Along the first directions at every epsilon."""
    chosen: LineLosses
    """Along all directions at the epsilon chosen."""
    again: Values
    """Slopes along the same directions on other batches, [directions]."""
    figures: tuple[Exactness, ...]
    """By epsilon."""
    dropped: tuple[float, ...]
    """Epsilons at which a loss was not finite, and all larger ones."""
    passes: int
    """Forward passes spent."""
    advice: Advice


def probe(
    theta: PerturbedParameters,
    method: Method[Any],
    batches: Batches,
    config: ProbeConfig,
    resolution: float = CurvatureLR.resolution,
    advance: Callable[[float], None] = lambda loss: None,
) -> ProbeResult:
    """Evaluate the losses and advise. Afterwards theta holds what it held, bit for bit.

    Args:
        batches: the losses to evaluate; see :data:`Batches`.
        config: of which probes, sweep, epsilons, step_fraction and seed are read.
        resolution: as in :class:`l2l.optim.CurvatureLR`.
        advance: called with a loss after each pair of losses: ``pairs(config)`` times, fewer where epsilons are dropped.

    Raises:
        ValueError: the loss does not depend on theta.
        FloatingPointError: a loss is not finite at theta, or at all but a few epsilons.
    """
    prober = _Prober(theta, method, batches, config.seed, advance)
    with restored(theta):
        losses = prober.sweep(config.sweep, sorted(config.epsilons))
        figures = maths.exactness(losses)
        index = maths.choose_epsilon(figures)
        chosen, again = prober.extend(losses.at(index), config.probes)
    noise = maths.slope_noise(chosen.slopes[:, 0], again)
    advice = maths.advise(chosen, noise, figures[index], config.step_fraction, resolution)
    dropped = tuple(sorted(set(config.epsilons) - set(losses.epsilons.tolist())))
    return ProbeResult(losses, chosen, again, tuple(figures), dropped, prober.passes, advice)


def pairs(config: ProbeConfig) -> int:
    """Pairs L+, L- that :func:`probe` evaluates: the length of the progress bar."""
    return config.sweep * len(config.epsilons) + (config.probes - config.sweep) + config.probes


@contextmanager
def restored(theta: PerturbedParameters) -> Iterator[None]:
    """Inside, theta may be perturbed; afterwards its blocks hold what they held, bit for bit.

    Perturbing in place restores within a rounding, so a copy of the weights is kept meanwhile. Functional perturbation
    never changes them.
    """
    theta.restore()
    copies: dict[str, Tensor] = {}
    if theta.mode == "in_place":
        copies = {block.name: block.tensor.detach().clone() for block in theta.blocks}
    try:
        yield
    finally:
        theta.restore()
        if copies:
            theta.assign(copies)


class _Prober:
    """Evaluates losses along the directions of a method, and counts forward passes."""

    def __init__(
        self, theta: PerturbedParameters, method: Method[Any], batches: Batches, seed: int, advance: Callable[[float], None]
    ) -> None:
        self.theta, self.method, self.batches, self.seed, self.advance = theta, method, batches, seed, advance
        self.state = method.init(theta.blocks)
        self.passes = 0

    def sweep(self, count: int, epsilons: Sequence[float]) -> LineLosses:
        """Every epsilon along the first directions; from the first that overflows on, epsilons are left out."""
        usable, centers, sides = len(epsilons), [], []
        for step in range(count):
            with self.theta.step():
                direction = self._direction(step)
                centers.append(center_loss(self._closure(step, 0), self.theta, direction))
                row: list[tuple[float, float]] = []
                try:
                    for epsilon in epsilons[:usable]:
                        row.append(self._sides(step, 0, direction, epsilon))
                except FloatingPointError as error:
                    usable = len(row)
                    if usable < LEAST_EPSILONS:
                        raise FloatingPointError(f"at epsilon={epsilons[usable]:g}: try smaller epsilons; {error}") from error
                sides.append(row)
        plus, minus = np.array([row[:usable] for row in sides], dtype=np.float64).transpose(2, 0, 1)
        return LineLosses(np.array(epsilons[:usable]), plus, minus, np.array(centers))

    def extend(self, begun: LineLosses, probes: int) -> tuple[LineLosses, Values]:
        """All directions at the one epsilon of ``begun``, whose directions are the first, and the slopes of all of them on
        a second batch."""
        epsilon, rows, again = float(begun.epsilons[0]), [], []
        for step in range(probes):
            with self.theta.step():
                direction = self._direction(step)
                if step >= len(begun.center):
                    center = center_loss(self._closure(step, 0), self.theta, direction)
                    rows.append((*self._sides(step, 0, direction, epsilon), center))
                plus, minus = self._sides(step, 1, direction, epsilon)
                again.append((plus - minus) / (2 * epsilon))
        new = np.array(rows, dtype=np.float64).reshape(-1, 3)
        plus, minus = np.concatenate([begun.plus, new[:, :1]]), np.concatenate([begun.minus, new[:, 1:2]])
        return LineLosses(begun.epsilons, plus, minus, np.concatenate([begun.center, new[:, 2]])), np.array(again)

    def _direction(self, step: int) -> Direction:
        return self.method.direction(self.theta.blocks, self.state, Key(self.seed, step))

    def _closure(self, step: int, number: int) -> Closure:
        loss = self.batches(step, number)

        def counted() -> Tensor | float:
            self.passes += 1
            return loss()

        return counted

    def _sides(self, step: int, number: int, direction: Direction, epsilon: float) -> tuple[float, float]:
        seen = two_point(self._closure(step, number), self.theta, direction, epsilon)
        self.advance(seen.loss)
        return seen.losses[0], seen.losses[1]


def command(advice: Advice, config: ProbeConfig) -> str:
    """The command line of the recommended run."""
    words = ["l2l", "fine-tune"]
    for name, value in config.differing().items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join([*words, "--lr", f"{advice.lr:.2g}", "--epsilon", f"{advice.epsilon:.3g}"])


def record(found: ProbeResult, config: ProbeConfig) -> dict[str, Any]:
    """The content of ``probe.json``: every loss and every figure. ``home`` is the losses at theta."""

    def losses(of: LineLosses) -> dict[str, Any]:
        arrays = {"epsilons": of.epsilons, "plus": of.plus, "minus": of.minus, "home": of.center}
        return {name: array.tolist() for name, array in arrays.items()}

    return {
        "advice": asdict(found.advice),
        "epsilons": [asdict(one) | {"error": one.error} for one in found.figures],
        "dropped_epsilons": list(found.dropped),
        "sweep": losses(found.sweep),
        "probes": losses(found.chosen) | {"slope_on_another_batch": found.again.tolist()},
        "passes": found.passes,
        "config": asdict(config),
    }


def _print(found: ProbeResult, config: ProbeConfig, summary: dict[str, Any]) -> None:
    """The table of epsilons, the advice, its reasons and the line to run next."""
    rows = [
        {
            "epsilon": f"{one.epsilon:g}{' *' if one.epsilon == found.advice.epsilon else ''}",
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
    names = ("task", "method", "lr", "epsilon", "step_fraction", "curvature", "lr_best", "lr_highest", "passes")
    print_table("advice", [{name: summary[name] for name in names}])
    print("\n".join([*summary["reasons"], "", summary["command"]]))


def draw(target: Path, found: ProbeResult) -> Path:
    """``probe.png``: slope, curvature and their errors against epsilon, and the expected change of the loss against lr."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epsilons, advice = found.sweep.epsilons, found.advice
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    try:
        titles = "slope along u (L+ - L-) / 2 epsilon", "curvature along u (L+ + L- - 2 L0) / epsilon²"
        for axis, title, values in zip(axes[0], titles, (found.sweep.slopes, found.sweep.curvatures), strict=True):
            for number, row in enumerate(values):
                axis.plot(epsilons, row, marker="o", markersize=3, linewidth=1, label=f"direction {number}")
            # The scale is that of the epsilon chosen: rounding at the smallest may be larger by far.
            nearby = values[:, int(np.argmin(np.abs(epsilons - advice.epsilon)))]
            reach = 3 * float(np.abs(nearby).max()) or 1.0
            low, high = (float(np.clip(limit, -reach, reach)) for limit in (values.min(), values.max()))
            room = 0.05 * (high - low) or reach
            axis.set(title=title, ylim=(low - room, high + room))
        errors, change = axes[1]
        names = ("slope_rounding", "slope_truncation", "curvature_rounding", "curvature_truncation", "error")
        for name in names:
            style = {"color": "black", "linewidth": 2} if name == "error" else {"linewidth": 1}
            label = "together" if name == "error" else name.replace("_", ", ")
            errors.plot(epsilons, [max(getattr(one, name), 1e-12) for one in found.figures], label=label, **style)
        errors.set(title="relative error", yscale="log")
        for axis in (*axes[0], errors):
            axis.axvline(advice.epsilon, color="black", linestyle="--", linewidth=1, label="epsilon chosen")
            axis.set(xscale="log", xlabel="epsilon")
        change.axvline(advice.lr, color="black", linestyle="--", linewidth=1, label="lr chosen")
        if advice.lr_best:
            rates = np.linspace(0, 1.1 * max(advice.lr_highest, advice.lr), 100).tolist()
            change.plot(rates, [maths.expected_change(advice, lr) for lr in rates], label="expected change")
            change.axvline(advice.lr_highest, color="tab:red", linestyle=":", label="expected to lose above", linewidth=1)
        change.axhline(0, color="grey", linewidth=0.8)
        change.set(title="expected change of the loss in a step (the best is -1)", xlabel="lr")
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8)
        return write_whole(target, lambda path: figure.savefig(path, dpi=120, format="png"))
    finally:
        pyplot.close(figure)
