"""``l2l tuners test``: does a tuner gain over sigma = 1 on a model, for instance a fine-tuned copy of its own?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from l2l.arguments import Arguments
from l2l.experiments.runner import Runner, check_all, executor_of, run_summary
from l2l.experiments.spec import CompareConfig, Contender, Setting
from l2l.experiments.stats import COVERAGE, RunTable, estimate, interval, mean_difference
from l2l.experiments.tables import draw_curves, mean_curves
from l2l.methods.base import check_counts, check_positive
from l2l.models.load import load_model
from l2l.report.run_directory import RunDirectory
from l2l.tuners import Level, Tuner, check_level, compare

Verdict = Literal["go", "no-go", "undecided"]
LABELS = TUNER, PLAIN = "tuner", "sigma = 1"
PICTURE = "test.png"


@dataclass(frozen=True)
class GoNoGoConfig(Arguments):
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
        super().__post_init__()
        names = ("passes", "seeds", "batch_size", "train_size", "test_size", "processes")
        check_counts(**{name: getattr(self, name) for name in names})
        check_positive(step_fraction=self.step_fraction)
        check_level(self.match)
        if self.seeds < 2:
            raise ValueError("seeds=1 gives no interval: take at least 2, better 5")

    def experiment(self, tuner: str) -> CompareConfig:
        """The two contenders and their runs; ``tuner`` is the directory or name of the tuner, bound to the model."""
        auto = {"lr": "auto"}
        where = {name: getattr(self, name) for name in ("model", "data_dir", "max_length", "batch_size")}
        same = ("out", "passes", "seeds", "train_size", "test_size", "processes", "progress")
        return CompareConfig(
            settings=[Setting("model", tasks=[self.task], **where)],
            methods=[Contender(TUNER, "learned", tuner=tuner, options=auto), Contender(PLAIN, "mezo", options=auto)],
            step_fraction_grid=[self.step_fraction],
            dev_size=min(50, self.test_size),  # dev takes no part in the verdict
            evaluations=1,
            tuning_seed=-1,  # nothing is tuned
            **{name: getattr(self, name) for name in same},
        )


def run_tuner_test(config: GoNoGoConfig) -> dict[str, Any]:
    """Run the test; what ``summary.json`` holds: the gain (nats), its interval, the verdict, every run.

    The gain is the final training loss with sigma = 1 less that with the tuner, in the mean over seeds. FileNotFoundError
    for an unknown tuner or model; ValueError where the tuner does not fit the model, or ``out`` holds another run.
    """
    with RunDirectory(config.out, asdict(config), config.overwrite) as folder:
        return _run(config, folder)


def _run(config: GoNoGoConfig, folder: RunDirectory) -> dict[str, Any]:
    given, model = Tuner.from_pretrained(config.tuner), load_model(config.model)
    fitted = given.matched(model, config.match)  # a tuner that does not fit is refused before anything is written
    relation = "any model will do" if given.size_free else f"{(found := compare(given, model)).kind}: {found.message}"
    folder.create()
    bound = fitted is not given and not given.size_free
    tuner = str(fitted.save_pretrained(folder.path / "tuner")) if bound else config.tuner
    experiment, root = config.experiment(tuner), folder.path / "runs"
    (checked,) = check_all(experiment, experiment.contenders, held_out=False)
    place = checked.frozen(root / "_tuners")
    runner = Runner(experiment, executor_of("local", config.processes), [place], root)
    runs = runner.table({(cell, label): runner.points(place, label)[0] for cell in place.cells for label in LABELS})
    table = RunTable.of(runs, place.cells, LABELS)
    losses = {label: table.values(label, "train_loss")[0].tolist() for label in LABELS}
    summary = judge(losses[PLAIN], losses[TUNER]) | {"relation": relation, "final_loss": losses}
    summary |= {"runs": [run_summary(run) for run in runs], "passes": config.passes, "tuner": tuner, "config": asdict(config)}
    (cell,) = place.cells
    draw_curves(folder.path / PICTURE, {"test": mean_curves(table, cell)["passes"]}, LABELS, "forward passes")
    folder.finish(summary)
    return summary


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
    return (
        f"model: {summary['relation']}\n"
        f"gain over sigma = 1 after {summary['passes']} passes: {summary['gain']:+.4f} nats of final training loss, "
        f"{summary['coverage']:.0%} interval {low:+.4f} to {high:+.4f}, lower loss in {summary['seeds_gained']} of "
        f"{summary['seeds']} seeds\n"
        f"verdict: {summary['verdict']}; {ADVICE[summary['verdict']]}"
    )
