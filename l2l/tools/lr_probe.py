"""What the learning-rate finder is told: the fields of ``l2l lr-probe`` and of its YAML.

From what probes saw to what to run with: lr and epsilon, how far lr may go, and why.

The probes themselves: L+, L0 and L- along random directions on training batches. Theta is back, bit for bit.

``probe.png``: slope, curvature and their errors against epsilon, and what a step is expected to gain against lr.

``l2l lr-probe``: probe a model on a task as a run would see it, advise, and write down why.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev
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
from l2l.optim import CurvatureLR, CurvatureLRState, curvature, learning_rate
from l2l.params import Direction, PerturbedParameters
from l2l.report.console import print_table, progress_bar
from l2l.report.files import write_json, write_whole
from l2l.report.run_directory import RunDirectory
from l2l.tools.lr_probe_maths import Exactness, Looks, SlopeNoise, Values, choose_epsilon, exactness, slope_noise
from l2l.train.baselines import baseline_names
from l2l.train.config import FineTuneConfig, PerturbMode
from l2l.train.trainer import RunContext, prepare_fine_tuning

EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LEAST_EPSILONS = 3
"""Fewer do not tell rounding from truncation."""


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
        check_plan(self.probes, self.sweep, self.epsilons)
        check_positive(step_fraction=1.0 if self.step_fraction is None else self.step_fraction)
        self.fine_tune()  # refuses what a run would

    def fine_tune(self) -> FineTuneConfig:
        """The run that is probed for. Its lr and epsilon are still open: ``auto`` is what no range speaks against."""
        return FineTuneConfig(lr="auto", **self._shared())

    def _shared(self) -> dict[str, Any]:
        """Fields that a run has as well; its ``beta`` is another matter."""
        names = {one.name for one in fields(FineTuneConfig)} - {"step_fraction"}
        return {name: value for name, value in asdict(self).items() if name in names}

    def differing(self) -> dict[str, Any]:
        """What a run has to be told beside lr and epsilon: what differs from its defaults."""
        default = FineTuneConfig()
        quiet = {"out", "overwrite", "progress"}
        told = {name: value for name, value in self._shared().items() if name not in quiet}
        same = {"model", "task", "method"}  # said in any case: the line is to be read by people
        return {name: value for name, value in told.items() if name in same or value != getattr(default, name)}


def check_plan(probes: int, sweep: int, epsilons: Sequence[float]) -> None:
    """Refuse a plan whose figures would mean nothing.

    Raises:
        ValueError: too few probes or epsilons, an epsilon that is not positive or comes twice, a longer sweep than probes.
    """
    if probes < 2:
        raise ValueError(f"probes={probes} must be at least 2: one direction shows no spread")
    if sweep > probes:
        raise ValueError(f"sweep={sweep} must be at most probes={probes}: it takes the first of them")
    if len(set(epsilons)) != len(epsilons) or len(epsilons) < LEAST_EPSILONS:
        raise ValueError(f"epsilons={list(epsilons)} must be at least {LEAST_EPSILONS} different numbers")
    for epsilon in epsilons:
        check_positive(epsilons=epsilon)


BETAS = 0.1, 0.2
"""Shares of the step to the bottom of the parabola that serve whatever the model, task and method."""


@dataclass(frozen=True)
class Advice:
    """What to run with, and what speaks for it."""

    lr: float
    """beta / mean curvature."""
    epsilon: float
    beta: float
    curvature: float
    """Mean of |u^T H u| over the directions."""
    curvature_spread: float
    """Its standard deviation over the directions."""
    ridges: float
    """Share of the directions along which the loss is curved downwards."""
    signal_share: float
    """Share of the squared slope that another batch repeats."""
    signal_uncertainty: float
    """Its standard error."""
    lr_best: float
    """lr at which a step is expected to gain most, where theta stands: signal share / mean curvature."""
    lr_highest: float
    """lr above which a step is expected to lose, where theta stands: twice that."""
    figures: Exactness
    """What epsilon makes of slope and curvature."""


def choose_beta(noise: SlopeNoise) -> float:
    """Half of the signal's share, within :data:`BETAS`: a step is then expected to gain three quarters of the most."""
    low, high = BETAS
    return min(high, max(low, noise.share / 2))


