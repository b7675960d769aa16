"""A run is rebuilt from its log without data or forward passes, bit for bit; and a log that is not whole says so.

The kind of fault: weights are all that a run leaves, and they cannot be checked, taken back or shared in small.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import METHODS, PROBLEMS, MethodCase, TiedLM, named, optimizer_for, same_bits, weights
from daily import daily_slice
from fake_hub import running

import l2l
from l2l.cli import main
from l2l.estimators import MicroBatched
from l2l.noise import dispatch
from l2l.optim import ZOOptimizer
from l2l.train import runlog
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import Closures, weights_digests
from l2l.train.replay import find_log, replay
from l2l.train.runlog import RunLog, StepRecord, read_log, run_header
from l2l.train.trainer import RunContext, prepare_fine_tuning

pytestmark = pytest.mark.in_turn

TIED, STEPS = PROBLEMS[-1], 8
SMALL: dict[str, Any] = {
    **{"task": "world_topic", "steps": 12, "batch_size": 4, "train_size": 24, "dev_size": 8, "test_size": 8, "lr": 1e-3},
    **{"eval_every": 3, "checkpoint_every": 5, "log_every": 1, "progress": False},
}


@contextlib.contextmanager
def computed_by(backend: str, threads: int) -> Iterator[None]:
    """Noise by a backend, on a number of threads."""
    before, variable = torch.get_num_threads(), os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = backend
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop(dispatch.VARIABLE)
        if variable is not None:
            os.environ[dispatch.VARIABLE] = variable


def ran(optimizer: ZOOptimizer, closure: Any, folder: Path) -> None:
    """Some steps, with a read of the weights between them, and the log of a run."""
    log = RunLog(folder, {"epsilon": getattr(optimizer.method, "epsilon", None)})
    with optimizer.theta.fused_steps():
        for step in range(STEPS):
            if step == 5:
                optimizer.theta.restore()
            optimizer.step(closure)
            assert optimizer.report is not None
            log.append(StepRecord.of(optimizer.report, optimizer.param_groups[0]["lr"], b"abc", step == 5))
    log.close()


@pytest.mark.parametrize("case", METHODS, ids=named)
def test_every_method_is_replayed_to_the_bit_or_says_why_not(case: MethodCase, tmp_path):
    model, again = TiedLM(), TiedLM()
    optimizer = optimizer_for(case, model, TIED, seed=3)
    ran(optimizer, model, tmp_path)
    if optimizer.method.not_replayable:
        assert case.name in ("agzo", "hybrid+mezo") or case.args.get("sparse", {}).get("kind") == "wanda"
        return
    replay(read_log(tmp_path / runlog.NAME), optimizer_for(case, again, TIED, seed=3), STEPS)
    assert same_bits(weights(model), weights(again))
    assert not same_bits(weights(model), weights(TiedLM()))


BAD = {2: float("nan"), 9: float("inf"), 18: 1e4, 21: float("nan")}
"""Step -> what its losses are multiplied by; from the 17th step on a large one explodes."""
POLICIES = ("skip", "clip", "rollback:3")
BROKEN = ("mezo", "mezo auto", "learned auto", "rsgn", "dizo on accuracy", "bfloat16", "micro-batches", "lightning")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "case", daily_slice(METHODS, 2, [case for case in METHODS if case.name in ("mezo", "forward_grad")], named)
)
def test_steps_that_were_dropped_clipped_or_rolled_back_are_replayed(case: MethodCase, policy: str, tmp_path):
    """NaN of a step that had evaluated a part of its losses, an infinity, and a spike."""
    model, again = TiedLM(), TiedLM()
    optimizer = optimizer_for(case, model, TIED, seed=3, on_bad_loss=policy)
    if optimizer.method.not_replayable:
        return
    log, calls = RunLog(tmp_path, {"epsilon": getattr(optimizer.method, "epsilon", None)}), 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model() * (BAD.get(optimizer.steps_done, 1.0) if calls > (optimizer.steps_done != 21) else 1.0)

    with optimizer.theta.fused_steps():
        for _ in range(24):
            calls, restored = 0, optimizer.steps_done > 0 and optimizer.theta.displacement.restored
            optimizer.step(closure)
            assert optimizer.report is not None
            log.append(StepRecord.of(optimizer.report, optimizer.param_groups[0]["lr"], b"abc", restored))
    log.close()
    other = optimizer_for(case, again, TIED, seed=3, on_bad_loss=policy)
    replay(read_log(tmp_path / runlog.NAME), other, 24)
    assert same_bits(weights(model), weights(again))
    assert repr(other.bad_losses) == repr(optimizer.bad_losses)
    assert optimizer.bad_losses.nonfinite == 3
    dropped = [step["step"] for step in runlog.read_run_log(tmp_path)[1] if "dropped" in step]
    assert dropped in ([2, 9, 21], [2, 9, 18, 21])
    assert (18 in dropped) == (policy != "clip" and optimizer.bad_losses.exploding > 0)


@pytest.mark.parametrize(
    ("backend", "threads", "case"),
    daily_slice(
        [
            (backend, threads, case)
            for backend, threads in (("native", 2), ("numba", 2), ("reference", 1))
            for case in METHODS
            if case.name in ("mezo", "adam", "learned", "fzoo")
        ],
        3,
        name=lambda backend, threads, case: f"{backend}-{threads}-{case.name}",
    ),
)
def test_backends_and_threads_give_the_same_bytes(case: MethodCase, backend: str, threads: int, tmp_path):
    if problem := dispatch.backend_problem(backend):
        pytest.skip(problem)
    model, again = TiedLM(), TiedLM()
    ran(optimizer_for(case, model, TIED), model, tmp_path)
    with computed_by(backend, threads):
        replay(read_log(tmp_path / runlog.NAME), optimizer_for(case, again, TIED), STEPS)
    assert same_bits(weights(model), weights(again))


RUNS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "mezo, cosine and decay": {"schedule": "cosine", "weight_decay": 0.1, "num_directions": 2},
    "mezo auto": {"lr": "auto"},
    "learned auto": {"lr": "auto", "method": "learned"},
    "learned+pseuzo": {"method": "learned+pseuzo", "lr": 1e-4},
    "rsgn": {"method": "rsgn", "lr": 1.0, "num_directions": 4},
    "sparse+lozo": {"method": "sparse+lozo", "train_layers": "top:1"},
    "forward_grad": {"method": "forward_grad", "lr": 1e-4},
    "dizo on accuracy": {"method": "dizo", "method_args": {"interval": 3, "iterations": 1}, "objective": "accuracy"},
    "mezo auto on accuracy": {"lr": "auto", "objective": "accuracy", "curvature_every": 2, "epsilon": 0.1},
    "lora": {"scheme": "lora", "method": "momentum"},
    "prefix": {"scheme": "prefix"},
    "head": {"scheme": "head", "freeze": "norm"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, stochastic": {"dtype": "bfloat16", "update": "stochastic", "lr": "auto"},
    "functional": {"perturb": "functional"},
    "micro-batches": {"micro_batch": 2, "method": "es", "lr": 1e-2},
    "lightning": {"loop": "lightning", "method": "subzero"},
}


@pytest.fixture(scope="module")
def tuner(tmp_path_factory) -> l2l.Tuner:
    return l2l.Tuner.for_model(l2l.load_model("l2l/tiny"), seed=1)


def saved_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:no loss has changed")  # the accuracy of few rows may stay what it is
@pytest.mark.parametrize("run", daily_slice(RUNS, 3, ["mezo auto"]))
def test_a_model_loaded_from_the_log_is_the_one_that_the_run_gave(run: str, tuner: l2l.Tuner, tmp_path):
    options = SMALL | RUNS[run]
    held = tuner.save_pretrained(tmp_path / "tuner") if "learned" in str(options.get("method")) else None
    given: dict[str, Any] = {"tuner": str(held)} if held else {}
    result = l2l.fine_tune("l2l/tiny", out=str(tmp_path / "run"), save="log", **options, **given)
    assert not (tmp_path / "run" / "model").exists()
    loaded = l2l.load_model("l2l/tiny", log=tmp_path / "run")
    assert same_bits(saved_weights(result.model), saved_weights(loaded))
    assert main(["replay", str(tmp_path / "run"), "--to", "last"]) == 0


@pytest.mark.filterwarnings("ignore:no loss has changed")  # the accuracy of few rows may stay what it is
@pytest.mark.parametrize(
    ("run", "policy"),
    daily_slice(
        [(run, policy) for run in BROKEN for policy in POLICIES],
        2,
        [("mezo", "rollback:3"), ("mezo auto", "skip")],
    ),
)
def test_a_run_with_bad_losses_is_rebuilt_and_its_log_says_which_steps_were_dropped(
    run: str, policy: str, tuner: l2l.Tuner, tmp_path, monkeypatch
):
    """The run is interrupted between the bad steps, and continued."""
    at, interrupt = Closures.at, 14

    def value(given: Any, factor: float) -> Any:
        return (given[0] * factor, given[1]) if isinstance(given, tuple) else given * factor

    def broken(self: Closures, number: int) -> Any:
        if number == interrupt:
            raise KeyboardInterrupt
        closure, factor = at(self, number), BAD.get(number, 1.0)
        if not isinstance(closure, MicroBatched):
            return lambda: value(closure(), factor)
        return replace(closure, pieces=[lambda piece=piece: value(piece(), factor) for piece in closure.pieces])

    monkeypatch.setattr(Closures, "at", broken)
    options = SMALL | RUNS[run] | {"steps": 24, "on_bad_loss": policy, "save": "log", "out": str(tmp_path / "run")}
    held = tuner.save_pretrained(tmp_path / "tuner") if "learned" in str(options.get("method")) else None
    given: dict[str, Any] = {"tuner": str(held)} if held else {}
    with pytest.raises(KeyboardInterrupt):
        l2l.fine_tune("l2l/tiny", **options, **given)
    interrupt = None
    result = l2l.fine_tune("l2l/tiny", **options, **given)
    monkeypatch.undo()
    assert same_bits(saved_weights(result.model), saved_weights(l2l.load_model("l2l/tiny", log=tmp_path / "run")))
    assert main(["replay", str(tmp_path / "run"), "--to", "last"]) == 0
    steps = runlog.read_run_log(tmp_path / "run")[1]
    dropped = {step["step"]: step["loss"] for step in steps if step.get("dropped")}
    assert {2, 9, 21} <= dropped.keys() <= BAD.keys()
    assert not any(math.isfinite(dropped[number]) for number in (2, 9, 21))
    bad = result.summary["bad_losses"]
    assert bad["nonfinite"] == 3 and len(dropped) == bad["skipped"] + bad["rollbacks"]
    assert all(step["directions"] for step in steps if "dropped" not in step)


def test_the_log_of_a_first_order_run_says_which_steps_were_dropped(tmp_path, monkeypatch):
    at: Any = Closures.at
    monkeypatch.setattr(Closures, "at", lambda self, number: lambda: at(self, number)() * BAD.get(number, 1.0))
    out = fine_tuned(tmp_path / "run", method="adamw", lr=1e-4, on_bad_loss="skip")
    steps = runlog.read_run_log(out)[1]
    assert [step["step"] for step in steps if step.get("dropped")] == [2]
    assert [math.isfinite(step["loss"]) for step in steps] == [True, True, False, True, True, True]


def fine_tuned(out: Path, **options: Any) -> Path:
    l2l.fine_tune("l2l/tiny", out=str(out), **{**SMALL, "steps": 6, **options})
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fine_tuned(tmp_path_factory.mktemp("run") / "run")


def test_any_step_is_written_as_a_model_and_undo_counts_from_the_end(run: Path, tmp_path, capsys):
    paths = [("--to", "4"), ("--undo", "2"), ("--to", "0"), ("--to", "best")]
    for name, (flag, value) in enumerate(paths):
        assert main(["replay", str(run), flag, value, "--out", str(tmp_path / str(name))]) == 0
    four, undone, base, best = (saved_weights(l2l.load_model(tmp_path / str(name))) for name in range(4))
    assert same_bits(four, undone)
    assert same_bits(base, saved_weights(l2l.load_model("l2l/tiny")))
    assert same_bits(best, saved_weights(l2l.load_model(run / "model")))
    assert not same_bits(four, base)
    capsys.readouterr()
    assert main(["replay", str(run), "--to", "4", "--out", str(tmp_path / "0")]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert main(["replay", str(run), "--to", "4", "--undo", "1"]) == 2
    assert "both given" in capsys.readouterr().err
    assert main(["replay", str(run), "--to", "7"]) == 2
    assert "to=7, but the log has 6 steps" in capsys.readouterr().err


def test_diff_says_at_which_step_and_field_two_runs_part(run: Path, tmp_path, capsys):
    assert main(["replay", "--diff", str(run), str(run)]) == 0
    assert capsys.readouterr().out == "no difference in 6 steps\n"
    other = fine_tuned(tmp_path / "other", schedule="linear")
    assert main(["replay", "--diff", str(run), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.schedule: 'linear' / 'constant'" in lines or "config.schedule: 'constant' / 'linear'" in lines
    assert any(line.startswith("step 1, lr: ") for line in lines)
    assert not any(line.startswith("step 0") for line in lines)


def test_save_model_leaves_no_log_and_the_old_name_is_understood(tmp_path):
    out = fine_tuned(tmp_path / "model", save="model")
    assert (out / "model").is_dir()
    assert not (out / runlog.NAME).exists()
    with pytest.warns(FutureWarning, match="is now called"):
        out = fine_tuned(tmp_path / "log", save_model=False)
    assert not (out / "model").exists()
    assert (out / runlog.NAME).exists()


def test_another_base_is_refused_by_its_weights(run: Path, tmp_path):
    """Weights of a base that change under one name make adapters give garbage in silence: huggingface/transformers#34468."""
    model = l2l.load_model("l2l/tiny")
    with torch.no_grad():
        next(model.parameters()).view(-1)[7] += 1e-6
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this is another base model than the run's, 'l2l/tiny'"):
        l2l.load_model(tmp_path, log=run)


