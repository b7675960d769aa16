"""Predicted time: arithmetic over speeds, and speeds that are measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_sizes import LOAD, SHAPE

import l2l.costs as calibrate
from l2l.costs import (
    Load,
    Plan,
    Speeds,
    forward_flops,
    forward_seconds,
    meta_model,
    model_shape,
    step_passes,
    step_seconds,
    traversal_seconds,
)
from l2l.models.shapes import shape_config

IN_PLACE, FUNCTIONAL = Plan(torch.float32, "in_place", "direct"), Plan(torch.float32, "functional", "direct")
FREE = Speeds(1e30, 1e30, 0, 0, 0, 0, 1e30, 1e30, 0)


def with_speed(**values: float) -> Speeds:
    return Speeds(**{**vars(FREE), **values})


def test_the_arithmetic_of_a_forward_pass_is_that_of_torch():
    from torch.utils.flop_counter import FlopCounterMode

    from l2l.models.shapes import tiny_random

    model = tiny_random("opt", _attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 10, dtype=torch.int64))
    predicted = forward_flops(model_shape(model), Load(rows=3, length=10, read=30))
    assert sum(predicted.values()) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("speeds", "seconds"),
    [
        (with_speed(matrices=1000.0), 2 * 64 * 400 / 1000),
        (with_speed(head=1000.0), 2 * 4 * 600 / 1000),
        (with_speed(attention=0.5), 1.0),
        (with_speed(pointwise=0.25), 0.5),
        (with_speed(module=0.1), 0.9),
        (with_speed(logits=0.01), 4 * 75 * 0.01),
    ],
)
def test_each_speed_counts_for_its_share_of_a_forward_pass(speeds: Speeds, seconds: float):
    assert forward_seconds(SHAPE, LOAD, speeds) == pytest.approx(seconds)


def test_a_step_in_place_has_two_traversals_and_a_functional_one_three():
    speeds = with_speed(one_stream=1000.0, two_streams=500.0)
    assert traversal_seconds(SHAPE, step_passes(IN_PLACE), speeds) == pytest.approx(1 + 2)
    assert traversal_seconds(SHAPE, step_passes(FUNCTIONAL), speeds) == pytest.approx(3)
    assert traversal_seconds(SHAPE, step_passes(replace(FUNCTIONAL, learned=True)), speeds) == pytest.approx(4)
    assert traversal_seconds(SHAPE, step_passes(IN_PLACE), with_speed(block=0.5)) == pytest.approx(2 * 3 * 0.5)
    # Of 8 directions each is made on the way there, on the way back and in the update, the last two being one for the last.
    population = replace(IN_PLACE, passes=9.0, num_directions=8, one_sided=True)
    made = step_passes(population).one_stream + 2 * step_passes(population).two_streams
    assert made == 3 * 8 - 1


def test_draws_and_searches_cost_forward_passes():
    assert replace(FUNCTIONAL, passes=35.0, whole_passes=3.0).work(16) == 5 and FUNCTIONAL.work(16) == FUNCTIONAL.passes
    assert step_passes(IN_PLACE).forwards == 2
    assert step_passes(replace(IN_PLACE, passes=8.0)).forwards == 8
    assert step_passes(IN_PLACE, every=5).forwards == pytest.approx(2.2)
    assert step_passes(FUNCTIONAL, every=5).forwards == pytest.approx(2.2)


def test_a_step_is_its_forward_passes_and_its_traversals():
    speeds = with_speed(attention=0.5, one_stream=1000.0)
    assert step_seconds(SHAPE, LOAD, step_passes(IN_PLACE), speeds) == pytest.approx(2 * 1.0 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_speeds_are_measured_once_and_nothing_random_is_drawn(dtype: torch.dtype):
    shape = model_shape(meta_model(shape_config("opt-tiny-shape")))
    load = Load(4, 16, 4)
    before = torch.get_rng_state()
    speeds = calibrate.speeds_for(shape, load, dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(0 < value < float("inf") for value in vars(speeds).values())
    assert calibrate.speeds_for(shape, load, dtype) == speeds  # of two measurements, some digit would differ