def advise(
    looks: Looks,
    noise: SlopeNoise,
    figures: Exactness,
    beta: float | None = None,
    resolution: float = CurvatureLR.resolution,
) -> Advice:
    """Recommend lr and epsilon.

    Args:
        looks: at one epsilon, the one chosen, along every direction.
        beta: None: by :func:`choose_beta`.
        resolution: as in :class:`l2l.optim.StepControl`: the relative error that a loss may have.
    """
    epsilon = float(looks.epsilons[0])
    triples = zip(looks.plus[:, 0].tolist(), looks.minus[:, 0].tolist(), looks.home.tolist(), strict=True)
    sizes = [curvature(*triple, epsilon, resolution) for triple in triples]
    share = beta or choose_beta(noise)
    mean = CurvatureLRState(fmean(sizes), 1.0)
    return Advice(
        lr=learning_rate(share, mean),
        epsilon=epsilon,
        beta=share,
        curvature=mean.average,
        curvature_spread=stdev(sizes) if len(sizes) > 1 else 0.0,
        ridges=float(np.mean(looks.curvatures[:, 0] < 0)),
        signal_share=noise.share,
        signal_uncertainty=noise.uncertainty,
        lr_best=learning_rate(noise.share, mean),
        lr_highest=learning_rate(2 * noise.share, mean),
        figures=figures,
    )


def expected_change(advice: Advice, lr: float) -> float:
    """What a step with ``lr`` is expected to change the loss by, in units of signal^2 / (total * curvature) / 2.

    Along u the loss moves by -lr g G + lr^2 g^2 c / 2 with g the slope of the batch, G that of all batches, c the
    curvature; the mean is -lr signal + lr^2 total c / 2. The best lr gives -1, 0 and ``lr_highest`` give 0.
    """
    if not advice.lr_best:
        return float("inf")
    ratio = lr / advice.lr_best
    return ratio**2 - 2 * ratio


def reasons(advice: Advice, tried: Sequence[float], directions: int) -> list[str]:
    """Two sentences on why, and one for each thing to beware of."""
    one = advice.figures
    found = [
        f"epsilon {advice.epsilon:.3g}: rounding, about {one.loss_rounding:.1e} of a loss, blurs the slope there by "
        f"{_percent(one.slope_rounding)} and the curvature by {_percent(one.curvature_rounding)}, while truncation bends "
        f"them by {_percent(one.slope_truncation)} and {_percent(one.curvature_truncation)}.",
        f"lr {advice.lr:.3g}: beta {advice.beta:.3g} over the mean curvature {advice.curvature:.4g} (standard deviation "
        f"{advice.curvature_spread:.2g} over {directions} directions); {advice.signal_share:.0%} +- "
        f"{advice.signal_uncertainty:.0%} of the squared slope is what another batch repeats, so a step is expected to "
        f"gain most at lr {advice.lr_best:.2g} and to lose above {advice.lr_highest:.2g}.",
    ]
    return found + cautions(advice, tried)


