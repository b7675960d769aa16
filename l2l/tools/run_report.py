"""``l2l report``: what runs of ``l2l fine-tune`` did, as one HTML page.

Curves and figures come from the files of a run. What moved, sigma and the share of the signal take the steps of the run again
from its log, without data or forward passes (:mod:`l2l.train.replay`), where its base model is on this machine; examples before
and after are evaluated where they are asked for. What cannot be known is left out with a word.
"""

import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from l2l.arguments import Arguments
from l2l.models.load import load_model, load_tokenizer, local_folder
from l2l.optim import StepReport
from l2l.params import Blocks
from l2l.report import page
from l2l.report.console import smooth
from l2l.report.page import Bars, Curve, Heat, Lines, Listing, Part, Section, Table, Text
from l2l.report.run_directory import METRICS, SUMMARY, RunDirectory, clock, read_metrics
from l2l.tasks import Row, Task, format_interval, get_task, load_splits
from l2l.tasks.evaluate import Scores, evaluate
from l2l.train import runlog
from l2l.train.config import DEV_ROWS, TEST_ROWS, FineTuneConfig
from l2l.train.replay import begin, replay, steps_to
from l2l.train.rewards import AFTER, BEFORE, REWARD
from l2l.train.trainer import COLUMNS, setup_scheme
from l2l.tuners.diagnostics import NO_LAYER, Heatmap, by_layer_and_kind, layer_and_kind

logger = logging.getLogger(__name__)

BINS = 40
"""Columns of a heat map over time."""
SMOOTHED = 1 / 40
"""Share of a run's steps over whose losses a curve takes the mean: single steps see one batch each."""
SHOWN = 5
"""Examples of each group that are shown."""
PROMPT = 300
"""Last characters of a prompt that are shown."""
MEBIBYTE = 2**20
PAGE = "docs/report.md"


@dataclass(frozen=True)
class ReportConfig(Arguments):
    """One HTML page of runs: curves, what moved, memory, examples, and how to repeat them."""

    runs: list[str]
    """Directories of ``l2l fine-tune`` (their ``--out``), finished or not."""
    out: str = "report.html"
    """The page; a file of this name is replaced."""
    weights: bool = True
    """Take the steps of the runs again to see what moved, and sigma and the share of the signal over time. It takes the memory
    of the base model and twice that of the trained weights, and a fraction of the run's time; nothing is downloaded."""
    examples: int = 0
    """Test rows to evaluate with the weights before and after each run; the page shows those of which the answer changed."""
    model: str | None = None
    """The base model of the runs, where it is no longer where they had it from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ValueError(f"no run is given: name the directory of one, as in l2l report runs/mine; see {PAGE}")
        if Path(self.out).suffix != ".html" or Path(self.out).is_dir():
            raise ValueError(f"out={self.out!r} must be a file that ends in .html: give one, as in --out report.html")
        if self.examples < 0:
            raise ValueError(f"examples={self.examples} must be a number of test rows, at least 0")
        if self.examples and not self.weights:
            raise ValueError("examples compares the weights before and after, and weights is false: leave one of them out")


@dataclass(frozen=True)
class History:
    """What the files of a run tell."""

    name: str
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    """Empty where the run has not finished."""
    rows: list[dict[str, str]]
    """Of ``metrics.csv``."""
    steps: list[dict[str, Any]]
    """Of the run log; see :func:`l2l.train.runlog.read_run_log`."""
    header: dict[str, Any]
    note: str = ""
    """Why there is no log, or no whole one."""

    def column(self, name: str, x: str = "passes") -> Curve:
        """A column of the metrics against another, in the rows that have it."""
        return [(float(row[x]), float(row[name])) for row in self.rows if row.get(name)]

    def at_seconds(self, curve: Curve) -> Curve:
        """A curve over passes as one over seconds of training, which are interpolated between the rows of the metrics."""
        passes, seconds = zip(*clock(self.folder), strict=True)
        x = np.interp([x for x, _ in curve], passes, seconds).tolist()
        return [(at, y) for at, (_, y) in zip(x, curve, strict=True)]

    @property
    def losses(self) -> Curve:
        """The objective of each step against passes: by the log, else by the rows of the metrics."""
        if not self.steps:
            return self.column("train_loss")
        finite = [point for point in runlog.step_curve(self.folder) if math.isfinite(point[1])]
        return smooth(finite, max(1, round(SMOOTHED * len(finite))))

    @property
    def dev_losses(self) -> Curve:
        """Loss on dev against passes, that of the untrained model included."""
        first = self.summary.get("initial_dev_loss")
        return [*([] if first is None else [(0.0, first)]), *self.column("dev_loss")]

    def of_steps(self, name: str) -> Curve:
        """A value of the log's steps against passes, in the steps that have it."""
        at = accumulate(step["passes"] for step in self.steps)
        return [(float(x), float(step[name])) for x, step in zip(at, self.steps, strict=True) if name in step]


