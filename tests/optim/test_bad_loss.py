"""Numbers that go wrong: NaN, inf and exploding losses at chosen steps, under every policy of ``on_bad_loss`` and every method.

Tried because others met them: epfLLM/Megatron-LLM #33 (losses of NaN from some step on, while the counter of skipped steps
stays 0), PrimeIntellect-ai/prime-rl #1110 (one NaN hides a mean), facebookresearch/mmf #1073 (a step that is left out must
leave out the optimizer's state too), skinniderlab/CLM #284 (when nothing but NaN comes, the run is to end).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import METHODS, PROBLEMS, MethodCase, Quadratic, farthest, named, optimizer_for, same_bits, weights
from daily import daily_slice

import l2l
from l2l import bad_loss
from l2l.bad_loss import BadLosses, Policy, explodes, gradient_limit, loss_limit
from l2l.cli import main
from l2l.estimators import BadLoss
from l2l.optim import ZOOptimizer
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import Closures

pytestmark = pytest.mark.in_turn

QUADRATIC = PROBLEMS[0]
POLICIES = ("skip", "clip", "rollback:3")
SOME = [case for case in METHODS if named(case) in ("mezo", "dizo-interval=3-iterations=2", "adam-num_directions=8", "fzoo")]
each_method = pytest.mark.parametrize("case", daily_slice(METHODS, 3, always=SOME, name=named))


def step(optimizer: ZOOptimizer, model: torch.nn.Module, factors: Mapping[int, float]) -> float:
    """A step whose losses are multiplied by a factor, where its number has one."""
    factor = factors.get(optimizer.steps_done, 1.0)
    return optimizer.step(lambda: model() * factor)


def run(optimizer: ZOOptimizer, model: torch.nn.Module, steps: int, factors: Mapping[int, float]) -> list[dict[str, Any]]:
    """The weights before each step, and after the last."""
    seen = [weights(model)]
    for _ in range(steps):
        step(optimizer, model, factors)
        seen.append(weights(model))
    return seen


def test_the_definitions_are_one_line_each():
    seen = BadLosses()
    for loss in [2.0, *[1.0] * 14]:
        seen = seen.after(loss, gradient=0.5)
    assert loss_limit(seen) == gradient_limit(seen) == math.inf  # the warm-up is not over
    seen = seen.after(1.0, 0.5)
    assert loss_limit(seen) == 1.0 + bad_loss.EXPLODING * 2.0
    assert gradient_limit(seen) == bad_loss.CLIP * 0.5
    assert explodes(7.1, seen) and not explodes(7.0, seen)
    later = seen
    for _ in range(100):
        later = later.after(5.0, 2.0)  # the run drifts: medians follow, what it began with stays the scale
    assert (loss_limit(later), gradient_limit(later)) == (5.0 + 6.0, 20.0)
    assert len(later.losses) == bad_loss.WINDOW
    assert loss_limit(BadLosses(losses=(0.0,) * 20, made=20)) == math.inf  # no scale is known


@pytest.mark.parametrize("text", ["", "ignore", "rollback", "rollback:", "rollback:0", "rollback:-1", "rollback:1.5", "skip:2"])
def test_other_policies_are_refused_in_one_line(text):
    with pytest.raises(ValueError, match="on_bad_loss="):
        Policy.parse(text)
    with pytest.raises(ValueError, match="on_bad_loss="):
        FineTuneConfig(on_bad_loss=text)


@each_method
@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_raise_leaves_the_weights_and_says_what_happened(case: MethodCase, factor: float):
    model = QUADRATIC.make()
    optimizer = optimizer_for(case, model, QUADRATIC)
    before = run(optimizer, model, 2, {})[-1]
    with pytest.raises(FloatingPointError):
        step(optimizer, model, {2: factor})
    assert farthest(weights(model), before) < 1e-5
    assert optimizer.steps_done == 2


@each_method
@pytest.mark.parametrize("policy", POLICIES)
def test_a_loss_that_is_not_finite_makes_no_update(case: MethodCase, policy: str):
    """The steps before and after are those of a run in which the bad ones do not happen, but for roundings of the walk."""
    model = QUADRATIC.make()
    optimizer = optimizer_for(case, model, QUADRATIC, on_bad_loss=policy)
    seen = run(optimizer, model, 7, {4: math.nan})
    assert optimizer.report is not None and optimizer.bad_losses.nonfinite == 1 and optimizer.steps_done == 7
    if policy == "rollback:3":
        assert same_bits(seen[5], seen[1])
        assert optimizer.bad_losses.rollbacks == 1
    else:
        assert farthest(seen[5], seen[4]) < 1e-5
        assert optimizer.bad_losses.skipped == 1
    assert any(not torch.equal(seen[7][name], seen[5][name]) for name in seen[7])
    assert all(value.isfinite().all() for value in seen[7].values())


@each_method
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_that_is_resumed_is_the_same_to_the_last_bit(case: MethodCase, policy: str):
    factors = {2: math.nan, 5: math.inf, 18: 1e4, 21: math.nan}
    whole = QUADRATIC.make()
    run(first := optimizer_for(case, whole, QUADRATIC, on_bad_loss=policy), whole, 24, factors)
    model = QUADRATIC.make()
    optimizer = optimizer_for(case, model, QUADRATIC, on_bad_loss=policy)
    for _ in range(4):  # at steps 6, 12, 18 and 24
        run(optimizer, model, 6, factors)
        torch.save({"weights": model.state_dict(), "optimizer": optimizer.state_dict()}, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
        model = QUADRATIC.make()
        optimizer = optimizer_for(case, model, QUADRATIC, on_bad_loss=policy)
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    assert same_bits(weights(model), weights(whole))
    assert optimizer.bad_losses == first.bad_losses
    assert first.bad_losses.nonfinite == 3


@each_method
def test_a_rollback_is_exact_and_goes_on_with_the_next_keys(case: MethodCase):
    """After it, the run is that of an optimizer with the state of N steps ago whose next step is the one after the bad one."""
    model, other = QUADRATIC.make(), QUADRATIC.make()
    optimizer = optimizer_for(case, model, QUADRATIC, on_bad_loss="rollback:2")
    run(optimizer, model, 3, {})
    kept, at = weights(model), optimizer.state_dict()
    torch.save(at, file := io.BytesIO())
    run(optimizer, model, 3, {5: math.nan})
    assert same_bits(weights(model), kept)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    state["zeroth_order"]["step"] = 6
    again = optimizer_for(case, other, QUADRATIC, on_bad_loss="rollback:2")
    other.load_state_dict(kept, strict=False)
    again.load_state_dict(state)
    run(optimizer, model, 3, {})
    run(again, other, 3, {})
    assert same_bits(weights(model), weights(other))


def explosion(policy: str, lr: float = 1e-3, factor: float = 1e4) -> tuple[ZOOptimizer, list[dict[str, Any]], torch.nn.Module]:
    model = Quadratic()
    optimizer = l2l.MeZO(model, lr=lr, on_bad_loss=policy)
    return optimizer, run(optimizer, model, 22, {20: factor}), model


def test_an_exploding_loss_raises_skips_is_clipped_or_rolls_back():
    with pytest.raises(BadLoss, match="counts as exploding"):
        explosion("raise")
    skipped, seen, _ = explosion("skip")
    assert farthest(seen[21], seen[20]) < 1e-5
    assert skipped.bad_losses.counts == {"nonfinite": 0, "exploding": 1, "skipped": 1, "clipped": 0, "rollbacks": 0}
    back, seen, _ = explosion("rollback:5")
    assert same_bits(seen[21], seen[15])
    assert back.bad_losses.counts == {"nonfinite": 0, "exploding": 1, "skipped": 0, "clipped": 0, "rollbacks": 1}


def test_clip_bounds_the_step_by_the_stated_multiple_of_the_running_median():
    optimizer, seen, _ = explosion("clip")
    assert optimizer.bad_losses.counts == {"nonfinite": 0, "exploding": 1, "skipped": 0, "clipped": 1, "rollbacks": 0}
    limit = bad_loss.CLIP * sorted(optimizer.bad_losses.gradients[:20])[9:11][0]
    noise = torch.linalg.vector_norm(torch.cat([(seen[21][n] - seen[20][n]).flatten() for n in seen[21]]))
    assert noise < 1e-3 * 2 * limit * math.sqrt(26) * 1.5
    assert max(optimizer.bad_losses.gradients) == gradient_limit(
        BadLosses(gradients=optimizer.bad_losses.gradients[:20], made=20, losses=(1.0,))
    )


def test_the_norm_of_a_first_order_step_is_clipped_and_its_bad_loss_skipped():
    from l2l.methods.registry import build_method

    for policy, factors, count in (("clip", {20: 1e6}, "clipped"), ("skip", {20: math.nan}, "skipped")):
        model = Quadratic()
        optimizer = ZOOptimizer(model, build_method("sgd", 1e-3, {}, None, model), lr=1e-3, on_bad_loss=policy)
        seen = run(optimizer, model, 22, factors)
        assert optimizer.bad_losses.counts[count] == 1
        moved = [farthest(seen[t + 1], seen[t]) for t in (19, 20)]
        assert moved[1] == 0.0 if policy == "skip" else moved[0] < moved[1] <= 1.001 * bad_loss.CLIP * moved[0] * 2


def test_the_largest_loss_of_a_step_counts_not_their_mean():
    """One of eight directions explodes, and the mean of the losses stays under the limit."""
    model = Quadratic()
    optimizer = l2l.MeZO(model, lr=1e-4, num_directions=8, on_bad_loss="skip")
    run(optimizer, model, 16, {})
    limit, calls = loss_limit(optimizer.bad_losses), iter(range(16))
    optimizer.step(lambda: model() + (1.01 * limit if next(calls) == 3 else 0.0))
    assert optimizer.bad_losses.exploding == 1


def test_a_run_in_which_nothing_is_trained_any_more_ends():
    model = Quadratic()
    optimizer = l2l.MeZO(model, on_bad_loss="skip")
    for _ in range(bad_loss.IN_A_ROW - 1):
        assert math.isnan(optimizer.step(lambda: model() * math.nan))
    with pytest.raises(FloatingPointError, match=f"{bad_loss.IN_A_ROW} steps in a row"):
        optimizer.step(lambda: model() * math.nan)


def test_copies_that_do_not_fit_are_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr("l2l.optim.available_bytes", lambda device="cpu": 300)
    with pytest.raises(ValueError, match="keeps 4 copies of 104 bytes"):
        l2l.MeZO(Quadratic(), on_bad_loss="rollback:3")
    l2l.MeZO(Quadratic(), on_bad_loss="rollback:1")
    l2l.MeZO(Quadratic(), on_bad_loss="skip")


def test_half_precision_rolls_back_with_its_masters():
    model = Quadratic().bfloat16()
    optimizer = l2l.MeZO(model, lr=1e-5, on_bad_loss="rollback:2")
    run(optimizer, model, 3, {})
    before = {name: value.clone() for name, value in optimizer.theta.extra_state().items()}
    run(optimizer, model, 3, {5: math.nan})
    assert before and same_bits(before, optimizer.theta.extra_state())


# Runs.


SMALL: dict[str, Any] = {
    **{"lr": 1e-3, "steps": 12, "batch_size": 4, "train_size": 24, "dev_size": 8, "test_size": 8, "eval_every": 6},
    **{"checkpoint_every": 4, "log_every": 5, "progress": False},
}


@pytest.fixture
def broken(monkeypatch) -> Callable[..., None]:
    """Multiplies the losses of chosen steps of the runs that follow."""
    at = Closures.at

    def breaks(factors: Mapping[int, float], interrupt: int | None = None) -> None:
        def broken_at(self: Closures, number: int) -> Callable[[], Any]:
            if number == interrupt:
                raise KeyboardInterrupt
            closure, factor = at(self, number), factors.get(number)
            return closure if factor is None else lambda: closure() * factor

        monkeypatch.setattr(Closures, "at", broken_at)

    return breaks


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loop", ["bare", "lightning"])
def test_a_fine_tuning_run_counts_and_shows_what_went_wrong(policy, loop, broken, tmp_path, capsys):
    broken({0: math.nan, 7: math.inf})
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["fine-tune", *options, f"--out={tmp_path}", f"--on_bad_loss={policy}", f"--loop={loop}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    what = "rollbacks" if policy.startswith("rollback") else "skipped"
    assert summary["bad_losses"]["policy"] == policy
    assert summary["bad_losses"]["nonfinite"] == summary["bad_losses"][what] == 2
    assert math.isfinite(summary["final_loss"])
    with (tmp_path / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert [rows[number]["bad_losses"] for number in (0, 5, 7, 10)] == ["1", "1", "2", "2"]
    assert [rows[number]["train_loss"] for number in (0, 7)] == ["nan", "inf"]
    assert f"nonfinite 2, {what} 2" in capsys.readouterr().out


@pytest.mark.parametrize("policy", POLICIES)
def test_an_interrupted_run_with_bad_losses_ends_with_the_same_weights(policy, broken, tmp_path):
    factors = {2: math.nan, 9: math.nan}
    broken(factors)
    whole = l2l.fine_tune(out=str(tmp_path / "whole"), on_bad_loss=policy, **SMALL)
    broken(factors, interrupt=6)
    with pytest.raises(KeyboardInterrupt):
        l2l.fine_tune(out=str(tmp_path / "broken"), on_bad_loss=policy, **SMALL)
    broken(factors)
    continued = l2l.fine_tune(out=str(tmp_path / "broken"), on_bad_loss=policy, **SMALL)
    assert same_bits(weights(continued.model), weights(whole.model))
    assert continued.summary["bad_losses"] == whole.summary["bad_losses"]


def test_by_default_a_bad_loss_ends_the_run_with_one_line(broken, tmp_path, capsys):
    broken({3: math.nan})
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["fine-tune", *options, f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the loss is nan" in said


def test_a_picture_has_no_gap_that_spreads(tmp_path):
    from l2l.train.trainer import draw_curves

    lines = ["step,train_loss,dev_loss", *(f"{t},{'nan' if t == 3 else 1.0}," for t in range(6))]
    Path(tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert draw_curves(tmp_path).is_file()
