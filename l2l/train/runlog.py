"""The run log: per step what is needed to rebuild the weights from the base model, and nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

from l2l.optim import StepReport
from l2l.report.files import write_whole

NAME = "steps.jsonl"


@final
class RunLog:
    """One JSON line per step: step, lr used, and for each draw its projected gradient and losses; curvature where it was
    measured; of a first-order step the loss. The head names the rest.

    Args:
        head: seed, method, tuner hash: what fixes directions and sigma.
        after: keep the lines up to this step of an interrupted run; None starts a new log.
    """

    def __init__(self, folder: Path, head: dict[str, Any], after: int | None = None) -> None:
        path = folder / NAME
        kept = (
            []
            if after is None or not path.exists()
            else [line for line in read_run_log(path)[1] if line["step"] <= after]
        )
        lines = "".join(json.dumps(line) + "\n" for line in [head, *kept])
        write_whole(path, lambda target: target.write_text(lines))
        self._file = path.open("a")

    def append(self, report: StepReport) -> None:
        """One step."""
        seen = [[e.projected_gradient, e.loss_plus, e.loss_minus] for e in report.estimates]
        line = {"step": report.key.step, "lr": report.lr[0], "passes": report.passes, "draws": seen}
        if report.loss_center is not None:
            line["loss"] = report.loss_center
        if report.curvature is not None:
            line["curvature"] = report.curvature
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Bring what was appended to disk: before a checkpoint that counts on it."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_run_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Head and steps of a log; a last line that a crash cut short is left out."""
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    head, *steps = [json.loads(line) for line in lines]
    return head, steps