def test_a_run_that_cannot_be_rebuilt_says_so_in_a_line(tmp_path, capsys):
    out = fine_tuned(tmp_path / "run", method="adamw", lr=1e-4)
    assert main(["replay", str(out)]) == 2
    assert "cannot be rebuilt from its log: its gradients are not kept" in capsys.readouterr().err
    with pytest.raises(ValueError, match="its gradients are not kept"):
        l2l.load_model("l2l/tiny", log=out)


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # httpx, of its own caller
def test_a_log_is_shared_by_the_hub(run: Path, tmp_path, monkeypatch):
    """The revision of an adapter was taken for one of its base, too: huggingface/transformers#29849. Here each has its own."""
    with running(tmp_path / "hub", monkeypatch) as hub:
        hub.private["me/tuned"] = False
        hub.add("me/tuned", {runlog.NAME: (run / runlog.NAME).read_bytes()})
        loaded = l2l.load_model("l2l/tiny", log="me/tuned")
        assert same_bits(saved_weights(loaded), saved_weights(l2l.load_model(run / "model")))
        with pytest.raises(FileNotFoundError, match="neither here nor to be fetched"):
            find_log("me/nothing")


# Logs that are not whole.


def test_flips_are_found_at_their_step_and_no_byte_is_without_a_check(run: Path, tmp_path):
    """A reader that cannot tell a cut record from a damaged one retries for ever (tensorflow/tensorboard#3194), and errors that
    do not say which file (tensorflow/tensorflow#20835) help nobody: here both are told apart, by file and step."""
    content, ends = (run / runlog.NAME).read_bytes(), read_log(run / runlog.NAME).ends
    broken = tmp_path / runlog.NAME
    for place in range(0, len(content), 1 if len(content) < 500 else 7):
        broken.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with contextlib.suppress(ValueError):
            found = read_log(broken)
            assert found.torn, f"the flip at byte {place} was not found"
            assert found.best is None
            continue
    for step in range(6):
        middle = (ends[step] + ends[step + 1]) // 2
        broken.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(ValueError, match=f"{tmp_path}.*damaged at step {step} "):
            read_log(broken)
        assert len(read_log(broken, step).steps) == step  # the way out: --to this step or less


