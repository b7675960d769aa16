"""From the runs of a table to the figures of ``meta_evaluate.json``.

``meta_evaluate.json``: strict JSON, whole, a line per run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from l2l.experiments.spec import BASELINE_DIZO, BASELINE_MEZO, CONTROL
from l2l.experiments.stats import (
    Pair,
    Run,
    Statistic,
    accuracy_counts,
    beats,
    estimate,
    interval,
    mean_difference,
    median_ratio,
    pass_ratios,
    values,
    win_rate,
)
from l2l.report.files import write_whole

LOSS = "train_loss"


@final
@dataclass(frozen=True)
class VerdictField:
    """Everything that a verdict rests on."""

    runs: Sequence[Run]
    roles: Mapping[str, str]
    """Contender -> role, in the order of the table."""
    pairs: Sequence[Pair]
    majority: Mapping[Pair, float]
    """Accuracy of the best constant answer on each pair's test rows."""

    def labels(self, role: str) -> list[str]:
        """The contenders of a role."""
        return [label for label, found in self.roles.items() if found == role]

    def of(self, contender: str, quantity: str, pairs: Sequence[Pair] | None = None) -> NDArray[np.float64]:
        """[pairs, seeds] of a quantity of a contender."""
        return values(self.runs, contender, self.pairs if pairs is None else pairs, quantity)

    def within(self, setting: str) -> VerdictField:
        """The same for one setting alone."""
        return VerdictField(self.runs, self.roles, [pair for pair in self.pairs if pair[0] == setting], self.majority)


def judge(field: VerdictField, tuner: str) -> dict[str, Any]:
    """Figures of a tuner over all pairs of a field, with their intervals; None where there was nothing to compare with."""
    figures: dict[str, Any] = {}
    intervals: dict[str, Any] = {}

    def enter(name: str, table: NDArray[np.float64] | None, statistic: Statistic) -> None:
        figures[name] = None if table is None else estimate(table, statistic)
        intervals[name] = None if table is None else list(interval(table, statistic))

    mezo, dizo, controls = field.labels(BASELINE_MEZO)[0], field.labels(BASELINE_DIZO), field.labels(CONTROL)
    enter("win_rate_over_mezo", _beside(field, [tuner, mezo]), win_rate)
    enter("win_rate_over_dizo", _beside(field, [tuner, *dizo]) if dizo else None, win_rate)
    enter("win_rate_over_controls", _beside(field, [tuner, *controls]) if controls else None, win_rate)
    enter("median_pass_ratio_to_mezo_loss", _ratios(field, tuner, mezo), median_ratio)
    enter("mean_loss_difference_to_mezo", _beside(field, [tuner, mezo]), mean_difference)
    counted = [pair for pair in field.pairs if _counts(field, tuner, pair) == "counted"]
    points = _beside(field, [tuner, mezo], "accuracy", counted) * 100 if counted else None
    enter("mean_accuracy_gain", points, mean_difference)
    enter("mean_accuracy_gain_all_pairs", _beside(field, [tuner, mezo], "accuracy") * 100, mean_difference)
    each = {label: estimate(_beside(field, [tuner, label]), win_rate) for label in controls}
    figures["win_rate_over_each_control"] = each
    figures["lowest_win_rate_over_a_control"] = min(each.values(), default=None)
    intervals["win_rate_over_each_control"] = {
        label: list(interval(_beside(field, [tuner, label]), win_rate)) for label in controls
    }
    return figures | {"pairs_in_accuracy_gain": len(counted), "intervals": intervals}


def _beside(
    field: VerdictField, contenders: Sequence[str], quantity: str = LOSS, pairs: Sequence[Pair] | None = None
) -> NDArray[np.float64]:
    """[pairs, seeds, contenders]."""
    return np.stack([field.of(contender, quantity, pairs) for contender in contenders], -1)


def _ratios(field: VerdictField, tuner: str, mezo: str) -> NDArray[np.float64]:
    return pass_ratios(field.runs, tuner, mezo, field.pairs)[..., None]


def _counts(field: VerdictField, tuner: str, pair: Pair) -> str:
    mezo = field.labels(BASELINE_MEZO)[0]
    theirs, own = (float(field.of(label, "accuracy", [pair]).mean()) for label in (mezo, tuner))
    return accuracy_counts(theirs, own, field.majority[pair])


def pair_rows(field: VerdictField, tuner: str) -> list[dict[str, Any]]:
    """Pair by pair: what the figures of a tuner are made of."""
    mezo = field.labels(BASELINE_MEZO)[0]
    ratios = pass_ratios(field.runs, tuner, mezo, field.pairs)
    return [
        {
            "setting": pair[0],
            "task": pair[1],
            "majority_share": field.majority[pair],
            "accuracy": _counts(field, tuner, pair),
            "mean_train_loss": {label: float(field.of(label, LOSS, [pair]).mean()) for label in field.roles},
            "mean_dev_loss": {label: float(field.of(label, "dev_loss", [pair]).mean()) for label in field.roles},
            "mean_accuracy": {label: float(field.of(label, "accuracy", [pair]).mean()) for label in field.roles},
            "pass_ratio_to_mezo_loss": [float(ratio) for ratio in row],
        }
        for pair, row in zip(field.pairs, ratios, strict=True)
    ]


def win_matrix(field: VerdictField) -> list[list[float]]:
    """[contenders, contenders]: the share of pairs on which the row's contender beats the column's."""
    losses = [field.of(label, LOSS) for label in field.roles]
    return [[float(beats(mine, other).mean()) for other in losses] for mine in losses]


LINES = ("runs",)
"""Lists whose entries take a line each."""


def write_verdict(target: Path, verdict: Mapping[str, Any]) -> Path:
    """Write a verdict. Numbers that are not finite (a run that diverged, a loss never reached) are written as null."""
    plain = finite(verdict)
    lines = {name: plain.pop(name) for name in LINES if name in plain}
    text = json.dumps(plain, indent=1, allow_nan=False)[:-2]
    for name, entries in lines.items():
        rows = ",\n".join(f"  {json.dumps(entry, allow_nan=False)}" for entry in entries)
        text += f',\n "{name}": [\n{rows}\n ]'
    return write_whole(target, lambda path: path.write_text(text + "\n}\n"))


def finite(value: Any) -> Any:
    """The value as JSON has it, None in place of infinities and what is not a number."""
    if isinstance(value, Mapping):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
