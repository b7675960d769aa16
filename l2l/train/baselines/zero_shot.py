"""The untrained model, with which every run begins."""

from dataclasses import dataclass
from typing import final

from l2l.train.baselines import Baseline, BaselineScores, grouping_of
from l2l.train.inputs import RunInputs


@final
@dataclass(frozen=True)
class ZeroShot(Baseline):
    """No training and no demonstrations: the prompt alone."""

    def measure(self, inputs: RunInputs) -> BaselineScores:
        splits, grouping = inputs.splits, grouping_of(inputs)
        train, dev, test = (inputs.score(rows, grouping) for rows in (inputs.reported_train, splits.dev, splits.test))
        return BaselineScores(train, train, dev, test)
