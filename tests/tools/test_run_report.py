"""`l2l report`: what the page says is what the run did, and what cannot be known is left out with a word."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import l2l
from l2l import cli
from l2l.report.run_directory import RunDirectory
from l2l.tasks.evaluate import Scores
from l2l.tools import run_report
from l2l.tools.run_report import ReportConfig, command_of, compare_weights, displacement, grouped, read_history
from l2l.train.config import FineTuneConfig

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {
    **{"task": "world_topic", "steps": 6, "batch_size": 4, "train_size": 24, "dev_size": 8, "test_size": 8},
    **{"eval_every": 2, "log_every": 1, "progress": False},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run of MeZO that kept no model, one of a tuner under auto, one that cannot be replayed, and one that was cut short."""
    folder = tmp_path_factory.mktemp("runs")
    l2l.fine_tune("l2l/tiny", method="mezo", lr=1e-4, out=str(folder / "mezo"), save="log", **SMALL)
    l2l.fine_tune("l2l/tiny", tuner="l2l-tiny-ratio", lr="auto", out=str(folder / "tuned"), save="log", **SMALL)
    l2l.fine_tune("l2l/tiny", method="adamw", lr=1e-3, out=str(folder / "adamw"), **SMALL)
    shutil.copytree(folder / "mezo", folder / "open")
    (folder / "open" / "summary.json").unlink()
    return folder


def page_of(runs: Path, *names: str, **options: Any) -> str:
    out = runs / "page.html"
    run_report.run_report(ReportConfig([str(runs / name) for name in names], str(out), **options))
    return html.unescape(out.read_text())


def headings(page: str) -> list[str]:
    return re.findall(r"<h[23][^>]*>(.*?)</h[23]>", page)


def test_the_page_of_a_tuned_run_has_every_part(runs):
    page = page_of(runs, "tuned", examples=8)
    found = headings(page)
    wanted = ["Figures", "Curves", "Loss of steps by passes", "Loss of steps by seconds", "Dev loss by passes"]
    wanted += ["Dev accuracy by seconds", "Learning rate", "Curvature", "Share of the signal", "Peak memory", "What moved"]
    wanted += ["Change of weights", "By kind", "Sigma over the run", "Sigma, mean over the run", "Examples before and after"]
    wanted += ["How to repeat it", "The run again", "Its weights again, from its log"]
    assert [name for name in wanted if name not in found] == []
    summary = json.loads((runs / "tuned" / "summary.json").read_text())
    assert f"{summary['initial_dev_loss']:.4f} → {summary['dev_loss']:.4f}" in page
    assert f"torch: {summary['environment']['versions']['torch']}" in page


def test_displacement_is_that_of_the_run(runs):
    found = compare_weights(read_history(runs / "mezo"))
    before, after = l2l.load_model("l2l/tiny"), l2l.load_model("l2l/tiny", log=runs / "mezo")
    own = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        change = (own[name] - weight).detach()
        assert found.moved[name].rms == pytest.approx(change.double().square().mean().sqrt().item(), rel=1e-6)
        assert found.moved[name].relative == pytest.approx((change.norm() / weight.norm()).item(), rel=1e-4)
    assert max(moved.rms for moved in found.moved.values()) > 0
    assert not found.of_last
    assert found.trace is not None
    assert found.trace.sigma == pytest.approx(1.0)  # MeZO's


def test_where_the_untrained_weights_are_best_the_last_ones_are_shown(tmp_path):
    l2l.fine_tune("l2l/tiny", method="mezo", lr=1e-2, out=str(tmp_path / "worse"), save="log", **SMALL)
    found = compare_weights(read_history(tmp_path / "worse"))
    assert found.of_last
    assert max(moved.rms for moved in found.moved.values()) > 0
    assert "those after the last step, as the untrained ones are best on dev" in page_of(tmp_path, "worse")


def test_displacement_of_a_block_that_was_0_has_no_share_of_its_norm():
    assert displacement(torch.zeros(4), torch.ones(4)) == run_report.Displacement(4, 1.0, math.inf)
    assert displacement(torch.zeros(4), torch.zeros(4)) == run_report.Displacement(4, 0.0, 0.0)
    assert displacement(torch.tensor([3.0, 4, 0, 0]), torch.tensor([3.0, 3, 0, 0])) == run_report.Displacement(4, 0.5, 0.2)


def test_sigma_over_the_run_is_that_of_its_steps(runs):
    found = compare_weights(read_history(runs / "tuned"))
    assert found.trace is not None
    sigma = found.trace.sigma
    assert sigma.shape == (6, len(found.moved))
    assert len(set(sigma[-1].tolist())) > 2, "the tuner sets blocks apart"
    assert [share for _, share in found.trace.signal if not 0 < share <= 1] == []
    assert len(found.trace.signal) == 6