def cautions(advice: Advice, tried: Sequence[float]) -> list[str]:
    """One sentence for each thing to beware of."""
    found, error = [], advice.figures.error
    if advice.signal_share < 2 * advice.signal_uncertainty:
        found.append("How far lr may go is not known: the signal drowns in noise; use more probes or larger batches.")
    elif advice.lr > advice.lr_highest:
        found.append(
            "Batches are so noisy that this lr is expected to lose at first: use larger batches, or a lower lr."
        )
    if error > 0.5 and advice.epsilon == max(tried):
        found.append(f"Slope and curvature are off by {error:.0%} even here: try larger epsilons.")
    elif error > 0.5:
        found.append(f"Slope and curvature are off by {error:.0%} even here: use float32, or trust neither too far.")
    if advice.ridges > 0.5:
        found.append(
            f"Along {advice.ridges:.0%} of the directions the loss curves downwards: probe again after some steps."
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


Batches: TypeAlias = Callable[[int, int], Closure]
"""``batches(step, number)``: the loss on the batch of a step (number 0), or on another batch of the same step (1)."""


@dataclass(frozen=True)
class ProbeResult:
    """What the probes saw, and the advice they give."""

    sweep: Looks
    """Along the first directions at every epsilon."""
    chosen: Looks
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


@contextmanager
def restored(theta: PerturbedParameters) -> Iterator[None]:
    """Inside, theta may be walked; afterwards its blocks hold what they held, bit for bit.

    Walking in place comes back within a rounding, so the weights are kept meanwhile: once more their memory. Walking
    exactly never touches them.
    """
    theta.restore()
    kept: dict[str, Tensor] = {}
    if theta.mode == "in_place":
        kept = {block.name: block.tensor.detach().clone() for block in theta.blocks}
    try:
        yield
    finally:
        theta.restore()
        if kept:
            theta.assign(kept)


class _Prober:
    """Looks along the directions of a method where theta stands, and counts what that costs."""

    def __init__(
        self,
        theta: PerturbedParameters,
        method: Method[Any],
        batches: Batches,
        seed: int,
        advance: Callable[[float], None],
    ) -> None:
        self.theta, self.method, self.batches, self.seed, self.advance = theta, method, batches, seed, advance
        self.state = method.init(theta.blocks)
        self.passes = 0

    def direction(self, step: int) -> Direction:
        return self.method.direction(self.theta.blocks, self.state, Key(self.seed, step))

    def _closure(self, step: int, number: int) -> Closure:
        own = self.batches(step, number)

        def counted() -> Tensor | float:
            self.passes += 1
            return own()

        return counted

    def home(self, step: int, direction: Direction) -> float:
        return center_loss(self._closure(step, 0), self.theta, direction)

    def sides(self, step: int, number: int, direction: Direction, epsilon: float) -> tuple[float, float]:
        seen = two_point(self._closure(step, number), self.theta, direction, epsilon)
        self.advance(seen.loss)
        return seen.losses[0], seen.losses[1]


def measure(
    theta: PerturbedParameters,
    method: Method[Any],
    batches: Batches,
    probes: int,
    sweep: int,
    epsilons: Sequence[float],
    seed: int = 0,
    beta: float | None = None,
    resolution: float = CurvatureLR.resolution,
    advance: Callable[[float], None] = lambda loss: None,
) -> ProbeResult:
    """Probe the loss and advise. Theta stands where it stood afterwards, bit for bit.

    Args:
        batches: the losses to look at; see :data:`Batches`.
        probes, sweep, epsilons, beta: as in :class:`l2l.tools.lr_probe.ProbeConfig`.
        resolution: as in :class:`l2l.optim.StepControl`.
        advance: called with a loss after each pair of looks: ``pairs(...)`` times, fewer where epsilons are dropped.

    Raises:
        ValueError: a plan that means nothing, or a loss that does not depend on theta.
        FloatingPointError: a loss is not finite where theta stands, or at all but a few epsilons.
    """
    check_plan(probes, sweep, epsilons)
    prober = _Prober(theta, method, batches, seed, advance)
    with restored(theta):
        looks = _sweep(prober, sweep, sorted(epsilons))
        figures = exactness(looks)
        index = choose_epsilon(figures)
        chosen, again = _probe(prober, looks.at(index), probes)
    noise = slope_noise(chosen.slopes[:, 0], again)
    advice = advise(chosen, noise, figures[index], beta, resolution)
    dropped = tuple(sorted(set(epsilons) - set(looks.epsilons.tolist())))
    return ProbeResult(looks, chosen, again, tuple(figures), dropped, prober.passes, advice)


def pairs(probes: int, sweep: int, epsilons: int) -> int:
    """Pairs of looks that :func:`measure` takes: what a progress bar counts."""
    return sweep * epsilons + (probes - sweep) + probes


def _sweep(prober: _Prober, count: int, epsilons: Sequence[float]) -> Looks:
    """Every epsilon along the first directions; from the first that overflows on, epsilons are left out."""
    usable, homes, sides = len(epsilons), [], []
    for step in range(count):
        with prober.theta.step():
            direction = prober.direction(step)
            homes.append(prober.home(step, direction))
            row: list[tuple[float, float]] = []
            try:
                for epsilon in epsilons[:usable]:
                    row.append(prober.sides(step, 0, direction, epsilon))
            except FloatingPointError as error:
                usable = len(row)
                if usable < LEAST_EPSILONS:
                    raise FloatingPointError(
                        f"at epsilon={epsilons[usable]:g}: try smaller epsilons; {error}"
                    ) from error
            sides.append(row)
    seen = np.array([row[:usable] for row in sides], dtype=np.float64)
    return Looks(np.array(epsilons[:usable]), seen[:, :, 0], seen[:, :, 1], np.array(homes))


def _probe(prober: _Prober, begun: Looks, probes: int) -> tuple[Looks, Values]:
    """All directions at one epsilon, those of the sweep taken over, and their slopes on a second batch."""
    epsilon, done = float(begun.epsilons[0]), len(begun.home)
    rows, again = [], []
    for step in range(probes):
        with prober.theta.step():
            direction = prober.direction(step)
            if step >= done:
                home = prober.home(step, direction)
                rows.append((*prober.sides(step, 0, direction, epsilon), home))
            plus, minus = prober.sides(step, 1, direction, epsilon)
            again.append((plus - minus) / (2 * epsilon))
    new = np.array(rows, dtype=np.float64).reshape(-1, 3)
    sides = [np.concatenate([old, new[:, i : i + 1]]) for i, old in enumerate((begun.plus, begun.minus))]
    return Looks(begun.epsilons, sides[0], sides[1], np.concatenate([begun.home, new[:, 2]])), np.array(again)


def draw(target: Path, found: ProbeResult) -> Path:
    """Four panels; what was chosen is marked. Written whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    try:
        _against_epsilon(axes[0][0], found, found.sweep.slopes, "slope along u (L+ - L-) / 2 epsilon")
        _against_epsilon(axes[0][1], found, found.sweep.curvatures, "curvature along u (L+ + L- - 2 L0) / epsilon²")
        _errors(axes[1][0], found)
        _gain(axes[1][1], found)
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8)
        return write_whole(target, lambda path: figure.savefig(path, dpi=120, format="png"))
    finally:
        pyplot.close(figure)


def _mark(axis: Any, found: ProbeResult) -> None:
    axis.axvline(found.advice.epsilon, color="black", linestyle="--", linewidth=1, label="epsilon chosen")
    axis.set(xscale="log", xlabel="epsilon")


def _against_epsilon(axis: Any, found: ProbeResult, values: Any, title: str) -> None:
    """One line per direction of the sweep. The scale is that of what is trusted: rounding may be larger by far."""
    for number, row in enumerate(values):
        axis.plot(found.sweep.epsilons, row, marker="o", markersize=3, linewidth=1, label=f"direction {number}")
    _mark(axis, found)
    nearby = values[:, int(np.argmin(np.abs(found.sweep.epsilons - found.advice.epsilon)))]
    reach = 3 * float(np.abs(nearby).max()) or 1.0
    inside = [float(np.clip(limit, -reach, reach)) for limit in (values.min(), values.max())]
    room = 0.05 * (inside[1] - inside[0]) or reach
    axis.set(title=title, ylim=(inside[0] - room, inside[1] + room))


def _errors(axis: Any, found: ProbeResult) -> None:
    names = ("slope_rounding", "slope_truncation", "curvature_rounding", "curvature_truncation", "error")
    for name in names:
        values = [max(getattr(one, name), 1e-12) for one in found.figures]
        style = {"color": "black", "linewidth": 2} if name == "error" else {"linewidth": 1}
        label = "together" if name == "error" else name.replace("_", ", ")
        axis.plot(found.sweep.epsilons, values, label=label, **style)
    _mark(axis, found)
    axis.set(title="relative error", yscale="log")


def _gain(axis: Any, found: ProbeResult) -> None:
    """The expected parabola of a step, in shares of the most that one can gain."""
    advice = found.advice
    axis.axvline(advice.lr, color="black", linestyle="--", linewidth=1, label="lr chosen")
    if advice.lr_best:
        rates = np.linspace(0, max(1.1 * advice.lr_highest, 1.1 * advice.lr), 100)
        axis.plot(rates, [expected_change(advice, lr) for lr in rates.tolist()], label="expected change")
        axis.axvline(advice.lr_highest, color="tab:red", linestyle=":", linewidth=1, label="expected to lose above")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(title="expected change of the loss in a step (the best is -1)", xlabel="lr")


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
    """Probe what :func:`l2l.train.trainer.prepare` made. Nothing is written; the weights are the same bits afterwards.

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
    names = ("task", "method", "lr", "epsilon", "step_fraction", "curvature", "lr_best", "lr_highest", "passes")
    print_table("advice", [{name: summary[name] for name in names}])
    for sentence in summary["reasons"]:
        print(sentence)
    print(f"\n{summary['command']}")
