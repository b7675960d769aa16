"""``l2l lr-probe``: recommend a learning rate and an epsilon for a run from losses along a few dozen random directions.

Losses L+, L0 and L- are evaluated on training batches as the run would evaluate them; nothing is trained, and the weights
keep every bit. Along u a loss is L(e) = L0 + g e + c e^2 / 2 + ..., each evaluation with a rounding error. Estimates of the
slope g and the curvature c from L+ and L- then have a rounding error, which falls with e, and a truncation error (the next
terms), which grows as e^2. Both are estimated from losses at several epsilons along the same directions.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from l2l.arguments import Arguments
from l2l.estimators import Closure, ClosureValue, center_loss, two_point
from l2l.methods import method_class
from l2l.methods.base import Method, check_counts, check_positive
from l2l.models.kinds import Head
from l2l.models.load import Quantize
from l2l.models.schemes import Scheme
from l2l.noise import Key
from l2l.optim import CurvatureLR, CurvatureLRState, curvature, learning_rate
from l2l.params import Direction, PerturbedParameters
from l2l.report.console import print_table, progress_bar
from l2l.report.run_directory import RunDirectory, write_json, write_whole
from l2l.train.baselines import baseline_names
from l2l.train.config import FineTuneConfig, PerturbMode
from l2l.train.trainer import prepare_fine_tuning

Values = NDArray[np.float64]

LEAST_EPSILONS = 3
"""Fewer epsilons do not tell rounding from truncation."""
TOLERANCE = 0.05
"""The relative error of slope and curvature together up to which an epsilon serves: far below the noise of batches."""
SLACK = 1.5
"""Where no epsilon is that exact: how far above the least error one may lie and still serve."""
FLAT = 2.0
"""Remainders within this factor of the least are rounding; above it truncation has a part in them."""
STANDS_OUT = 2.0
"""A change that is this many times what rounding causes is real."""
STEP_FRACTIONS = 0.1, 0.2
"""Least and largest recommended share of the step to the minimum of the parabola: they serve any model, task and method."""
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class ProbeConfig(Arguments):
    """Recommend a learning rate and an epsilon from a few dozen probes of the loss; nothing is trained."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, a gguf file, or an id of the hub (of a gguf file ``owner/name/file.gguf``)."""
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
        super().__post_init__()
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
    config: ProbeConfig, model: "PreTrainedModel | None" = None, tokenizer: "PreTrainedTokenizerBase | None" = None
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
        "reasons": reasons(advice, found.sweep.epsilons.tolist(), len(found.chosen.center)),
        "command": command(advice, config),
        "config": asdict(config),
    }
    folder.create()
    write_json(folder.path / "probe.json", record(found, config))
    draw(folder.path / "probe.png", found)
    folder.finish(summary)
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
    return summary


# From losses to lr and epsilon: functions of arrays.


@dataclass(frozen=True)
class LineLosses:
    """Losses along some directions, each direction on a batch of its own, at the same epsilons."""

    epsilons: Values
    """[epsilons], rising."""
    plus: Values
    """Losses at theta + epsilon u, [directions, epsilons]."""
    minus: Values
    """Losses at theta - epsilon u, [directions, epsilons]."""
    center: Values
    """Losses at theta, [directions]."""

    @property
    def slopes(self) -> Values:
        """(L+ - L-) / (2 epsilon), [directions, epsilons]."""
        return (self.plus - self.minus) / (2 * self.epsilons)

    @property
    def curvatures(self) -> Values:
        """u^T H u = (L+ + L- - 2 L0) / epsilon^2 with its sign, [directions, epsilons]."""
        second = (self.plus - self.center[:, None]) + (self.minus - self.center[:, None])
        return second / self.epsilons / self.epsilons


@dataclass(frozen=True)
class Exactness:
    """Slope and curvature at one epsilon, and their errors relative to the slopes' root mean square and to the mean size of
    the curvatures."""

    epsilon: float
    slope: float
    """Root mean square over the directions."""
    curvature: float
    """Mean over the directions, with its sign."""
    slope_rounding: float
    slope_truncation: float
    curvature_rounding: float
    curvature_truncation: float
    loss_rounding: float
    """Standard deviation of the rounding error of one loss: L+ + L- - 2 L0 has six times its variance."""

    @property
    def error(self) -> float:
        """The four errors together."""
        parts = (self.slope_rounding, self.slope_truncation, self.curvature_rounding, self.curvature_truncation)
        return float(np.sqrt(sum(part**2 for part in parts)))


@dataclass(frozen=True)
class SlopeNoise:
    """How much of a slope another batch reproduces."""

    signal: float
    """Mean square of the slope that all batches share: E[<grad L, u>^2]."""
    noise: float
    """Mean square of what one batch adds."""
    uncertainty: float
    """Standard error of ``share``."""

    @property
    def share(self) -> float:
        """signal / (signal + noise), at least 0."""
        total = self.signal + self.noise
        return max(0.0, self.signal / total) if total else 0.0


