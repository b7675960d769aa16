"""Tuners on the hub: pushed and pulled over HTTP, bit for bit; pickles are refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from cases import TiedLM
from fake_hub import FakeHub, running

from l2l.cli import main
from l2l.params import Blocks
from l2l.tuners import sources as registry
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics
from l2l.tuners.io import sha256_of
from l2l.tuners.model import Provenance
from l2l.tuners.sources import download

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # httpx, of its own caller


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    with running(tmp_path / "hub", monkeypatch) as found:
        yield found


def made(**recipe: object) -> Tuner:
    tuner = Tuner.for_model(TiedLM(), seed=3, provenance=Provenance("me/tied", "abc", dict(recipe)), hidden=8)
    with torch.no_grad():
        for parameter in tuner.network.parameters():
            parameter.mul_(1.1)
    return tuner


def sigma(tuner: Tuner) -> torch.Tensor:
    blocks = Blocks.of(TiedLM())
    return tuner.sigma(tuner.features(RunStatistics.start(blocks)), blocks.names).detach()


def forget(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "hub", ignore_errors=True)


@pytest.mark.parametrize("large", [(), (".safetensors",)], ids=["in the commit", "as large files"])
def test_a_tuner_pushed_to_and_pulled_from_a_hub_gives_bit_identical_sigma(
    hub: FakeHub, tmp_path: Path, large: tuple[str, ...]
):
    hub.as_large = large
    tuner = made(steps=30)
    commit = tuner.push_to_hub("me/tuner").rpartition("/")[2]
    assert bool(hub.large) == bool(large)
    assert sorted(hub.commits["me/tuner"][-1][1]) == ["README.md", "config.json", "tuner.safetensors"]
    for revision in (None, "main", commit):
        forget(tmp_path)
        pulled = Tuner.from_pretrained("me/tuner", revision)
        assert torch.equal(sigma(pulled), sigma(tuner))
        assert pulled.provenance == tuner.provenance


def test_only_config_and_weights_are_pulled_and_a_second_time_nothing_is(hub: FakeHub):
    made().push_to_hub("me/tuner")
    hub.add("me/tuner", {"code.py": b"import os", "old.pth": b"pickle"})
    hub.log.clear()
    Tuner.from_pretrained("me/tuner")
    assert {path.rpartition("/")[2] for verb, path in hub.log if verb == "GET" and "/resolve/" in path} == {
        "config.json",
        "tuner.safetensors",
    }
    hub.log.clear()
    Tuner.from_pretrained("me/tuner")
    assert not [path for verb, path in hub.log if verb == "GET"]


def test_an_older_commit_gives_the_older_tuner(hub: FakeHub):
    first, second = made(), made()
    with torch.no_grad():
        second.network.get_parameter("second_bias").add_(0.5)
    commit = first.push_to_hub("me/tuner").rpartition("/")[2]
    second.push_to_hub("me/tuner")
    assert torch.equal(sigma(Tuner.from_pretrained("me/tuner", commit)), sigma(first))
    assert torch.equal(sigma(Tuner.from_pretrained("me/tuner")), sigma(second))


def test_the_card_has_the_metadata_that_the_hub_reads(hub: FakeHub):
    made().push_to_hub("me/tuner", licence="mit")
    card = hub.commits["me/tuner"][-1][1]["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {
        "library_name": "l2l",
        "base_model": "me/tied",
        "tags": ["zeroth-order", "learned-optimizer", "l2l"],
        "license": "mit",
    }


def test_a_repository_that_holds_only_a_pickle_is_refused_with_the_command_that_reads_it(hub: FakeHub):
    hub.private["you/old"] = False
    hub.add("you/old", {"finetuner.pth": b"not read", "README.md": b""})
    with pytest.raises(ValueError, match=r"pickle 'finetuner.pth', which could run code: it is not loaded.*tuners import"):
        Tuner.from_pretrained("you/old")
    assert not [path for verb, path in hub.log if path.endswith(".pth")]


def test_a_config_without_weights_beside_a_pickle_is_refused_too(hub: FakeHub):
    hub.private["you/half"] = False
    hub.add("you/half", {"config.json": b"{}", "pytorch_model.bin": b"not read"})
    with pytest.raises(ValueError, match=r"'you/half' holds no tuner.safetensors, but the pickle 'pytorch_model.bin'"):
        Tuner.from_pretrained("you/half")


def test_what_is_not_there_is_one_clear_error(hub: FakeHub):
    hub.private["you/empty"] = False
    hub.add("you/empty", {"README.md": b""})
    for name in ("you/nothing", "you/empty"):
        with pytest.raises(FileNotFoundError, match=f"no tuner '{name}' on the hub: ") as caught:
            Tuner.from_pretrained(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no tuner 'you/empty' on the hub: "):
        Tuner.from_pretrained("you/empty", "v9")


def test_a_push_that_the_hub_refuses_is_one_clear_error(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"the hub did not take 'you/tuner' \(.*\): log in with `hf auth login`") as caught:
        made().push_to_hub("you/tuner")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_you")
    with pytest.raises(ValueError, match="the hub did not take 'me/tuner'"):
        made().push_to_hub("me/tuner")


def test_without_a_network_a_push_is_one_clear_error(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    broken = import_module("huggingface_hub.errors").HTTPError

    def unreachable(*_: object, **__: object) -> None:
        raise broken("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    with pytest.raises(ValueError, match=r"the hub cannot be reached \(no route\), so nothing was pushed"):
        made().push_to_hub("me/tiny")


@pytest.mark.parametrize("base", ["/home/me/model", "../model"])
def test_a_tuner_whose_model_is_a_directory_is_not_pushed(hub: FakeHub, base: str, tmp_path: Path):
    tuner = Tuner.for_model(TiedLM(), provenance=Provenance(base))
    with pytest.raises(ValueError, match=rf"its model is '{base}', a directory .* `l2l tuners card DIR --base_model ID`"):
        tuner.push_to_hub("me/tiny")
    folder = str(tuner.save_pretrained(tmp_path / "tuner"))
    assert main(["tuners", "card", folder, "--base_model", "me/model"]) == main(["tuners", "push", folder, "me/tiny"]) == 0


def test_a_private_repository_stays_private(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made().push_to_hub("me/secret", private=True)
    assert hub.private["me/secret"]
    monkeypatch.setenv("HF_TOKEN", "hf_of_you")
    with pytest.raises(FileNotFoundError, match="no tuner 'me/secret' on the hub"):
        Tuner.from_pretrained("me/secret")


def test_a_tuner_of_unknown_licence_is_not_passed_on_unless_the_licence_is_named(hub: FakeHub):
    tuner = made(licence="unknown: the file states none")
    with pytest.raises(ValueError, match=r"licence of this tuner is unknown.*name the licence with --licence"):
        tuner.push_to_hub("me/tuner")
    assert not hub.log
    tuner.push_to_hub("me/tuner", licence="apache-2.0")
    assert Tuner.from_pretrained("me/tuner").provenance.recipe["licence"] == "apache-2.0"


def test_a_download_by_hub_id_checks_the_checksum_and_removes_what_does_not_fit(hub: FakeHub, tmp_path: Path):
    made().push_to_hub("me/tuner")
    folder = download("me/tuner")
    wanted = sha256_of(folder / "tuner.safetensors")
    assert download("me/tuner", sha256=wanted) == folder
    with pytest.raises(ValueError, match=f"tuner.safetensors has sha256 {wanted}, but {'0' * 64} was asked for"):
        download("me/tuner", sha256="0" * 64)
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and sha256_of(path) == wanted]
    assert download("me/tuner", sha256=wanted) == folder


def test_a_registry_name_for_a_hub_tuner_works_offline_after_the_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import json

    commit = made().push_to_hub("me/tuner").rpartition("/")[2]
    sha256 = sha256_of(download("me/tuner", commit) / "tuner.safetensors")
    forget(tmp_path)
    entry = {"hub": "me/tuner", "revision": commit, "sha256": sha256, "base_model": "me/tied", "licence": "MIT"}
    (tmp_path / "r.json").write_text(json.dumps({"registry_version": 1, "tuners": {"mine": entry}}))
    monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "r.json"))
    with pytest.raises(FileNotFoundError, match="`l2l tuners download mine`"):
        Tuner.from_pretrained("mine")
    download("mine")
    hub.log.clear()
    assert torch.equal(sigma(Tuner.from_pretrained("mine")), sigma(made()))
    assert not hub.log