def read_history(folder: str | Path, name: str = "") -> History:
    """What the files of a run tell.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the directory is of another command.
    """
    path = Path(folder)
    config = RunDirectory.recorded(path) if path.is_dir() else None
    if config is None or not (path / METRICS).is_file():
        if (path / "index.html").is_file():
            raise ValueError(f"{path} is an experiment, and {path / 'index.html'} its page; for its runs see {PAGE}")
        raise FileNotFoundError(f"no run {str(folder)!r}: give the --out directory of a run of l2l fine-tune; see {PAGE}")
    if not {"task", "method", "scheme"} <= config.keys():
        raise ValueError(f"{path} is not a run of l2l fine-tune, of which reports are made; see {PAGE}")
    summary = path / SUMMARY
    found = json.loads(summary.read_text()) if summary.is_file() else {}
    try:
        header, steps = runlog.read_run_log(path)
        note = ""
    except (OSError, ValueError) as error:
        header, steps, note = {}, [], str(error)
    return History(name or path.name, path, config, found, read_metrics(path / METRICS), steps, header, note)


# The weights: before, after, and what the steps between them say.


@dataclass
class Trace:
    """What the steps of a run say when they are taken again."""

    steps: int
    blocks: int
    passes: list[float] = field(default_factory=list)
    """Spent by the end of each step."""
    shares: list[float | None] = field(default_factory=list)
    """The share of the signal after each step; None where it is not measured."""
    sums: np.ndarray = field(init=False)
    """[BINS, blocks]: sums of factor * sigma over the steps of each bin."""
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sums, self.counts = np.zeros((BINS, self.blocks)), np.zeros(BINS)

    def note(self, report: StepReport) -> None:
        """Take down one step."""
        place = min(len(self.passes) * BINS // max(self.steps, 1), BINS - 1)
        self.passes.append((self.passes[-1] if self.passes else 0.0) + report.passes)
        self.shares.append(report.curvature_lr_state.signal_share)
        if report.estimates:
            direction = report.estimates[-1].direction
            self.sums[place] += np.asarray(direction.sigma) * direction.factor
            self.counts[place] += 1

    @property
    def sigma(self) -> np.ndarray:
        """[bins, blocks]: mean factor * sigma over the steps of each bin that has some."""
        there = self.counts > 0
        return self.sums[there] / self.counts[there, None]

    @property
    def signal(self) -> Curve:
        """The share of the signal against passes."""
        return [(x, share) for x, share in zip(self.passes, self.shares, strict=True) if share is not None]


@dataclass(frozen=True)
class Displacement:
    """How far a block has moved."""

    numel: int
    rms: float
    """Root mean square of the changes of its coordinates."""
    relative: float
    """Norm of the change over that of the block before; infinite where it was 0."""


@dataclass(frozen=True)
class Compared:
    """The weights of a run before and after."""

    moved: dict[str, Displacement]
    """By block; empty where blocks cannot be compared."""
    trace: Trace | None
    """None: the run cannot be replayed, and its saved model was read."""
    rows: Sequence[Row]
    scores: tuple[Scores, Scores] | None
    """Of ``rows``, before and after; None where none were asked for."""
    of_last: bool = False
    """Whether what is after are the weights of the last step, as the best ones are those before the first."""


def displacement(before: torch.Tensor, after: torch.Tensor) -> Displacement:
    """How far a block has moved; both of one shape, of any float type."""
    change = (after.float() - before.float()).double().norm().item()
    base = before.double().norm().item()
    relative = change / base if base else (math.inf if change else 0.0)
    return Displacement(before.numel(), change / math.sqrt(max(before.numel(), 1)), relative)


def compare_weights(history: History, base: str | None = None, examples: int = 0) -> Compared:
    """Load the base model of a run and bring it to the run's weights: by its log, else from its saved model.

    Args:
        base: where the base model is; None: where the run had it from.
        examples: test rows to evaluate before and after.

    Raises:
        ValueError, FileNotFoundError: the weights cannot be had without a download, or are of another base.
    """
    config = history.config
    source = base or config["model"]
    if local_folder(source, config.get("revision")) is None and not Path(source).is_file():
        raise FileNotFoundError(f"the base model {source!r} is not here: give its directory with --model; see {PAGE}")
    rewarded = config.get("reward") is not None
    if rewarded and examples:
        raise ValueError(
            "examples evaluates rows of a task, and this run has a reward, whose completions are shown: leave it out"
        )
    task, rows = None if rewarded else get_task(config["task"]), list[Row]()
    if examples and task is not None:
        sizes = config["train_size"], config["dev_size"] or DEV_ROWS, config["test_size"] or TEST_ROWS
        rows = load_splits(task, config["data_dir"], *sizes, config["seed"]).test[:examples]
    saved = history.folder / "model"
    replayable = history.header and not history.header["not_replayable"] and "first" not in history.header
    if not replayable and not saved.is_dir():
        why = history.note or history.header.get("not_replayable") or "its log begins after its first step"
        raise ValueError(f"no weights are left to compare: the run cannot be replayed ({why}), and it saved no model")
    return (_replayed if replayable else _saved)(history, source, task, rows)


def _replayed(history: History, source: str, task: Task | None, rows: Sequence[Row]) -> Compared:
    log = runlog.read_log(history.folder / runlog.NAME)
    model, optimizer = begin(log, source)
    blocks = optimizer.blocks
    before = {block.name: block.tensor.detach().clone() for block in blocks}
    score = _scorer(history.config, source, task, rows)
    first = score(model)
    trace = Trace(len(log.steps), len(blocks))
    kept = steps_to(log, None)
    replay(log, optimizer, kept or len(log.steps), each=trace.note)
    moved = {block.name: displacement(before[block.name], block.tensor.detach()) for block in blocks}
    last = score(model)
    return Compared(moved, trace, rows, None if first is None or last is None else (first, last), not kept)


def _saved(history: History, source: str, task: Task | None, rows: Sequence[Row]) -> Compared:
    config = history.config
    names = [field.name for field in fields(FineTuneConfig) if field.name in config]
    complete = FineTuneConfig(**{name: config[name] for name in names}).completed()
    options = {name: config[name] for name in ("dtype", "head", "quantize", "seed", "revision")}
    options |= {"num_labels": history.header.get("labels")}
    score = _scorer(config, source, task, rows)
    model = load_model(source, **options).eval()
    first = score(model)
    moved: dict[str, Displacement] = {}
    after = load_model(history.folder / "model", dtype=config["dtype"]).eval()
    if config["scheme"] == "full":
        own = {block.name: block.tensor for block in Blocks.of(after, trainable=False)}
        blocks = Blocks.of(setup_scheme(model, complete))
        moved = {block.name: displacement(block.tensor.detach(), own[block.name].detach()) for block in blocks}
    last = score(after)
    return Compared(moved, None, rows, None if first is None or last is None else (first, last))


def _scorer(config: Mapping[str, Any], source: str, task: Task | None, rows: Sequence[Row]) -> Any:
    """A function of the model: its scores on the rows; None where there are none."""
    if not rows or task is None:
        return lambda model: None
    tokenizer = load_tokenizer(source, config["revision"], config["trust_remote_code"])
    limits = {"max_length": config["max_length"], "max_new_tokens": config["max_new_tokens"]}
    return lambda model: evaluate(model, tokenizer, task, rows, **limits)


# The page.


def run_report(config: ReportConfig) -> Path:
    """Write the page.

    Raises:
        FileNotFoundError, ValueError: a run cannot be read; or examples were asked for, and the weights cannot be had.
    """
    names = [Path(run).resolve().name for run in config.runs]
    labels = names if len(set(names)) == len(names) else [str(Path(run)) for run in config.runs]
    histories = [read_history(run, label) for run, label in zip(config.runs, labels, strict=True)]
    compared = [_compared(history, config) for history in histories]
    first, several = histories[0].config, len(histories) > 1
    title = f"{len(histories)} runs" if several else f"{first['method']} on {first['task']}"
    sections = [figures(histories), curves(histories), step_sizes(histories, compared), memory(histories)]
    for history, found in zip(histories, compared, strict=True):
        sections += of_run(history, found, several)
    unfinished = [history.name for history in histories if not history.summary]
    lines = [f"{name} has not finished: what follows is what it has written so far." for name in unfinished]
    return page.write(Path(config.out), title, lines, [section for section in sections if section.parts or section.paragraphs])


def _compared(history: History, config: ReportConfig) -> Compared | str:
    """The weights of a run before and after, or why they are not known."""
    if not config.weights:
        return "the weights were not looked at (--weights false)"
    try:
        return compare_weights(history, config.model, config.examples)
    except (ValueError, OSError) as error:
        if config.examples:  # which were asked for
            raise
        return str(error)


def figures(histories: Sequence[History]) -> Section:
    """What each run was and came to, a column per run."""
    rows = [(name, *values) for name, values in zip(FIGURES, zip(*map(_figures_of, histories), strict=True), strict=True)]
    table = Table(
        "Runs", ("", *(history.name for history in histories)), [[Text(text) for text in row] for row in rows], long=True
    )
    return Section("Figures", [table])


FIGURES = (
    *("model", "task", "method", "scheme", "trained layers", "learning rate", "steps", "forward passes", "seconds of training"),
    *("dev loss, untrained and best", "best step", "dev metric", "test metric"),
)


def _figures_of(history: History) -> list[str]:
    """The values of :data:`FIGURES`; ``-`` for what is not known yet."""
    config, summary = history.config, history.summary
    done = history.rows[-1] if history.rows else {}
    texts = [str(config[name]) for name in ("model", "task", "method", "scheme", "train_layers", "lr")]
    texts += [str(summary.get("steps", len(history.steps))), str(summary.get("passes", done.get("passes", "-")))]
    texts.append(str(summary.get("train_seconds", done.get("seconds", "-"))))
    if not summary:
        return [*texts, f"{history.dev_losses[-1][1]:.4f}" if history.dev_losses else "-", "-", "-", "-"]
    before, best = summary["initial_dev_loss"], summary["best"]
    texts.append(f"{summary['dev_loss']:.4f}" if before is None else f"{before:.4f} → {summary['dev_loss']:.4f}")
    texts.append("the untrained model" if best["step"] < 0 else str(best["step"]))
    for found in (best["dev"], best["test"]):
        texts.append(f"{found['metric']} {format_interval(found['value'], found['interval'])} of {found['n']} rows")
    return texts


def curves(histories: Sequence[History]) -> Section:
    """Loss, metric and what else the metrics hold, against passes and seconds."""
    objectives = {history.config["objective"] for history in histories}
    name = "loss of steps" if objectives == {"loss"} else "minimised objective of steps"
    unit = "loss (nats)" if objectives == {"loss"} else ", ".join(sorted(objectives))
    metrics = {history.summary["best"]["dev"]["metric"] for history in histories if history.summary}
    metric = metrics.pop() if len(metrics) == 1 else "metric"
    spent = {"passes": "forward passes", "seconds": "seconds of training"}
    parts: list[Part] = []
    for x, label in spent.items():
        by = {history.name: history.losses for history in histories}
        dev = {history.name: history.dev_losses for history in histories}
        if x == "seconds":
            by, dev = ({h.name: h.at_seconds(found[h.name]) for h in histories} for found in (by, dev))
        if objectives == {REWARD}:
            upward = {name: [(at, -loss) for at, loss in curve] for name, curve in by.items()}
            parts.append(Lines(f"Mean reward of steps by {x}", upward, label, "mean reward"))
            parts.append(
                Lines(f"Mean reward on dev by {x}", {h.name: h.column(REWARD, x) for h in histories}, label, "mean reward")
            )
            continue
        parts += [Lines(f"{name.capitalize()} by {x}", by, label, unit), Lines(f"Dev loss by {x}", dev, label, "loss (nats)")]
        parts.append(Lines(f"Dev {metric} by {x}", {h.name: h.column("dev_metric", x) for h in histories}, label, metric))
    known = ("step", *COLUMNS, *objectives)
    others = dict.fromkeys(name for h in histories for row in h.rows for name in row if name not in known)
    parts += [Lines(name, {h.name: h.column(name) for h in histories}, "forward passes", name) for name in others]
    note = "Losses of steps are means over the last 2.5 % of the steps, as each step sees one batch."
    return Section("Curves", _drawable(parts), [note])


def step_sizes(histories: Sequence[History], compared: Sequence[Compared | str]) -> Section:
    """Learning rate, curvature and the share of the signal over the run."""
    rate = {h.name: h.of_steps("lr") or h.column("lr") for h in histories}
    bend = {h.name: h.of_steps("curvature") or h.column("curvature") for h in histories}
    signal = {
        h.name: found.trace.signal
        for h, found in zip(histories, compared, strict=True)
        if not isinstance(found, str) and found.trace
    }
    parts = [
        Lines("Learning rate", rate, "forward passes", "learning rate"),
        Lines("Curvature", bend, "forward passes", "curvature along the direction", "|u^T H u|, where it was measured."),
        Lines("Share of the signal", signal, "forward passes", "share", "G / (G + noise / b), as lr auto measures it."),
    ]
    shown = _drawable(parts)
    missing = ", ".join(part.title.lower() for part in parts if part not in shown)
    return Section("Step size", shown, [f"Not measured: {missing}."] if missing else [])


def _drawable(parts: Sequence[Part]) -> list[Part]:
    """Without the charts that have no line: a single point stands in the table of figures."""
    return [part for part in parts if not isinstance(part, Lines) or any(len(curve) > 1 for curve in part.drawn.values())]


def memory(histories: Sequence[History]) -> Section:
    """Peak memory and time of a step, predicted and measured."""
    parts: list[Part] = []
    for field_, title, unit, scale in (
        ("peak_bytes", "Peak memory", "MiB", MEBIBYTE),
        ("seconds_per_step", "Time of a step", "s", 1),
    ):
        values: dict[str, float] = {}
        for history in histories:
            for kind, word in (("estimate", "predicted"), ("measured", "measured")):
                value = history.summary.get(kind, {}).get(field_)
                if value is not None:
                    values[f"{history.name}, {word}" if len(histories) > 1 else word] = value / scale
        if values:
            parts.append(Bars(title, values, unit))
    return Section("Memory and time, predicted and measured", parts)


def of_run(history: History, found: Compared | str, named: bool) -> list[Section]:
    """The sections of one run: what moved, sigma, examples, how to repeat it."""
    suffix = f": {history.name}" if named else ""
    sections = []
    if isinstance(found, str):
        sections.append(Section(f"What moved{suffix}", (), [f"Not known: {found}"]))
    else:
        sections.append(Section(f"What moved{suffix}", what_moved(found), moved_words(found)))
        if found.trace is not None and history.header.get("tuner"):
            sections.append(Section(f"Sigma{suffix}", sigma_maps(found.trace, list(found.moved)), [SIGMA]))
    if parts := completions(history):
        sections.append(Section(f"Completions before and after{suffix}", parts))
    if not isinstance(found, str) and found.scores is not None:
        task = get_task(history.config["task"])
        sections.append(Section(f"Examples before and after{suffix}", examples(task, found), example_words(found)))
    return [*sections, how_to_repeat(history, suffix)]


SIGMA = "Standard deviation of the perturbation of each block, as the tuner set it and the steps used it; MeZO's is 1."


def moved_words(found: Compared) -> list[str]:
    """How the changes of weights were found."""
    if not found.moved:
        return ["Not known by block: an adapter of a run that cannot be replayed is saved apart from what it began as."]
    how = "the saved model" if found.trace is None else "the run log, by taking its steps again"
    what = "those after the last step, as the untrained ones are best on dev" if found.of_last else "the best on dev"
    return [f"Root mean square of the change of a weight, from the base to the weights of the run ({what}), by {how}."]


def what_moved(found: Compared) -> list[Part]:
    """The change of the weights, by kind and layer, and by kind."""
    if not found.moved:
        return []
    rms = by_layer_and_kind({name: moved.rms for name, moved in found.moved.items()})
    kinds: dict[str, list[Displacement]] = {}
    for name, moved in found.moved.items():
        kinds.setdefault(layer_and_kind(name)[1], []).append(moved)
    rows = []
    for kind in rms.kinds:
        own = kinds[kind]
        numel = sum(moved.numel for moved in own)
        total = math.sqrt(sum(moved.rms**2 * moved.numel for moved in own) / max(numel, 1))
        relative = [moved.relative for moved in own]
        span = f"{min(relative):.2g}" if len(own) == 1 else f"{min(relative):.2g} to {max(relative):.2g}"
        rows.append([Text(text) for text in (kind, str(len(own)), f"{numel:,}", f"{total:.2g}", span)])
    columns = ("kind", "blocks", "weights", "change (rms)", "change / norm")
    return [_by_layer("Change of weights", rms), Table("By kind", columns, rows)]


def _by_layer(title: str, grid: Heatmap) -> Heat:
    """A grid of layers and kinds, a row per kind."""
    layers = ["outside" if layer == NO_LAYER else layer for layer in grid.layers]
    return Heat(title, _short(grid.kinds), layers, list(zip(*grid.values, strict=True)), "kind", "layer")


def _short(kinds: Sequence[str]) -> list[str]:
    """Names of kinds without the suffix that most have."""
    return [kind.removesuffix(".weight") for kind in kinds]


def sigma_maps(trace: Trace, names: Sequence[str]) -> list[Part]:
    """Sigma by kind over the run, and by kind and layer, the mean over the run."""
    sigma = trace.sigma
    if not len(sigma):
        return []
    mean = by_layer_and_kind(dict(zip(names, sigma.mean(axis=0).tolist(), strict=True)))
    kinds = [layer_and_kind(name)[1] for name in names]
    columns = ([place for place, own in enumerate(kinds) if own == kind] for kind in mean.kinds)
    over = [sigma[:, column].mean(axis=1).tolist() for column in columns]
    parts = [str(part + 1) for part in range(len(sigma))]
    time = Heat("Sigma over the run", _short(mean.kinds), parts, over, "kind", "part of the run")
    return [time, _by_layer("Sigma, mean over the run", mean)]


GROUPS = ("wrong before, right after", "right before, wrong after", "wrong before and after", "right before and after")


def grouped(scores: tuple[Scores, Scores]) -> dict[str, list[int]]:
    """Rows by whether they were right before and after; a generated answer is right where it is an answer to the last word."""
    found: dict[str, list[int]] = {group: [] for group in GROUPS}
    for row, (before, after) in enumerate(zip(scores[0].rowwise, scores[1].rowwise, strict=True)):
        place = {(False, True): 0, (True, False): 1, (False, False): 2, (True, True): 3}[before == 1, after == 1]
        found[GROUPS[place]].append(row)
    return found


def example_words(found: Compared) -> list[str]:
    """Which rows, and how many of them were right."""
    assert found.scores is not None, "examples were asked for"
    before, after = found.scores
    figures_ = (f"{one.metric} {format_interval(one.value, one.interval)}" for one in (before, after))
    return [f"{len(found.rows)} test rows, evaluated for this page: {' → '.join(figures_)}."]


def examples(task: Task, found: Compared) -> list[Part]:
    """How many rows were right before and after, and some of each group."""
    assert found.scores is not None, "examples were asked for"
    groups = grouped(found.scores)
    counts = Bars("Rows", {group: float(len(rows)) for group, rows in groups.items()}, "rows")
    parts: list[Part] = [counts]
    for group, rows in groups.items():
        lines = []
        for row in rows[:SHOWN]:
            example = task.example(found.rows[row])
            prompt = example.prompt if len(example.prompt) <= PROMPT else f"…{example.prompt[-PROMPT:]}"
            right = " | ".join(example.answers or [example.options[place] for place in example.gold])
            texts = (prompt, right, *(scores.answers[row] for scores in found.scores))
            lines.append([Text(text.strip()) for text in texts])
        if lines:
            columns = ("prompt", "right", "before", "after")
            note = f"{len(lines)} of {len(rows)}" if len(rows) > len(lines) else ""
            parts.append(Table(group.capitalize(), columns, lines, note, long=True))
    return parts


def completions(history: History) -> list[Part]:
    """Completions of a reward's dev prompts by the weights before and after, the first of each prompt; none without both."""
    sides = [history.folder / name for name in (BEFORE, AFTER)]
    if not all(path.is_file() for path in sides):
        return []
    texts = ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in sides)
    pairs = list(zip(*texts, strict=False))[:: history.config.get("eval_samples") or 1]
    lines = []
    for before, after in pairs[:SHOWN]:
        prompt = before["prompt"] if isinstance(before["prompt"], str) else json.dumps(before["prompt"], ensure_ascii=False)
        shown = prompt if len(prompt) <= PROMPT else f"…{prompt[-PROMPT:]}"
        values = (shown, before["completion"], f"{before['reward']:g}", after["completion"], f"{after['reward']:g}")
        lines.append([Text(value) for value in values])
    note = f"{len(lines)} of {len(pairs)} prompts; under the same noise on both sides."
    return [Table("Completions", ("prompt", "before", "reward", "after", "reward"), lines, note, long=True)]


