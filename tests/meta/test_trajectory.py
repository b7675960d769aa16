"""Trajectories of the model: SGD with momentum, zeroth-order steps, and steps taken again from their reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bowl import TINY, Bowl, basis, close, point_on, tuner_of, weights_of
from cases import weights
from torch import nn

import l2l
from l2l.meta.config import MetaTrainConfig
from l2l.meta.module import MetaTraining
from l2l.meta.objectives.one_step_loss import OneStepLoss
from l2l.meta.run import prepare_meta_training
from l2l.meta.trajectory import momentum_step, replay, zero_velocity
from l2l.noise import Key
from l2l.optim import zo_step
from l2l.params import Blocks, PerturbedParameters
from l2l.report.run_directory import RunDirectory


def test_the_trajectory_is_sgd_with_momentum_where_nothing_is_clipped():
    ours, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    reference.load_state_dict(ours.state_dict())
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    theta = PerturbedParameters(Blocks.of(ours))
    velocity = zero_velocity(theta.blocks)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.8)
    for _ in range(5):
        momentum_step(lambda: ours(data).square().mean(), theta, velocity, 0.1, momentum=0.8, clip=1e6)
        sgd.zero_grad()
        reference(data).square().mean().backward()
        sgd.step()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_trajectory_limits_the_velocity_and_falls_to_zero_before_each_restart():
    config = MetaTrainConfig(inner_lr=0.5, restart_every=4)
    assert [config.inner_lr_at(step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.5, 0.375]
    model = nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()
    theta = PerturbedParameters(Blocks.of(model))
    momentum_step(lambda: 1e3 * model.weight.sum(), theta, zero_velocity(theta.blocks), 1.0, 0.5, 0.1)
    assert torch.linalg.vector_norm(model.weight - before).item() == pytest.approx(0.1 / 0.5, rel=1e-5)


def test_a_mixture_gives_whole_periods_to_either_kind_by_the_seed():
    config = MetaTrainConfig(restart_every=3, trajectory="mixture", zo_share=0.25, seed=1)
    kinds = [config.zeroth_order(step) for step in range(3 * 400)]
    assert all(len(set(kinds[start : start + 3])) == 1 for start in range(0, len(kinds), 3))
    assert sum(kinds) / len(kinds) == pytest.approx(0.25, abs=0.08)
    assert kinds != [replace(config, seed=2).zeroth_order(step) for step in range(len(kinds))]
    assert not MetaTrainConfig().zeroth_order(0) and MetaTrainConfig(trajectory="zo").zeroth_order(0)


def test_a_step_can_be_taken_again_from_what_it_saw():
    model = Bowl()
    point = point_on(model, tuner_of(model, basis()), lr=0.1)
    report = OneStepLoss()(point).report
    before = weights_of(model)
    replay(point.theta, report, point.lr)
    again = weights_of(model)
    for parameter, kept in zip(model.parameters(), before, strict=True):
        parameter.data.copy_(kept)
    zo_step(point.closure, point.theta, point.method, point.history, point.key, [point.lr] * 2)
    assert close(model, again)
    assert not close(model, before)


def test_the_zeroth_order_trajectory_is_the_run_that_fine_tuning_would_do(tmp_path):
    config = MetaTrainConfig(**{**TINY, "trajectory": "zo", "lr": 1e-3, "tasks": ["world_job"], "restart_every": 9})
    ends = []
    for own in (True, False):
        inputs = prepare_meta_training(config, None, None)
        learner = MetaTraining(inputs, config, RunDirectory(str(tmp_path / "out"), {}))
        history, batcher = learner.histories[0], inputs.pool[0].batcher
        for step in range(3):
            if own:
                outcome, closure = learner.outer_loss(step)
                learner.inner_step(step, closure, outcome)
            else:
                closure = learner.meta_state(step, 0, step).closure
                rates = [config.lr] * len(learner.theta.blocks)
                history, _ = zo_step(closure, learner.theta, learner.method, history, Key(0, step), rates)
        assert batcher.batch_size == 2
        ends.append(weights(inputs.model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, weights(l2l.load_model("l2l/tiny"))[name]) for name, value in ends[0].items())