def test_swapped_missing_and_repeated_records_are_found(run: Path, tmp_path):
    content, ends = (run / runlog.NAME).read_bytes(), read_log(run / runlog.NAME).ends
    records = [content[a:b] for a, b in pairwise(ends)]
    broken, head = tmp_path / runlog.NAME, content[: ends[0]]
    swapped = [*records[:2], records[3], records[2], *records[4:]]
    for wrong, step in ((swapped, 2), (records[:3] + records[4:], 3), ([*records[:4], *records[3:]], 4)):
        broken.write_bytes(head + b"".join(wrong))
        with pytest.raises(ValueError, match=f"damaged at step {step} "):
            read_log(broken)
    broken.write_bytes(content + records[-1])
    with pytest.raises(ValueError, match="bytes follow the end of its run"):
        read_log(broken)


def test_a_cut_log_is_read_to_its_last_whole_record_and_is_not_taken_for_a_finished_run(run: Path, tmp_path, capsys):
    content, ends = (run / runlog.NAME).read_bytes(), read_log(run / runlog.NAME).ends
    broken = tmp_path / runlog.NAME
    for size in range(ends[0], len(content)):
        broken.write_bytes(content[:size])
        found = read_log(broken)
        assert len(found.steps) == min(6, sum(end <= size for end in ends[1:]))
        assert found.best is None
        assert found.torn == size - max(end for end in ends if end <= size)
    with pytest.raises(ValueError, match="has not ended, or its end is lost: give to='last'"):
        l2l.load_model("l2l/tiny", log=broken)
    l2l.load_model("l2l/tiny", log=broken, to="last")  # the way out
    assert main(["replay", str(broken)]) == 0


