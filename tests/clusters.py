"""A Ray cluster of several machines, all of which are this one, for the tests that need Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WHY = "Ray is not installed: pip install 'l2l[ray]' runs this test"


@contextmanager
def ray_cluster(machines: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """The cluster, and its machines beside the first, which does no work; each has one processor."""
    ray = pytest.importorskip("ray", reason=WHY)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(machines)]
    finally:
        ray.shutdown()
        cluster.shutdown()


def until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)
