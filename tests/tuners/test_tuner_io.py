"""Tuners on disk and on the hub: exact, inert, and refused with one clear sentence when broken."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cases import TiedLM

from l2l.params import Blocks
from l2l.tuners import io as store
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics
from l2l.tuners.model import Provenance
from l2l.tuners.normalize import EnergyNormalizer


def sigma(tuner: Tuner) -> torch.Tensor:
    blocks = Blocks.of(TiedLM())
    return tuner.sigma(tuner.features(RunStatistics.start(blocks)), blocks.names).detach()


@pytest.fixture
def tuner() -> Tuner:
    made = Tuner.for_model(
        TiedLM(),
        seed=3,
        normalizer=EnergyNormalizer(7.0, 4),
        provenance=Provenance("me/tied", "abc", {"steps": 30}, {"loss": 1.5}),
        hidden=8,
    )
    with torch.no_grad():
        made.network.get_parameter("second_bias").add_(0.125)
    return made


@pytest.fixture
def folder(tuner: Tuner, tmp_path: Path) -> Path:
    return tuner.save_pretrained(tmp_path / "tuner")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / store.CONFIG).read_text())
    change(config)
    (folder / store.CONFIG).write_text(json.dumps(config))


def test_a_saved_tuner_gives_the_same_sigma_bit_for_bit_and_keeps_all_it_knows(tuner: Tuner, folder: Path):
    loaded = Tuner.from_pretrained(folder)
    assert torch.equal(sigma(loaded), sigma(tuner))
    assert loaded.fingerprint == tuner.fingerprint
    assert loaded.normalizer == tuner.normalizer
    assert loaded.provenance == tuner.provenance
    assert loaded.architecture_args == tuner.architecture_args
    assert loaded.feature_set == tuner.feature_set
    assert loaded.fingerprint.kinds == tuner.fingerprint.kinds
    loaded.check(TiedLM())


def test_a_tuner_is_three_files_and_saving_leaves_nothing_else(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "tuner.safetensors"]


def test_saving_twice_gives_the_same_bytes(tuner: Tuner, folder: Path, tmp_path: Path):
    again = tuner.save_pretrained(str(tmp_path / "again"))
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_the_card_says_what_the_tuner_is(folder: Path):
    card = (folder / store.CARD).read_text()
    assert card.startswith("---\nlibrary_name: l2l\nbase_model: me/tied\n")
    assert '"steps": 30' in card
    assert "6 blocks" in card


def test_a_save_interrupted_half_way_leaves_the_old_tuner(tuner: Tuner, folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in ("safetensors.torch.save_file", "l2l.tuners.io.render"):
        with monkeypatch.context() as patch:

            def half(*arguments: object) -> None:
                if len(arguments) == 3:
                    Path(str(arguments[1])).write_bytes(b"half of the bytes")
                raise KeyboardInterrupt

            patch.setattr(target, half)
            with pytest.raises(KeyboardInterrupt):
                tuner.save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, pickle.dumps({"a": 1}), "cut"])
def test_corrupted_weights_are_refused(folder: Path, content: bytes | str):
    file = folder / store.WEIGHTS
    file.write_bytes(file.read_bytes()[:-10] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"tuner.safetensors is not a readable safetensors file .*: get it again"):
        Tuner.from_pretrained(folder)


@pytest.mark.parametrize("missing", [store.WEIGHTS, store.CONFIG])
def test_a_missing_file_is_refused(folder: Path, missing: str):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"{missing} is not a readable .*: get it again"):
        Tuner.from_pretrained(folder)


@pytest.mark.parametrize("field", [*store.FIELDS, *store.FIELDS_SINCE[2]])
def test_a_missing_field_of_the_config_is_named(folder: Path, field: str):
    rewrite(folder, lambda config: config.pop(field))
    with pytest.raises(ValueError, match=f"config.json lacks {field}: the file is incomplete"):
        Tuner.from_pretrained(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b"3"])
def test_a_config_that_is_no_config_is_refused(folder: Path, text: bytes):
    (folder / store.CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=r"config.json is not (a readable tuner config|an l2l tuner)"):
        Tuner.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "peft"}, "is not an l2l tuner: its 'format' is not 'l2l-tuner'"),
        ({"format_version": 5}, "has format version 5; this l2l reads 1 to 4: upgrade"),
        ({"format_version": 0}, "has format version 0; this l2l reads 1 to 4: upgrade"),
        ({"format_version": "1"}, "has format version 1; this l2l reads"),
        ({"architecture": "os.path"}, "unknown tuner architecture 'os.path'"),
        ({"architecture": "../../evil"}, "unknown tuner architecture '../../evil' .it is no path of a module"),
        ({"architecture": "transformer_of_mine"}, "unknown tuner architecture 'transformer_of_mine'"),
        ({"architecture": "store"}, "unknown tuner architecture 'store'"),
        ({"architecture": 5}, "config.json holds a value that does not fit"),
        ({"architecture_args": {"blocks": 6, "depth": 3}}, "config.json holds a value that does not fit"),
        ({"architecture_args": {"blocks": 5, "hidden": 8}}, "lists 6 blocks for 5 networks"),
        ({"architecture_args": {"blocks": 6, "hidden": 9}}, "tuner weights do not fit their config"),
        ({"architecture_args": {"blocks": 6, "hidden": -1}}, "config.json holds a value that does not fit"),
        ({"architecture_args": {"blocks": 6, "hidden": 8, "inputs": 14}}, "takes 14 features, but 'paper' has 5"),
        ({"features": "mine"}, "unknown tuner features 'mine'"),
        ({"features": ["paper"]}, "config.json holds a value that does not fit"),
        ({"normaliser": {"kind": "mine"}}, "config.json holds a value that does not fit"),
        ({"normaliser": {"name": "mine"}}, "unknown tuner normalizer 'mine'"),
        ({"normaliser": {"name": "energy", "batch_size": 0}}, "must be positive and finite"),
        ({"normaliser": {"name": "energy", "batch_size": "many"}}, "config.json holds a value that does not fit"),
        ({"normaliser": {"name": "curvature", "traces": [1]}}, "config.json holds a value that does not fit"),
        ({"basis": {"embed.weight": 2}}, "config lists a basis for 1 blocks that is not there"),
        ({"basis": 6}, "config.json holds a value that does not fit"),
        ({"blocks": [{"name": "a", "shape": [1], "kind": "odd"}] * 6}, "kinds that l2l does not know"),
        ({"blocks": [{"name": "a", "shape": [1]}] * 6}, "have names twice, or sizes that are no whole numbers"),
        ({"blocks": [{"name": str(i), "shape": [-1]} for i in range(6)]}, "sizes that are no whole numbers"),
        ({"blocks": [{"shape": [1]}] * 6}, "config.json holds a value that does not fit"),
        ({"blocks": 6}, "config.json holds a value that does not fit"),
    ],
)
def test_a_value_of_the_config_that_does_not_fit_is_refused(folder: Path, change: dict[str, Any], message: str):
    rewrite(folder, lambda config: config.update(change))
    with pytest.raises(ValueError, match=message):
        Tuner.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float):
    weights = safetensors.torch.load_file(folder / store.WEIGHTS)
    weights["first_bias"][0, 0] = value
    safetensors.torch.save_file(weights, folder / store.WEIGHTS)
    with pytest.raises(ValueError, match=r"tuner weights \['first_bias'\] are not finite"):
        Tuner.from_pretrained(folder)


@pytest.mark.parametrize("change", ["rename", "drop", "add"])
def test_weights_of_other_names_are_refused(folder: Path, change: str):
    weights = safetensors.torch.load_file(folder / store.WEIGHTS)
    if change != "add":
        moved = weights.pop("first_bias")
        weights |= {"bias": moved} if change == "rename" else {}
    else:
        weights["more"] = torch.zeros(1)
    safetensors.torch.save_file(weights, folder / store.WEIGHTS)
    with pytest.raises(ValueError, match="tuner weights do not fit their config"):
        Tuner.from_pretrained(folder)


def test_errors_are_one_line(folder: Path):
    rewrite(folder, lambda config: config.update(format_version=99))
    with pytest.raises(ValueError) as caught:
        Tuner.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nowhere_is_refused_with_what_was_looked_for():
    with pytest.raises(FileNotFoundError, match="no tuner 'opt-9000b': it is not a directory, not bundled"):
        Tuner.from_pretrained("opt-9000b")
    with pytest.raises(FileNotFoundError, match=r"no tuner '\./nowhere': it is not a directory"):
        Tuner.from_pretrained("./nowhere")


def test_a_bundled_tuner_loads_by_name_with_or_without_a_slash(folder: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(folder, folder.parent / "bundled" / "me-tied")
    monkeypatch.setattr("l2l.tuners.io.bundled_folder", lambda: folder.parent / "bundled")
    for name in ("me-tied", "me/tied"):
        assert torch.equal(sigma(Tuner.from_pretrained(name)), sigma(Tuner.from_pretrained(folder)))


def test_a_hub_id_that_is_not_in_the_cache_is_refused_clearly_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="tuner 'me/nothing' is not in the local cache and the hub cannot be"):
        Tuner.from_pretrained("me/nothing")


def test_a_tuner_in_the_local_cache_of_the_hub_loads_by_its_id(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--tuner"
    tuner.save_pretrained(repository / "snapshots" / commit)
    for name in ("main", "v1"):
        (repository / "refs" / name).parent.mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "v1", commit):
        assert torch.equal(sigma(Tuner.from_pretrained("me/tuner", revision)), sigma(tuner))
    with pytest.raises(FileNotFoundError, match="is not in the local cache"):
        Tuner.from_pretrained("me/tuner", "v2")


def test_pushing_uploads_the_saved_form_and_gives_the_commit(tuner: Tuner, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            seen["created"] = (repo_id, options["private"])

        def upload_folder(self, repo_id: str, folder_path: str, revision: str | None) -> Any:
            seen["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/{revision}"})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert tuner.push_to_hub("me/tuner", private=True, revision="v1") == "https://hub/me/tuner/v1"
    assert seen == {"created": ("me/tuner", True), "files": ["README.md", "config.json", "tuner.safetensors"]}


def test_a_fresh_tuner_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    Tuner.for_model(TiedLM())
    assert torch.equal(before, torch.get_rng_state())
