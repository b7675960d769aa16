"""The run log ``steps.jsonl``: what is needed to rebuild the weights of each step from the base model."""

import json
from pathlib import Path
from typing import Any, final

from l2l.optim import StepReport
from l2l.report.run_directory import write_whole

NAME = "steps.jsonl"


@final
class RunLog:
    """One JSON line per step.

    ``step``, ``lr``, ``passes``, and ``directions``: for each direction its projected gradient and the losses on both
    sides. ``curvature`` where it was measured; of a first-order step ``loss``; of a step whose
    update ``on_bad_loss`` left out, the bad ``loss`` and, as ``dropped``, why.

    Args:
        head: the first line: seed, epsilon, method and tuner hash, which fix directions and sigma.
        after: keep the lines up to this step of an interrupted run; None starts a new log.
    """

    def __init__(self, folder: Path, head: dict[str, Any], after: int | None = None) -> None:
        path = folder / NAME
        steps = [] if after is None or not path.exists() else read_run_log(path)[1]
        lines = [head, *(line for line in steps if after is not None and line["step"] <= after)]
        write_whole(path, lambda target: target.write_text("".join(json.dumps(line) + "\n" for line in lines)))
        self._file = path.open("a")

    def append(self, report: StepReport) -> None:
        """Append one step."""
        directions = [[e.projected_gradient, e.loss_plus, e.loss_minus] for e in report.estimates]
        line = {"step": report.key.step, "lr": report.lr[0], "passes": report.passes, "directions": directions}
        if report.loss_center is not None:
            line["loss"] = report.loss_center
        if report.curvature is not None:
            line["curvature"] = report.curvature
        if report.dropped:
            line["dropped"] = report.dropped
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Write what was appended to disk: a checkpoint must not be ahead of its log."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_run_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Head and steps of a log, without a last line that a crash cut short. ``draws`` is the old name of ``directions``."""
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    head, *steps = [json.loads(line) for line in lines]
    renamed = [{"directions" if key == "draws" else key: value for key, value in step.items()} for step in steps]
    return head, renamed
