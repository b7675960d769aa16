"""``lr-probe`` from a configuration to a picture and a line to run."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from cases import same_bits, weights

import l2l
from l2l.cli import main
from l2l.tools.lr_probe import ProbeConfig, run_lr_probe
from l2l.train.config import FineTuneConfig

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {
    "probes": 3,
    "sweep": 2,
    "epsilons": [1e-3, 1e-2, 3e-2],
    "batch_size": 4,
    "train_size": 24,
    "progress": False,
}


def probe(out: Path, **options: Any) -> dict[str, Any]:
    return run_lr_probe(ProbeConfig(out=str(out), **{**SMALL, **options}))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """A finished probe: its directory, its summary, what it printed."""
    out, printed = tmp_path_factory.mktemp("probe") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        summary = probe(out, seed=3)
    return out, summary, printed.getvalue()


def test_it_leaves_a_record_a_picture_and_a_line_that_fine_tune_takes(done, tmp_path):
    out, summary, printed = done
    assert {path.name for path in out.iterdir()} == {"config.yaml", "summary.json", "probe.json", "probe.png"}
    record = json.loads((out / "probe.json").read_text())
    assert record["advice"]["lr"] == summary["lr"] > 0
    assert record["passes"] == summary["passes"] == 2 * (1 + 2 * 3) + 1 * 3 + 3 * 2
    assert len(record["probes"]["home"]) == 3
    assert summary["command"] in printed
    assert all(sentence in printed for sentence in summary["reasons"])
    words = shlex.split(summary["command"])
    assert words[:2] == ["l2l", "fine-tune"]
    small = "--steps 1 --dev_size 4 --test_size 4 --progress false --save log --overwrite true"
    assert main([*words[1:], "--out", str(tmp_path / "run"), *small.split()]) == 0
    ran = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert ran["lr"] == pytest.approx(summary["lr"], rel=0.05)
    assert (ran["epsilon"], ran["seed"]) == (summary["epsilon"], 3)


def test_a_model_given_keeps_its_weights_bit_for_bit(tmp_path):
    model = l2l.load_model("l2l/tiny")
    before = weights(model)
    run_lr_probe(ProbeConfig(out=str(tmp_path), **SMALL), model)
    assert same_bits(before, weights(model))


def test_the_directions_are_the_method_s_and_the_scheme_s(done, tmp_path):
    plain = done[1]
    learned = probe(tmp_path / "learned", method="learned", tuner="l2l-tiny", seed=3)
    adapter = probe(tmp_path / "lora", scheme="lora", seed=3)
    assert len({plain["lr"], learned["lr"], adapter["lr"]}) == 3
    assert "--tuner l2l-tiny" in learned["command"]
    assert "--scheme lora" in adapter["command"]


def test_the_line_says_what_differs_from_the_defaults_of_a_run_and_no_more(tmp_path):
    config = ProbeConfig(model="a b", batch_size=4, method_args={"num_directions": 2}, step_fraction=0.1, out=str(tmp_path))
    assert set(config.differing()) == {"model", "task", "method", "batch_size", "method_args"}
    assert config.fine_tune().method_args == {"num_directions": 2}
    assert set(ProbeConfig().differing()) == {"model", "task", "method"}
    assert ProbeConfig().fine_tune().step_fraction == FineTuneConfig().step_fraction


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "nothing"}, ValueError, "nothing"),
        ({"method": "adamw"}, ValueError, "'adamw' has no directions"),
        ({"method": "zero_shot"}, ValueError, "'zero_shot' has no directions"),
        ({"method": "learned"}, ValueError, "needs a tuner"),
        ({"scheme": "lore"}, ValueError, "scheme"),
        ({"probes": 0}, ValueError, "probes=0"),
        ({"step_fraction": -1.0}, ValueError, "step_fraction=-1.0"),
        ({"model": "/nowhere/at/all"}, FileNotFoundError, "/nowhere"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        probe(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_finished_probe_is_not_overwritten_unasked(done):
    out, summary, _ = done
    before = (out / "probe.json").read_bytes()
    with pytest.raises(ValueError, match="holds this run, finished"):
        probe(out, seed=3)
    assert (out / "probe.json").read_bytes() == before
    assert probe(out, seed=3, overwrite=True)["lr"] == summary["lr"]