@dataclass(frozen=True)
class Advice:
    """Recommended lr and epsilon, and the figures they rest on."""

    lr: float
    epsilon: float
    step_fraction: float
    curvature: float
    """Mean of |u^T H u| over the directions; ``lr`` is ``step_fraction`` divided by it."""
    curvature_spread: float
    """Its standard deviation over the directions."""
    ridges: float
    """Share of the directions with negative curvature."""
    signal_share: float
    """Share of the squared slope that another batch reproduces."""
    signal_uncertainty: float
    """Its standard error."""
    lr_best: float
    """lr with the largest expected decrease in one step from the present weights: signal share / mean curvature."""
    lr_highest: float
    """lr above which one step from the present weights is expected to increase the loss: twice that."""
    figures: Exactness
    """At this epsilon."""


def exactness(losses: LineLosses) -> list[Exactness]:
    """Slope, curvature and their errors by epsilon.

    Raises:
        ValueError: there are fewer than three epsilons, or slopes or curvatures are 0 throughout.
    """
    epsilons = losses.epsilons
    slope, mean_curvature = np.sqrt((losses.slopes**2).mean(0)), losses.curvatures.mean(0)
    columns, noise = [slope, mean_curvature], np.zeros(len(epsilons))
    sizes = (losses.slopes, slope), (losses.curvatures, np.abs(losses.curvatures).mean(0))
    for power, (values, size) in enumerate(sizes, start=1):
        variance = rounding(values, power, epsilons)
        noise, bias = np.sqrt(variance), truncation(values, variance, epsilons)
        most_exact = float(size[np.argmin(variance + bias**2)])
        columns += [noise / most_exact, bias / most_exact]
    columns.append(noise * epsilons**2 / 6**0.5)
    return [Exactness(*map(float, row)) for row in zip(epsilons, *columns, strict=True)]


def rounding(values: Values, power: int, epsilons: Values) -> Values:
    """Variance of the rounding error in slopes (power 1) or curvatures (power 2) [directions, epsilons], [epsilons].

    Values at the next two larger epsilons, extended along a line in epsilon^2, predict the one at an epsilon. The
    remainder times epsilon^power is rounding of L+ - L- or of L+ + L- - 2 L0 where epsilon is small, and truncation where
    it is large. So each epsilon takes the mean of those remainders at it and below it that are near their least. Where
    values are exactly 0, on a grid of losses too coarse for their epsilons, they carry no information.

    Raises:
        ValueError: there are fewer than three epsilons, or all values are 0.
    """
    if len(epsilons) < LEAST_EPSILONS:
        raise ValueError(f"{len(epsilons)} epsilons are too few to tell rounding from truncation: try at least 3")
    squares, scatter = epsilons**2, []
    for k in range(len(epsilons) - 2):
        informative = (values[:, k] != 0) | (values[:, k + 1] != 0)
        step = (squares[k + 1] - squares[k]) / (squares[k + 2] - squares[k + 1])
        predicted = (1 + step) * values[:, k + 1] - step * values[:, k + 2]
        shares = np.array([1, (1 + step) * (epsilons[k] / epsilons[k + 1]) ** power])
        rest = epsilons[k] ** power * (values[:, k] - predicted)[informative]
        scatter.append(float((rest**2).mean() / (shares**2).sum()) if informative.any() else None)
    first = next((value for value in scatter if value is not None), None)
    if first is None:
        raise ValueError("the loss has no slope or no curvature along the directions tried: try larger epsilons")
    variances = []
    for k in range(len(epsilons)):
        known = [value for value in scatter[: k + 1] if value is not None] or [first]
        variances.append(float(np.mean([value for value in known if value <= FLAT**2 * min(known)])))
    return np.array(variances) / epsilons ** (2 * power)


def truncation(values: Values, noise: Values, epsilons: Values) -> Values:
    """Root mean square of the part of ``values`` [directions, epsilons] that grows as epsilon^2, [epsilons].

    It is estimated from the change between neighbouring epsilons. Where that does not stand out from rounding, the next
    larger pair whose change does gives the amount per epsilon^2.

    Args:
        noise: variance of rounding in ``values``, [epsilons].
    """
    squares, rounding = epsilons**2, noise[1:] + noise[:-1]
    changes = ((values[:, 1:] - values[:, :-1]) ** 2).mean(0)
    slopes = np.sqrt(np.maximum(changes - rounding, 0)) / (squares[1:] - squares[:-1])
    amounts, last = np.zeros(len(epsilons)), 0.0
    for pair in reversed(range(len(slopes))):
        last = float(slopes[pair]) if changes[pair] > STANDS_OUT**2 * rounding[pair] else last
        amounts[pair + 1] = last
    amounts[0] = last
    return amounts * squares