def test_another_version_and_what_is_no_log_are_named(run: Path, tmp_path):
    broken = tmp_path / runlog.NAME
    with pytest.raises(FileNotFoundError, match="no run log"):
        find_log(tmp_path)
    broken.write_bytes(b"steps: 3\n" * 9)
    with pytest.raises(ValueError, match="is not a run log of l2l"):
        read_log(broken)
    log = RunLog(tmp_path, {"epsilon": None, "version": 2})
    log.close()
    with pytest.raises(ValueError, match="has version 2, this l2l reads 1"):
        read_log(broken)
    broken.write_bytes((run / runlog.NAME).read_bytes()[:50])
    with pytest.raises(ValueError, match=r"header of run log .* is damaged"):
        read_log(broken)


def test_records_of_every_form_come_back_as_they_were(tmp_path):
    nan = float("nan")
    steps = [
        StepRecord((1.0, 0.5), 1e-3, b"abc", 2, ((250.0, 1.0, 0.5),), 1e-3),
        StepRecord((0.1, 0.2), 1e-3, b"abd", 2, (((0.1 - 0.2) / 2e-3, 0.1, 0.2),), 1e-3),  # of float64
        StepRecord((2.0, 1.0, 1.5), 2e-3, b"abc", 3, ((1.0, 2.0, None),), 5e-4, ((1.0, 2.0), ()), 0.25, True),
        StepRecord((nan,), 2e-3, b"abc", 1, (), 0.0),
        StepRecord((), 2e-3, b"abc", 0, (), 2e-3),
        StepRecord((1e300, -0.0), 2e-3, b"abc", 4, ((1.0, 1e300, -0.0),), 2e-3),
    ]
    log = RunLog(tmp_path, {"epsilon": 1e-3})
    for step in steps:
        log.append(step)
    log.end(3)
    log.close()
    found = read_log(tmp_path / runlog.NAME)
    assert repr(found.steps) == repr(steps)
    assert (found.best, found.torn) == (3, 0)


