"""``l2l tuners verify``: a finding for each thing that is looked at, and an error where a tuner must not be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_saved import with_weights
from cases import TiedLM

from l2l.tuners import io as store
from l2l.tuners.api import Tuner
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.inspect import Finding, refuse_errors, verify
from l2l.tuners.model import Provenance
from l2l.tuners.normalize import NoNormalizer
from l2l.tuners.transfer import identified

PRINTS = Fingerprint.of(TiedLM())
RECIPE = {"steps": 3, "licence": "Apache-2.0"}


def learned(folder: Path, bias: float = 0.125, recipe: dict[str, Any] | None = None) -> Path:
    made = Tuner.for_model(TiedLM(), hidden=8, provenance=Provenance("me/tied", "abc", recipe or RECIPE, {"loss": 1.5}))
    with torch.no_grad():
        made.network.get_parameter("second_bias").add_(bias)
    return made.save_pretrained(folder)


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.level for finding in findings}


def text_of(findings: list[Finding], what: str) -> str:
    return next(finding.text for finding in findings if finding.what == what)


def test_a_sound_tuner_is_fine_in_everything(tmp_path: Path):
    findings = verify(learned(tmp_path), PRINTS)
    assert levels(findings) == dict.fromkeys(("files", "checksum", "blocks", "sigma", "learning", "card"), "ok")
    refuse_errors(tmp_path, findings)


def test_the_bundled_tuner_has_no_errors():
    findings = verify("l2l-tiny")
    assert "error" not in levels(findings).values()
    assert levels(findings)["checksum"] == "warning"


def test_without_a_model_the_blocks_are_not_compared_and_that_is_said(tmp_path: Path):
    findings = verify(learned(tmp_path))
    assert levels(findings)["blocks"] == "warning"
    assert "--model me/tied" in text_of(findings, "blocks")


def test_another_model_is_an_error_that_names_blocks(tmp_path: Path):
    findings = verify(learned(tmp_path), Fingerprint(("a.weight",), ((2, 2),)))
    assert levels(findings)["blocks"] == "error"
    with pytest.raises(ValueError, match=r"does not fit the model \(other family\): .*; 6 missing"):
        refuse_errors(tmp_path, findings)


def test_the_model_itself_and_its_derivatives_are_told_apart_by_their_weights(tmp_path: Path):
    tuner = Tuner.for_model(TiedLM(), provenance=Provenance("me/tied"))
    identified(tuner, TiedLM()).save_pretrained(tmp_path)
    same = verify(tmp_path, Fingerprint.of(TiedLM(), identity=True))
    assert text_of(same, "blocks") == "exact: all 6 are the model's, names, shapes and weights are the same"
    other = TiedLM()
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    findings = verify(tmp_path, Fingerprint.of(other, identity=True))
    assert levels(findings)["blocks"] == "warning"
    assert text_of(findings, "blocks").startswith("derivative: names and shapes are the same, the weights are others")


def test_a_model_less_like_the_own_is_accepted_at_the_level_that_allows_it(tmp_path: Path):
    wider = Fingerprint(PRINTS.names, tuple(tuple(2 * size for size in shape) for shape in PRINTS.shapes))
    refused = verify(learned(tmp_path), wider, match="shape")
    assert levels(refused)["blocks"] == "error"
    assert text_of(refused, "blocks").endswith("--match kind allows it")
    assert levels(verify(tmp_path, wider, match="kind"))["blocks"] == "warning"
    with pytest.raises(ValueError, match="match is 'loose'"):
        verify(tmp_path, wider, match="loose")  # pyright: ignore[reportArgumentType]


def test_files_that_do_not_load_are_the_only_finding(tmp_path: Path):
    file = learned(tmp_path) / store.WEIGHTS
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    findings = verify(tmp_path, PRINTS)
    assert levels(findings) == {"files": "error"}
    assert "has changed since it was saved" in findings[0].text


def test_a_missing_or_incomplete_card_is_an_error(tmp_path: Path):
    card = learned(tmp_path) / store.CARD
    card.write_text(card.read_text().replace("## Results", ""))
    assert levels(verify(tmp_path, PRINTS))["card"] == "error"
    card.unlink()
    findings = verify(tmp_path, PRINTS)
    assert levels(findings)["card"] == "error"
    assert "is not there" in text_of(findings, "card")


def test_a_card_without_a_licence_is_a_warning(tmp_path: Path):
    findings = verify(learned(tmp_path, recipe={"steps": 3}), PRINTS)
    assert levels(findings)["card"] == "warning"
    assert text_of(findings, "card") == "it does not say its licence"


def test_a_tuner_as_it_was_initialised_has_learned_nothing(tmp_path: Path):
    assert levels(verify(learned(tmp_path, bias=0.0), PRINTS))["learning"] == "warning"


def table(folder: Path, values: list[float]) -> Path:
    return Tuner.for_model(TiedLM(), "table", normalizer=NoNormalizer(), values=values).save_pretrained(folder)


def test_a_sigma_far_beyond_the_others_is_named(tmp_path: Path):
    findings = verify(table(tmp_path, [1.0, 1.0, 1.0, 1.0, 1.0, 50.0]), PRINTS)
    assert levels(findings)["sigma"] == "warning"
    assert PRINTS.names[5] in text_of(findings, "sigma")


def test_a_sigma_that_overflows_is_an_error(tmp_path: Path):
    folder = table(tmp_path, [1.0] * 6)
    with_weights(lambda weights: weights["log_sigma"].fill_(200.0))(folder)
    findings = verify(folder, PRINTS)
    assert levels(findings)["sigma"] == "error"
    assert "not finite" in text_of(findings, "sigma")


def test_the_checksum_is_written_from_now_on_and_may_be_absent(tmp_path: Path):
    config = json.loads((learned(tmp_path) / store.CONFIG).read_text())
    assert len(config.pop(store.SHA256)) == 64
    (tmp_path / store.CONFIG).write_text(json.dumps(config))
    assert levels(verify(tmp_path, PRINTS))["checksum"] == "warning"
    Tuner.from_pretrained(tmp_path)


def test_a_name_that_is_nowhere_raises():
    with pytest.raises(FileNotFoundError, match="no tuner 'nowhere'"):
        verify("nowhere")
