"""The model as it comes: what every run begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from l2l.train.baselines.base import Baseline, Found, sampled, scored
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import RunInputs


@final
@dataclass(frozen=True)
class ZeroShot(Baseline):
    """Nothing is trained and nothing shown: the prompt alone."""

    def measure(self, ground: RunInputs, config: FineTuneConfig) -> Found:
        train = scored(ground, config, sampled(ground, config))
        dev, test = (scored(ground, config, rows) for rows in (ground.splits.dev, ground.splits.test))
        return Found(train, train, dev, test)