def test_twenty_thousand_steps_of_mezo_take_less_than_half_a_megabyte(tmp_path):
    """With a learning rate that changes at every step, too."""
    for schedule, changes in (("constant", 0.0), ("cosine", 1e-9)):
        log = RunLog(tmp_path, {"epsilon": 1e-3, "schedule": schedule})
        for step in range(20_000):
            losses = float(torch.tensor(1.0 + step / 7)), float(torch.tensor(1.0 - step / 7))
            rate = 1e-6 + changes * step
            log.append(StepRecord(losses, rate, b"abc", 2, runlog.implied(losses, 1e-3), rate))
        log.end(20_000)
        log.close()
        size = (tmp_path / runlog.NAME).stat().st_size
        assert size < (400_000 if schedule == "constant" else 500_000)


def synthetic(folder: Path, steps: int, measured: int = 0) -> tuple[int, float]:
    """The log of a run on l2l/tiny: some real steps, whose losses go on as synthetic ones. Bytes of the log, and seconds of
    processor time of a real step, the first five left out."""
    context = prepared(steps)
    optimizer, draw, losses = context.optimizer, random.Random(0), [2.0]
    weights = weights_digests(context.model, [block.tensor for block in optimizer.blocks])
    log, began = RunLog(folder, run_header(context.config, optimizer, context.model, weights)), 0.0
    record = StepRecord((), 1e-4, b"abc", 2, (), 1e-4)
    with optimizer.theta.fused_steps():
        for step in range(measured):
            began = time.process_time() if step == 5 else began
            optimizer.step(context.closures.at(step))
            assert optimizer.report is not None
            log.append(record := StepRecord.of(optimizer.report, 1e-4, b"abc"))
            losses += record.losses
    of_run = (time.process_time() - began) / max(1, measured - 5)
    for _ in range(measured, steps):
        center = draw.choice(losses)
        pair = tuple(float(torch.tensor(center + draw.gauss(0, 1e-3))) for _ in range(2))
        log.append(replace(record, losses=pair, estimates=runlog.implied(pair, 1e-3)))
    log.end(steps)
    log.close()
    return (folder / runlog.NAME).stat().st_size, of_run


