"""``l2l tuners card``: results of evaluations and tests become tables of the card; the weights stay byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from l2l.tuners import io as store
from l2l.tuners.api import Tuner
from l2l.tuners.card import brief, sections
from l2l.tuners.inspect import verify
from l2l.tuners.io import bundled_folder, edit_card

ROOT = Path(__file__).parent.parent.parent
EVALUATION = ROOT / "docs" / "results" / "meta_evaluate-2026-11-22.json"
TEST: dict[str, Any] = {
    "gain": 0.05,
    "interval": [0.01, 0.09],
    "verdict": "go",
    "passes": 400,
    "seeds": 5,
    "seeds_gained": 4,
    "relation": "derivative: other weights",
    "config": {"model": "l2l/tiny", "task": "world_stars", "passes": 400},
}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A copy of a bundled tuner."""
    return Path(shutil.copytree(bundled_folder() / "l2l-tiny-ratio", tmp_path / "l2l-tiny-ratio"))


def written(folder: Path, value: object) -> Path:
    file = folder.parent / "summary.json"
    file.write_text(json.dumps(value))
    return file


def test_an_evaluation_becomes_a_table_and_leaves_the_weights_as_they_lie(ours: Path):
    before = (ours / store.WEIGHTS).read_bytes()
    card = edit_card(ours, EVALUATION, licence="MIT").read_text()
    assert (ours / store.WEIGHTS).read_bytes() == before
    assert "license: mit\n" in card
    assert "| world_trait | 0.691 | 0.373 | 80.5 % | 98.9 % |" in card
    assert "1000 forward passes, means over 3 seeds (`meta_evaluate-2026-11-22.json`)" in card
    said = "loss below MeZO's on 4 of 4 tasks, -0.155 nats in the mean (95 % interval -0.342 to -0.005)"
    assert said in card
    assert "static table (pool) 75 %" in card
    loaded = Tuner.from_pretrained(ours)
    assert brief(loaded.provenance.results) == said
    assert loaded.provenance.results["best_step"] == 60
    assert {f.what: f.level for f in verify(ours)}["card"] == "ok"


def test_a_second_time_replaces_and_does_not_add(ours: Path):
    first = edit_card(ours, EVALUATION).read_text()
    assert edit_card(ours, EVALUATION).read_text() == first


def test_a_tuner_saved_again_keeps_its_tables(ours: Path, tmp_path: Path):
    card = edit_card(ours, EVALUATION).read_text()
    again = Tuner.from_pretrained(ours).save_pretrained(tmp_path / "again")
    before, after = (text.split("## Results")[1].partition("Made with")[0] for text in (card, (again / store.CARD).read_text()))
    assert after == before


def test_tests_on_several_models_stand_side_by_side(ours: Path):
    edit_card(ours, written(ours, TEST))
    edit_card(ours, written(ours, TEST | {"gain": 0.07}))
    card = edit_card(ours, written(ours, TEST | {"config": TEST["config"] | {"task": "world_cause"}})).read_text()
    rows = [line for line in card.splitlines() if line.startswith("| l2l/tiny |")]
    assert rows == [
        "| l2l/tiny | world_stars | 400 | 5 | +0.0700 | +0.0100 to +0.0900 | go |",
        "| l2l/tiny | world_cause | 400 | 5 | +0.0500 | +0.0100 to +0.0900 | go |",
    ]


def test_a_tuner_learned_from_a_directory_gets_the_id_that_others_know(ours: Path):
    card = edit_card(ours, base_model="us/model").read_text()
    assert "base_model: us/model\n" in card
    assert Tuner.from_pretrained(ours).provenance.base_model == "us/model"
    with pytest.raises(ValueError, match=r"has no results on 'us/model', only on l2l/tiny"):
        edit_card(ours, EVALUATION)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"loss": 1}, "holds no results: name meta_evaluate.json"),
        ([1], "holds no results"),
        ({"by_tuner": {}}, "is not readable as results"),
        ({"by_tuner": 1, "protocol": {"config": []}}, "is not readable as results"),
    ],
)
def test_other_files_are_refused_and_nothing_changes(ours: Path, value: object, words: str):
    before = {path.name: path.read_bytes() for path in ours.iterdir()}
    with pytest.raises(ValueError, match=words):
        edit_card(ours, written(ours, value))
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before


def test_a_tuner_of_another_name_is_asked_for_and_a_wrong_one_refused(ours: Path):
    other = ours.rename(ours.parent / "mine")
    with pytest.raises(ValueError, match=r"which of the tuners is 'mine'\? Choose one by --label: ratio, turns"):
        edit_card(other, EVALUATION)
    with pytest.raises(ValueError, match="judges no tuner 'third': it has ratio, turns"):
        edit_card(other, EVALUATION, "third")
    assert "| world_stars | 0.298 | 0.402 |" in edit_card(other, EVALUATION, "turns").read_text()


def test_what_is_no_directory_or_no_name_of_a_licence_is_refused(ours: Path):
    with pytest.raises(FileNotFoundError, match="'l2l-tiny' is no directory"):
        edit_card(Path("l2l-tiny"), EVALUATION)
    with pytest.raises(ValueError, match="licence is 'as you like'; give one name"):
        edit_card(ours, licence="as you like")


@pytest.mark.parametrize("value", [1, "x", [], {"tasks": []}, {"tasks": [{}], "interval": None}])
def test_results_of_another_form_are_shown_as_they_stand(value: object):
    assert sections({"evaluation": value}) == []
    assert brief({"evaluation": value}) == ""
