"""The embedded model and a pool of two of its tasks, loaded once."""

from __future__ import annotations

import pytest

import l2l
from l2l.meta.config import MetaTrainConfig
from l2l.meta.pool import load_pool


@pytest.fixture(scope="session")
def tiny():
    """(model, pool); tests leave the model's weights as they were."""
    model = l2l.load_model("l2l/tiny")
    tasks = ["world_topic", "world_job"]
    config = MetaTrainConfig(tasks=tasks, batch_size=4, train_size=16, dev_size=4, progress=False)
    return model, load_pool(tasks, config, model, l2l.load_tokenizer("l2l/tiny"), 128)