def prepared(steps: int) -> RunContext:
    return prepare_fine_tuning(FineTuneConfig(steps=steps, lr=1e-4, progress=False))


def rebuilt(folder: Path, steps: int) -> tuple[dict[str, torch.Tensor], float]:
    """The weights of a replay, and its processor time."""
    context, log = prepared(steps), read_log(folder / runlog.NAME)
    began = time.process_time()
    replay(log, context.optimizer, steps)
    return weights(context.model), time.process_time() - began


@pytest.mark.slow
def test_a_replay_of_twenty_thousand_steps_is_twenty_times_faster_than_the_run(tmp_path, capsys):
    """Processor time of both on one thread, in this process; the run's is that of steps of ``l2l fine-tune`` as it comes."""
    steps = 20_000
    with computed_by("auto", 1):
        size, of_run = synthetic(tmp_path, steps, 40)
        found, seconds = rebuilt(tmp_path, steps)
    ratio = of_run * steps / seconds
    with capsys.disabled():
        per_step = f"{1e3 * of_run:.2f} ms a step, replayed in {1e3 * seconds / steps:.3f} ms"
        print(f"\n{steps} steps, {size} bytes: {per_step}, {ratio:.0f} times faster")
    assert all(value.isfinite().all() for value in found.values())
    assert size <= 500_000
    assert ratio >= 20


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_backends_give_the_bytes_of_the_first_for_a_language_model(backend: str, tmp_path):
    """On more than a chunk, and with hundreds of steps in one traversal where the backend can."""
    if problem := dispatch.backend_problem(backend):
        pytest.skip(problem)
    synthetic(tmp_path, 100)
    with computed_by("auto", 2):
        expected, _ = rebuilt(tmp_path, 100)
    with computed_by(backend, 1):
        assert same_bits(rebuilt(tmp_path, 100)[0], expected)


def test_a_log_that_is_continued_ends_where_its_checkpoint_does(tmp_path):
    """Rows of steps after the checkpoint stayed, and came twice: PaddlePaddle/PaddleFormers#4744, gradio-app/trackio#125; or
    one was lost at each continuation: awslabs/sockeye#859."""
    header, record = {"epsilon": 1e-3, "seed": 1}, StepRecord((1.0, 0.5), 1e-3, b"abc", 2, ((250.0, 1.0, 0.5),), 1e-3)

    def written(folder: Path, parts: list[int]) -> bytes:
        folder.mkdir()
        log = RunLog(folder, header)
        for number, kept in enumerate(parts):
            log = log if number == 0 else RunLog(folder, header, kept)
            for step in range(kept, kept + 4):
                log.append(replace(record, lr=1e-3 / (1 + step // 3)))
            log.close()
            with (folder / runlog.NAME).open("ab") as file:
                file.write(b"torn"[: number % 3])
        log = RunLog(folder, header, parts[-1] + 4)
        log.end(1)
        log.close()
        return (folder / runlog.NAME).read_bytes()

    assert written(tmp_path / "once", [0, 4, 8]) == written(tmp_path / "often", [0, 2, 3, 3, 5, 8])


def test_a_log_that_cannot_be_continued_is_named_and_the_run_goes_on_without_it(tmp_path, caplog):
    header, record = {"epsilon": 1e-3, "seed": 1}, StepRecord((1.0, 0.5), 1e-3, b"abc", 2, ((250.0, 1.0, 0.5),), 1e-3)
    log = RunLog(tmp_path, header)
    log.append(record)
    log.close()
    with pytest.raises(ValueError, match="its 'seed' differs; move it away"):
        RunLog(tmp_path, header | {"seed": 2}, 1)
    with pytest.raises(ValueError, match="it ends at step 1, too early; move it away"):
        RunLog(tmp_path, header, 3)
    (tmp_path / runlog.NAME).unlink()
    log = RunLog(tmp_path, header, 3)
    assert "a new one begins at step 3, and rebuilds no weights" in caplog.text
    log.append(record)
    log.close()
    RunLog(tmp_path, header, 4).close()
    assert [step["step"] for step in runlog.read_run_log(tmp_path)[1]] == [3]