def choose_epsilon(found: Sequence[Exactness]) -> int:
    """Index of the epsilon to use: the middle of those that serve, since slopes fall and curvatures rise during a run.

    An epsilon serves whose error is at most :data:`TOLERANCE`, or :data:`SLACK` times the least error if that is more.
    Of an even number in the middle, the smaller.
    """
    errors = [one.error for one in found]
    limit = max(TOLERANCE, SLACK * min(errors))
    serving = [index for index, error in enumerate(errors) if error <= limit]
    return serving[(len(serving) - 1) // 2]


def slope_noise(first: Values, second: Values) -> SlopeNoise:
    """Signal and noise from the slopes of two batches along the same directions, [directions] each.

    The product of both has the signal's mean, since their noises are independent; it can be negative.
    """
    products = first * second
    total, signal = float(((first**2 + second**2) / 2).mean()), float(products.mean())
    spread = float(products.std(ddof=1)) / np.sqrt(len(products)) if len(products) > 1 else float("inf")
    return SlopeNoise(signal, total - signal, float(spread / total) if total else 0.0)


def choose_step_fraction(noise: SlopeNoise) -> float:
    """Half of the signal's share, within :data:`STEP_FRACTIONS`: its expected gain is three quarters of the largest."""
    low, high = STEP_FRACTIONS
    return min(high, max(low, noise.share / 2))


def advise(
    losses: LineLosses,
    noise: SlopeNoise,
    figures: Exactness,
    step_fraction: float | None = None,
    resolution: float = CurvatureLR.resolution,
) -> Advice:
    """Recommend lr and epsilon.

    Args:
        losses: at one epsilon, the one chosen, along every direction.
        step_fraction: None: by :func:`choose_step_fraction`.
        resolution: as in :class:`l2l.optim.CurvatureLR`: the relative error that a loss may have.
    """
    epsilon = float(losses.epsilons[0])
    triples = zip(losses.plus[:, 0].tolist(), losses.minus[:, 0].tolist(), losses.center.tolist(), strict=True)
    sizes = [curvature(*triple, epsilon, resolution) for triple in triples]
    share = step_fraction or choose_step_fraction(noise)
    mean = CurvatureLRState(fmean(sizes), 1.0)
    return Advice(
        lr=learning_rate(share, mean),
        epsilon=epsilon,
        step_fraction=share,
        curvature=mean.average,
        curvature_spread=stdev(sizes) if len(sizes) > 1 else 0.0,
        ridges=float(np.mean(losses.curvatures[:, 0] < 0)),
        signal_share=noise.share,
        signal_uncertainty=noise.uncertainty,
        lr_best=learning_rate(noise.share, mean),
        lr_highest=learning_rate(2 * noise.share, mean),
        figures=figures,
    )


def expected_change(advice: Advice, lr: float) -> float:
    """Expected change of the loss in a step with ``lr``, in units of signal^2 / (total * curvature) / 2.

    Along u the loss changes by -lr g G + lr^2 g^2 c / 2 with g the slope of the batch, G that of all batches, c the
    curvature; the mean is -lr signal + lr^2 total c / 2. The best lr gives -1, 0 and ``lr_highest`` give 0.
    """
    if not advice.lr_best:
        return float("inf")
    ratio = lr / advice.lr_best
    return ratio**2 - 2 * ratio


def reasons(advice: Advice, tried: Sequence[float], directions: int) -> list[str]:
    """Two sentences on why, and one for each caution.

    Args:
        tried: epsilons.
        directions: number of directions that the figures are means over.
    """

    def percent(share: float) -> str:
        return f"{100 * share:.2g} %"

    one, error = advice.figures, advice.figures.error
    found = [
        f"epsilon {advice.epsilon:.3g}: rounding, about {one.loss_rounding:.1e} of a loss, blurs the slope there by "
        f"{percent(one.slope_rounding)} and the curvature by {percent(one.curvature_rounding)}, while truncation bends "
        f"them by {percent(one.slope_truncation)} and {percent(one.curvature_truncation)}.",
        f"lr {advice.lr:.3g}: step_fraction {advice.step_fraction:.3g} over the mean curvature {advice.curvature:.4g} "
        f"(standard deviation {advice.curvature_spread:.2g} over {directions} directions); {advice.signal_share:.0%} +- "
        f"{advice.signal_uncertainty:.0%} of the squared slope is what another batch repeats, so a step is expected to "
        f"gain most at lr {advice.lr_best:.2g} and to lose above {advice.lr_highest:.2g}.",
    ]
    if advice.signal_share < 2 * advice.signal_uncertainty:
        found.append("How far lr may go is not known: the signal drowns in noise; use more probes or larger batches.")
    elif advice.lr > advice.lr_highest:
        found.append("Batches are so noisy that this lr is expected to lose at first: use larger batches, or a lower lr.")
    if error > 0.5:
        remedy = "try larger epsilons" if advice.epsilon == max(tried) else "use float32, or trust neither too far"
        found.append(f"Slope and curvature are off by {error:.0%} even here: {remedy}.")
    if advice.ridges > 0.5:
        found.append(f"Along {advice.ridges:.0%} of the directions the loss curves downwards: probe again after some steps.")
    return found


# Losses along directions.


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
    state, passes = method.init(theta.blocks), 0

    def closure(step: int, number: int) -> Closure:
        loss = batches(step, number)

        def counted() -> ClosureValue:
            nonlocal passes
            passes += 1
            return loss()

        return counted

    def both(direction: Direction, step: int, number: int, epsilon: float) -> tuple[float, float]:
        seen = two_point(closure(step, number), theta, direction, epsilon)
        advance(seen.loss)
        return seen.losses[0], seen.losses[1]

    with restored(theta):
        # Every epsilon along the first directions; from the first that overflows on, epsilons are left out.
        epsilons, sides, centers = sorted(config.epsilons), [], []
        for step in range(config.sweep):
            with theta.step():
                direction = method.direction(theta.blocks, state, Key(config.seed, step))
                centers.append(center_loss(closure(step, 0), theta, direction))
                row: list[tuple[float, float]] = []
                try:
                    for epsilon in epsilons:
                        row.append(both(direction, step, 0, epsilon))
                except FloatingPointError as error:
                    if len(row) < LEAST_EPSILONS:
                        raise FloatingPointError(f"at epsilon={epsilons[len(row)]:g}: try smaller epsilons; {error}") from error
                    epsilons = epsilons[: len(row)]
                sides.append(row)
        plus, minus = np.array([row[: len(epsilons)] for row in sides], dtype=np.float64).transpose(2, 0, 1)
        losses = LineLosses(np.array(epsilons), plus, minus, np.array(centers))
        figures = exactness(losses)
        index = choose_epsilon(figures)
        # All directions at that epsilon, and once more on a second batch.
        epsilon, again = epsilons[index], []
        rows = [(*row[index], center) for row, center in zip(sides, centers, strict=True)]
        for step in range(config.probes):
            with theta.step():
                direction = method.direction(theta.blocks, state, Key(config.seed, step))
                if step >= config.sweep:
                    center = center_loss(closure(step, 0), theta, direction)
                    rows.append((*both(direction, step, 0, epsilon), center))
                above, below = both(direction, step, 1, epsilon)
                again.append((above - below) / (2 * epsilon))
    plus, minus, center = np.array(rows, dtype=np.float64).T
    chosen, slopes = LineLosses(np.array([epsilon]), plus[:, None], minus[:, None], center), np.array(again)
    advice = advise(chosen, slope_noise(chosen.slopes[:, 0], slopes), figures[index], config.step_fraction, resolution)
    dropped = tuple(sorted(set(config.epsilons) - set(epsilons)))
    return ProbeResult(losses, chosen, slopes, tuple(figures), dropped, passes, advice)


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


def command(advice: Advice, config: ProbeConfig) -> str:
    """The command line of the recommended run."""
    words = ["l2l", "fine-tune"]
    for name, value in config.differing().items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join([*words, "--lr", f"{advice.lr:.2g}", "--epsilon", f"{advice.epsilon:.3g}"])


def record(found: ProbeResult, config: ProbeConfig) -> dict[str, Any]:
    """The content of ``probe.json``: every loss and every figure. ``home`` is the losses at theta."""

    arrays = {"epsilons": "epsilons", "plus": "plus", "minus": "minus", "home": "center"}
    sweep, probes = (
        {name: getattr(losses, one).tolist() for name, one in arrays.items()} for losses in (found.sweep, found.chosen)
    )
    return {
        "advice": asdict(found.advice),
        "epsilons": [asdict(one) | {"error": one.error} for one in found.figures],
        "dropped_epsilons": list(found.dropped),
        "sweep": sweep,
        "probes": probes | {"slope_on_another_batch": found.again.tolist()},
        "passes": found.passes,
        "config": asdict(config),
    }


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
            change.plot(rates, [expected_change(advice, lr) for lr in rates], label="expected change")
            change.axvline(advice.lr_highest, color="tab:red", linestyle=":", label="expected to lose above", linewidth=1)
        change.axhline(0, color="grey", linewidth=0.8)
        change.set(title="expected change of the loss in a step (the best is -1)", xlabel="lr")
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8)
        return write_whole(target, lambda path: figure.savefig(path, dpi=120, format="png"))
    finally:
        pyplot.close(figure)