def test_examples_are_evaluated_with_the_weights_before_and_after(runs):
    found = compare_weights(read_history(runs / "mezo"), examples=8)
    assert found.scores is not None
    summary = json.loads((runs / "mezo" / "summary.json").read_text())
    assert found.scores[1].rowwise is not None
    assert found.scores[1].loss == pytest.approx(summary["best"]["test"]["loss"], rel=1e-6)
    assert found.scores[1].value == summary["best"]["test"]["value"]
    assert found.scores[0].loss != found.scores[1].loss
    assert len(found.scores[0].answers) == 8


def test_rows_are_grouped_by_whether_they_were_right():
    before, after = (Scores(0.0, "f1", 0.0, 4, rowwise=rows) for rows in ((0.5, 1.0, 0.0, 1.0), (1.0, 0.9, 0.5, 1.0)))
    assert list(grouped((before, after)).values()) == [[0], [1], [2], [3]]


def test_a_run_that_cannot_be_replayed_is_read_from_its_saved_model(runs):
    found = compare_weights(read_history(runs / "adamw"), examples=4)
    assert found.trace is None
    assert found.scores is not None
    saved = dict(l2l.load_model(str(runs / "adamw" / "model")).named_parameters())
    name, weight = next(iter(l2l.load_model("l2l/tiny").named_parameters()))
    assert found.moved[name].rms == pytest.approx(
        (saved[name] - weight).detach().double().square().mean().sqrt().item(), rel=1e-6
    )
    page = page_of(runs, "adamw")
    assert "by the saved model" in page
    assert "this run cannot be replayed" in page


def test_several_runs_share_charts_and_each_has_its_own_sections(runs):
    page = page_of(runs, "mezo", "tuned", "open")
    assert {"What moved: mezo", "Sigma: tuned", "How to repeat it: open"} <= set(headings(page))
    assert "Sigma: mezo" not in headings(page)
    (chart,) = re.findall(r'aria-label="Loss of steps by passes, .*?</svg>', page, re.DOTALL)
    assert chart.count("<polyline") == 3
    assert "open has not finished" in page


def test_without_weights_or_without_the_base_the_page_says_so(runs, tmp_path):
    assert "Not known: the weights were not looked at (--weights false)" in page_of(runs, "mezo", weights=False)
    assert "the base model 'gone' is not here" in page_of(runs, "mezo", model="gone")
    with pytest.raises(FileNotFoundError, match="'gone' is not here: give its directory with --model"):
        page_of(runs, "mezo", model="gone", examples=2)
    assert "Examples before and after" in page_of(runs, "mezo", model="l2l/tiny", examples=2)


def test_a_log_that_is_damaged_or_gone_leaves_the_curves_of_the_metrics(runs, tmp_path):
    shutil.copytree(runs / "mezo", tmp_path / "gone")
    (tmp_path / "gone" / "steps.l2l").unlink()
    page = page_of(tmp_path, "gone")
    assert "Loss of steps by passes" in headings(page)
    assert "no weights are left to compare: the run cannot be replayed (no run log" in page


@pytest.mark.parametrize("name", ["mezo", "tuned", "adamw"])
def test_the_command_gives_the_configuration_of_the_run(runs, name):
    config = RunDirectory.recorded(runs / name)
    assert config is not None
    words = shlex.split(command_of(config).replace("\\\n", " "))
    parsed = cli._parser(["fine-tune"]).parse_args(words[1:])["fine-tune"]
    options = {key: value for key, value in parsed.items() if key != "config"}
    assert dataclasses.asdict(FineTuneConfig(**options).completed()) == {**config, "overwrite": False}


def test_what_is_no_run_is_named(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run 'nothing': give the --out directory"):
        read_history("nothing")
    (tmp_path / "index.html").write_text("")
    with pytest.raises(ValueError, match="is an experiment"):
        read_history(tmp_path)
    for options, said in (
        ({"runs": []}, "no run is given"),
        ({"out": "summary.json"}, r"must be a file that ends in \.html"),
        ({"examples": -1}, "at least 0"),
        ({"examples": 1, "weights": False}, "leave one of them out"),
    ):
        with pytest.raises(ValueError, match=said):
            ReportConfig(**{"runs": [str(runs / "mezo")], **options})


def test_the_command_line_takes_several_runs(runs, tmp_path, capsys):
    out = tmp_path / "two.html"
    assert cli.main(["report", str(runs / "mezo"), str(runs / "open"), "--out", str(out), "--weights", "false"]) == 0
    assert capsys.readouterr().out == f"page: {out}\n"
    assert "2 runs" in headings(out.read_text()) or "<h1>2 runs</h1>" in out.read_text()