def how_to_repeat(history: History, suffix: str) -> Section:
    """The command, how to replay the log, configuration, versions and hardware."""
    header, folder = history.header, shlex.quote(str(history.folder))
    parts: list[Part] = [Listing("The run again", command_of(history.config), AGAIN)]
    if header and not header.get("not_replayable"):
        base = history.config["model"]
        lines = [f"l2l replay {folder}  # check every step against the log", f"l2l replay {folder} --out model-again"]
        lines += ["# or, in Python:", f"model = l2l.load_model({base!r}, log={str(history.folder)!r})"]
        parts.append(Listing("Its weights again, from its log", "\n".join(lines)))
    else:
        why = history.note or header.get("not_replayable")
        parts.append(Listing("Its weights again", f"# this run cannot be replayed: {why}"))
    environment = history.summary.get("environment") or {name: header.get(name) for name in ("library", "torch")}
    texts = {"Configuration": history.config, "Versions and hardware": environment}
    folded = [Listing(name, yaml.safe_dump(value, sort_keys=False), folded=True) for name, value in texts.items()]
    return Section(f"How to repeat it{suffix}", [*parts, *folded])


AGAIN = "Give another --out: the directory holds the run."


def command_of(config: Mapping[str, Any]) -> str:
    """The command line of a run's configuration: the options that differ from the defaults, but ``overwrite``, with which the
    command would remove the run."""
    words = ["l2l fine-tune"]
    for option in fields(FineTuneConfig):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        value = config.get(option.name, default)
        if value != default and option.name != "overwrite":
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"--{option.name} {shlex.quote(text)}")
    return " \\\n  ".join(words)


def report_command(config: ReportConfig) -> None:
    """Write the page, and print its path."""
    print(f"page: {run_report(config)}")
