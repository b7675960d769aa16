"""Registries of tuners: what the package knows, what users add, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l2l.tuners import sources as registry
from l2l.tuners.api import Tuner
from l2l.tuners.io import bundled_folder

GOOD = {"url": "https://host/a.pth", "sha256": "0" * 64, "base_model": "me/m", "licence": "MIT", "format": "published"}


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(registry.VARIABLE, raising=False)


def written(path: Path, tuners: Any, version: Any = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"registry_version": version, "tuners": tuners}))
    return path


def test_every_bundled_tuner_is_in_the_registry_as_it_lies_there():
    entries = registry.read_registry(registry.OWN)
    for config in sorted(bundled_folder().glob("*/config.json")):
        known, weights = json.loads(config.read_text()), config.with_name("tuner.safetensors")
        wanted = {
            "bundled": config.parent.name,
            "revision": known["revision"],
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "size": weights.stat().st_size,
            "base_model": known["base_model"],
            "blocks": len(known["blocks"]),
            "licence": "MIT",
            "format": "l2l",
        }
        entry = entries.get(config.parent.name)
        assert entry is not None, f"add to {registry.OWN.name}: {json.dumps({config.parent.name: wanted}, indent=1)}"
        assert {name: getattr(entry, name) for name in wanted} == wanted


def test_the_published_files_have_pinned_addresses_and_the_checksums_of_the_files():
    published = [entry for entry in registry.read_registry(registry.OWN).values() if entry.format == "published"]
    assert len(published) == 4
    folder = Path(os.environ.get("L2L_SHARED", Path(__file__).parents[3] / "shared")) / "tuners" / "published"
    for entry in published:
        assert entry.url is not None and entry.revision is not None
        assert f"/{entry.revision}/" in entry.url
        assert entry.licence == "unknown"
    if not folder.is_dir():
        pytest.skip(f"no published tuners in {folder}")
    for entry in published:
        content = (folder / str(entry.url).rpartition("/")[2]).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry.sha256, entry.size)


def test_a_users_registry_adds_and_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path / ".config" / "l2l" / "registry.json", {"mine": GOOD, "l2l-tiny": GOOD})
    found = registry.entries()
    assert found["mine"].url == found["l2l-tiny"].url == "https://host/a.pth"
    assert "zoft-opt-30b" in found
    monkeypatch.setenv(registry.VARIABLE, str(written(tmp_path / "other.json", {"theirs": GOOD})))
    assert {"theirs", "l2l-tiny"} <= registry.entries().keys()
    assert "mine" not in registry.entries()


def test_a_registry_that_the_environment_names_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"L2L_REGISTRY names '.*none.json', which is no file"):
        registry.entries()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "12"}, "sha256 is '12'; it must be 64 hexadecimal digits"),
        ({"sha256": 5}, "sha256 is 5; it must"),
        ({"url": "file:///etc/passwd"}, "url is 'file:///etc/passwd'; it must begin with http"),
        ({"url": None}, "it must be exactly one of url, hub and bundled"),
        ({"hub": "me/t"}, "it must be exactly one of url, hub and bundled"),
        ({"url": None, "hub": "me/t"}, "revision is None; it must pin the commit"),
        ({"url": None, "bundled": "../../etc"}, "bundled is '../../etc'; it must name a bundled folder"),
        ({"format": "pickle"}, "format is 'pickle'; it must be l2l or published"),
        ({"format": "l2l"}, "config_sha256 is None; it must be 64 hexadecimal digits"),
        ({"size": "big"}, "size is 'big'; it must be a whole number"),
        ({"licence": None}, "licence is None; it must be a string"),
        ({"base_model": 3}, "base_model is 3; it must be a string"),
        ({"colour": "red"}, "an entry has no field 'colour' \\('mine'\\)"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    path = written(tmp_path / "r.json", {"mine": GOOD | change})
    with pytest.raises(ValueError, match=message):
        registry.read_registry(path)


def test_an_entry_without_a_needed_field_or_with_a_path_for_a_name_is_refused(tmp_path: Path):
    lacking = {name: value for name, value in GOOD.items() if name != "sha256"}
    with pytest.raises(ValueError, match="an entry lacks 'sha256'"):
        registry.read_registry(written(tmp_path / "r.json", {"mine": lacking}))
    with pytest.raises(ValueError, match=r"name is '../x'; it must begin with a letter"):
        registry.read_registry(written(tmp_path / "r.json", {"../x": GOOD}))


@pytest.mark.parametrize("text", ["", "[]", '{"registry_version": 2, "tuners": {}}', '{"registry_version": 1}', "\x00"])
def test_a_file_that_is_no_registry_is_refused(tmp_path: Path, text: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r.json (is not a|has no table)"):
        registry.read_registry(tmp_path / "r.json")


def test_a_known_tuner_that_is_not_here_yet_is_refused_with_the_command_that_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("L2L_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="is known, but not here yet: run `l2l tuners download zoft-opt-30b`"):
        Tuner.from_pretrained("zoft-opt-30b")


def test_entries_are_values():
    entry = registry.read_registry(registry.OWN)["zoft-opt-30b"]
    with pytest.raises(ValueError, match="revision is None; it must pin"):
        replace(entry, url=None, hub="me/t", revision=None)
