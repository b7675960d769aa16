"""Shared by all tests: one thread, no network, SIGINT as in a terminal, and fixtures of the contract tests."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import daily
import pytest
import torch
from cases import PROBLEMS, Problem

from l2l.noise import Key


def pytest_configure() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


def pytest_report_header() -> str:
    return f"daily slice of the grids: L2L_TEST_DAY={daily.DAY}"


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("in_turn") and not daily.is_due(item.nodeid):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def key() -> Key:
    return Key(seed=7, step=3)


@pytest.fixture(params=PROBLEMS, ids=lambda problem: problem.name)
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.param
