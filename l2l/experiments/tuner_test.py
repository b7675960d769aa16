"""``l2l tuners test``: does a tuner still gain over sigma = 1 on this model, a derivative of the one it was made for?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l2l.experiments.runner import Job, run_folder, run_jobs, run_tolerantly, step_curve
from l2l.experiments.stats import COVERAGE, estimate, interval, mean_by_x, mean_difference
from l2l.methods.base import check_counts, check_positive
from l2l.report.console import progress_bar
from l2l.report.plots import plot_panels, smooth
from l2l.report.run_directory import RunDirectory
from l2l.tuners.api import Tuner
from l2l.tuners.transfer import Level, check_level

Verdict = Literal["go", "no-go", "undecided"]
TUNER, PLAIN = "tuner", "sigma = 1"
PICTURE = "test.png"


@dataclass(frozen=True)
class GoNoGoConfig:
    """Short runs with a tuner and with sigma = 1: equal passes, the same step control, the same seeds."""

    tuner: str = "l2l-tiny"
    """Directory, bundled or registered name, or hub id."""
    model: str = "l2l/tiny"
    """The model to judge it on: a directory or hub id, e.g. a fine-tuned copy of the tuner's own."""
    task: str = "world_stars"
    """Task to fine-tune on, best one that the tuner has not learned from."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; embedded tasks need none."""
    out: str = "runs/tuner-test"
    """Directory for everything the runs leave. The same command again continues an interrupted test."""
    match: Level = "exact"
    """How alike the model must be to the tuner's own: ``exact``, ``shape`` or ``kind``."""
    passes: int = 400
    """Forward passes per run, those of the step control included."""
    seeds: int = 5
    """Runs each; the interval is over them."""
    step_fraction: float = 0.2
    """Of the step control, the same for both."""
    batch_size: int = 16
    """Examples per step."""
    train_size: int = 1000
    """Rows to train on."""
    test_size: int = 500
    """As many train rows give the loss that is compared."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    processes: int = 1
    """Runs at a time, one thread each."""
    overwrite: bool = False
    """Remove what an earlier test left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        names = ("passes", "seeds", "batch_size", "train_size", "test_size", "processes")
        check_counts(**{name: getattr(self, name) for name in names})
        check_positive(step_fraction=self.step_fraction)
        check_level(self.match)
        if self.seeds < 2:
            raise ValueError("seeds=1 gives no interval: take at least 2, better 5")


def run_tuner_test(config: GoNoGoConfig) -> dict[str, Any]:
    """Run the test; what ``summary.json`` holds: the gain (nats), its interval, the verdict, every run.

    The gain is the final training loss with sigma = 1 less that with the tuner, in the mean over seeds.

    Raises:
        FileNotFoundError: there is no such tuner or model.
        ValueError: the tuner does not fit the model, or ``out`` holds another run.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    fitted, relation = _fitting(config)  # a tuner that does not fit is refused before anything is written
    folder.create()
    tuner = config.tuner if fitted is None else str(fitted.save_pretrained(folder.path / "tuner"))
    jobs = jobs_of(config, tuner, folder.path)
    with progress_bar("test", len(jobs), visible=config.progress) as advance:
        records = run_jobs(jobs, config.processes, lambda record: advance(record["final_loss"]), run_tolerantly)
    losses = {
        label: [r["final_loss"] for r, j in zip(records, jobs, strict=True) if j.label == label] for label in LABELS
    }
    summary = judge(losses[PLAIN], losses[TUNER]) | {"relation": relation, "final_loss": losses, "runs": records}
    summary |= {"passes": config.passes, "tuner": tuner, "config": asdict(config)}
    _draw(folder.path / PICTURE, jobs)
    folder.finish(summary)
    return summary


LABELS = (TUNER, PLAIN)


def _fitting(config: GoNoGoConfig) -> tuple[Tuner | None, str]:
    """The tuner where it has to be bound to other blocks than its own, and what the model is to it."""
    from l2l.models.load import load_model
    from l2l.tuners.transfer import compare

    tuner, model = Tuner.from_pretrained(config.tuner), load_model(config.model)
    fitted = tuner.matched(model, config.match)
    relation = "any model will do" if tuner.size_free else f"{(found := compare(tuner, model)).kind}: {found.message}"
    return (None if fitted is tuner or tuner.size_free else fitted), relation


def jobs_of(config: GoNoGoConfig, tuner: str, root: Path) -> list[Job]:
    """The runs: seed by seed, with the tuner and without."""
    steps = max(1, config.passes // 2)
    options: dict[str, Any] = {
        "model": config.model,
        "data_dir": config.data_dir,
        "max_length": config.max_length,
        "batch_size": config.batch_size,
        "train_size": config.train_size,
        "test_size": config.test_size,
        "dev_size": min(50, config.test_size),  # dev takes no part in the verdict
        "steps": steps,
        "max_passes": config.passes,
        "eval_every": steps,
        "checkpoint_every": steps,
        "step_fraction": config.step_fraction,
    }
    chosen = {TUNER: ("learned", tuner), PLAIN: ("mezo", None)}
    return [
        Job(label, config.task, method, "auto", seed, run_folder(root, method, f"s{seed}"), given, options)
        for seed in range(config.seeds)
        for label, (method, given) in chosen.items()
    ]


def judge(plain: Sequence[float], tuned: Sequence[float]) -> dict[str, Any]:
    """Gain, interval and verdict from the final losses of both, paired by seed.

    The interval is a percentile bootstrap over seeds; with few of them it is somewhat too narrow.
    """
    table = np.array([plain, tuned], dtype=np.float64).T[None]
    low, high = interval(table, mean_difference)
    return {
        "gain": estimate(table, mean_difference),
        "interval": [low, high],
        "coverage": COVERAGE,
        "seeds_gained": int((table[0, :, 1] < table[0, :, 0]).sum()),
        "seeds": len(plain),
        "verdict": verdict(low, high),
    }


def verdict(low: float, high: float) -> Verdict:
    """``go`` where the whole interval gains, ``no-go`` where all of it loses; a bound that is no number decides nothing."""
    return "go" if low > 0 else "no-go" if high < 0 else "undecided"


ADVICE: Mapping[Verdict, str] = {
    "go": "the tuner gains over sigma = 1 on this model and task",
    "no-go": "the tuner loses against sigma = 1 here: use method mezo, or learn a tuner for this model",
    "undecided": "the runs do not tell: take more seeds or passes",
}


def report(summary: Mapping[str, Any]) -> str:
    """The result in three lines."""
    low, high = summary["interval"]
    return "\n".join(
        [
            f"model: {summary['relation']}",
            f"gain over sigma = 1 after {summary['passes']} passes: {summary['gain']:+.4f} nats of final training loss, "
            f"{summary['coverage']:.0%} interval {low:+.4f} to {high:+.4f}, lower loss in {summary['seeds_gained']} of "
            f"{summary['seeds']} seeds",
            f"verdict: {summary['verdict']}; {ADVICE[summary['verdict']]}",
        ]
    )


def _draw(target: Path, jobs: Sequence[Job]) -> None:
    curves: dict[str, list[tuple[float, float]]] = {label: [] for label in LABELS}
    for job in jobs:
        if (Path(job.out) / "summary.json").is_file():  # else it diverged
            curves[job.label].extend(step_curve(Path(job.out)))
    panels = {"test": {label: smooth(mean_by_x(points)) for label, points in curves.items() if points}}
    plot_panels(target, panels, "forward passes", "training loss (nats), mean over seeds")
