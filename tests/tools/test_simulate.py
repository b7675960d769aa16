"""``l2l simulate``: its parts against what is known of them, and its table."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from math import pi
from pathlib import Path
from statistics import mean

import pytest

from l2l.cli import main
from l2l.tools.simulate import (
    Copy,
    Network,
    SimulateConfig,
    assumptions,
    backpropagation,
    copies,
    copy_of,
    data_parallel,
    expected_place,
    gathered_floats,
    markdown_table,
    population,
    ring_all_reduce,
    shared_floats,
    simulated,
    waiting,
)

COPY = Copy(fixed=0.25, per_token=0.5, traversal=0.125, noise=0.0625)
FREE = Network(latency=0.0, bandwidth=float("inf"))
SLOW = Network(latency=1.0, bandwidth=64.0)


def test_one_rank_sends_nothing_and_waits_for_nobody():
    for found in (
        data_parallel(COPY, SLOW, 1, 8),
        population(COPY, SLOW, 1, 8, 4),
        backpropagation(COPY, SLOW, 1, 8, 1e6, 4),
    ):
        assert (found.exchange, found.waiting, found.bytes_sent) == (0, 0, 0)
    assert data_parallel(COPY, SLOW, 1, 8).total == 2 * (0.25 + 0.5 * 8) + 2 * 0.125
    assert population(COPY, SLOW, 1, 8, 4).total == 4 * 2 * (4.25 + 0.125) + max(0.125, 4 * 0.0625)


def test_splitting_the_batch_divides_what_grows_with_tokens_and_nothing_else():
    assert data_parallel(COPY, FREE, 4, 8).compute == 2 * (0.25 + 0.5 * 2)
    assert data_parallel(COPY, FREE, 4, 8).noise == data_parallel(COPY, FREE, 1, 8).noise


def test_a_population_is_bounded_by_the_noise_of_all_its_directions():
    many = population(COPY, FREE, 10**6, 8, 10**6)
    assert many.compute == 2 * 4.25  # one direction each
    assert many.noise == 2 * 0.125 + 10**6 * 0.0625


def test_messages_are_those_of_the_algorithms():
    assert shared_floats(SLOW, 8, 2) == (3 * (1 + 16 / 64), 48)
    assert gathered_floats(SLOW, 4, 16) == (2 + 96 / 64, 96)
    assert ring_all_reduce(SLOW, 4, 256.0) == (6 * (1 + 64 / 64), 384)


def test_what_the_backward_pass_hides_is_not_waited_for():
    hidden = backpropagation(COPY, SLOW, 2, 64, 128.0, 1)  # 2 messages of 1 + 1 s, backward 2 * 16.25 s
    assert hidden.exchange == 0 and hidden.bytes_sent == 128
    shown = backpropagation(COPY, SLOW, 2, 64, 64 * 40.0, 1)  # 2 messages of 1 + 20 s
    assert shown.exchange == 42 - 2 * 16.25


def test_the_latest_of_some_ranks_is_as_late_as_by_drawing_them():
    assert expected_place(2, 2) == pytest.approx(pi**-0.5, abs=0.05)  # exact: 1 / sqrt(pi)
    drawn = random.Random(0)
    for place, ranks in ((8, 8), (6, 8), (64, 64)):
        sorted_ranks = (sorted(drawn.gauss(0, 1) for _ in range(ranks)) for _ in range(4000))
        assert expected_place(place, ranks) == pytest.approx(mean(found[place - 1] for found in sorted_ranks), abs=0.05)


def test_a_quorum_waits_less_and_never_gains_time():
    late = replace(FREE, spread=0.2)
    assert waiting(1.0, late, 64) > waiting(1.0, late, 64, 0.9) > waiting(1.0, late, 64, 0.5) == 0


def test_ranks_that_share_cores_take_turns():
    shared = replace(FREE, cores=2)
    assert data_parallel(COPY, shared, 2, 8).compute == data_parallel(COPY, FREE, 2, 8).compute
    assert data_parallel(COPY, shared, 4, 8).compute == 2 * data_parallel(COPY, FREE, 4, 8).compute


def test_a_copy_takes_as_many_gpus_as_its_bytes_need():
    config = SimulateConfig()
    assert copies(config, 1e9, 8, config.weight_bytes) == (1, 8)
    assert copies(config, 70e9, 8, config.weight_bytes) == (4, 2)  # 140 GB of 64 each
    assert copies(config, 70e9, 8, config.training_bytes) == (32, 0)  # 1,120 GB
    assert copy_of(config, 1e12, 32).per_token == pytest.approx(2e12 / 32 / (989e12 * 0.4))


def test_every_number_of_the_table_has_its_reason():
    found = {row["assumption"]: row["what it is"] for row in assumptions(SimulateConfig())}
    inputs = {"parameters", "gpus", "out", "overwrite"}
    assert found.keys() | inputs == vars(SimulateConfig()).keys()
    assert all(len(reason) > 20 for reason in found.values())


def test_the_command_prints_the_table_and_leaves_it(tmp_path: Path, capsys):
    options = ["--parameters", "[7.0e10]", "--gpus", "[8, 64]", "--latency", "1e-3"]
    assert main(["simulate", *options, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "nothing here is measured" in said and "0.001" in said
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert rows == [row for gpus in (8, 64) for row in simulated(SimulateConfig(gpus=[gpus], latency=1e-3), 7e10, gpus)]
    assert [row["copies"] for row in rows] == [2, 2, 0, 16, 16, 2]


@pytest.mark.parametrize("options", [{"quorum": 0.0}, {"spread": 1.0}, {"gpus": [0]}, {"parameters": [-1e9]}, {"latency": 0.0}])
def test_what_means_nothing_is_refused_by_its_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SimulateConfig(**options)


def test_the_table_of_the_documentation_is_that_of_the_defaults():
    page = (Path(__file__).parent.parent.parent / "docs" / "scale.md").read_text()
    assert "\n".join(markdown_table(SimulateConfig())) in page
