"""Published pickles are read without executing anything, bit for bit, and drive models of their architectures."""

from __future__ import annotations

import json
import os
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from broken_published import good, module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from l2l.params import Blocks
from l2l.tuners import io as store
from l2l.tuners.api import Tuner
from l2l.tuners.diagnostics import movement, sigma_change, typical_statistics
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.inspect import verify
from l2l.tuners.published import (
    KNOWN_MODELS,
    import_published,
    known_config,
    known_fingerprint,
    read_published,
)

ROOT = Path(__file__).parent.parent.parent
SHARED = Path(os.environ.get("L2L_SHARED", ROOT.parent / "shared"))
FILES = {
    "meta-llama/Llama-3.2-1B": ("llama1B_finetuner.pth", 146, torch.float32),
    "meta-llama/Llama-3.1-8B": ("llama8B_finetuner.pth", 291, torch.float32),
    "facebook/opt-30b": ("opt30B_finetuner.pth", 772, torch.float16),
    "Qwen/Qwen2.5-14B": ("qwen14B_finetuner.pth", 579, torch.float16),
}
PRINTS = Fingerprint(("layer.bias", "layer.weight"), ((3,), (3, 4)))
ORDER = ("0.weight", "0.bias", "2.weight", "2.bias")
NAMES = ("first_weight", "first_bias", "second_weight", "second_bias")


def published(base: str) -> Path:
    """The file, or a skip where it is not at hand."""
    path = SHARED / "tuners" / "published" / FILES[base][0]
    if not path.is_file():
        pytest.skip(f"{path} is not there: set L2L_SHARED to the directory that holds the shared data")
    return path


@cache
def modules_of(path: Path) -> dict[str, nn.Module]:
    """The modules themselves, by torch's own loader with its classes allow-listed: another reader than ours."""
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh, set]):
        return torch.load(path, weights_only=True, map_location="cpu")


def stacked(modules: dict[str, nn.Module], names: tuple[str, ...]) -> dict[str, Tensor]:
    found = {
        ours: torch.stack([modules[name].get_parameter(part) for name in names])
        for ours, part in zip(NAMES, ORDER, strict=True)
    }
    return found | {name: found[name][:, 0] for name in NAMES[2:]}


@pytest.fixture(params=[torch.float32, torch.float16])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.save({name: one.to(request.param) for name, one in good().items()}, tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_a_file_is_imported_bit_for_bit_in_its_own_dtype_and_computes_in_float32(small: Path, tmp_path: Path):
    tuner = import_published(small, "me/model", tmp_path / "out", PRINTS)
    kept = safetensors.torch.load_file(tmp_path / "out" / store.WEIGHTS)
    wanted = stacked(modules_of(small), PRINTS.names)
    for name, value in wanted.items():
        assert kept[name].dtype == value.dtype
        assert torch.equal(kept[name], value)
        assert tuner.network.get_parameter(name).dtype == torch.float32
    loaded = Tuner.from_pretrained(tmp_path / "out")
    assert all(torch.equal(loaded.network.get_parameter(name), value.float()) for name, value in wanted.items())


def test_the_import_says_where_it_is_from_and_that_its_licence_is_unknown(small: Path, tmp_path: Path):
    import_published(small, "me/model", tmp_path / "deep" / "out", PRINTS)
    config = json.loads((tmp_path / "deep" / "out" / store.CONFIG).read_text())
    origin = config["recipe"]["imported_from"]
    assert origin["file"] == "small.pth"
    assert len(origin["sha256"]) == 64
    assert config["recipe"]["licence"].startswith("unknown: the file states none")
    assert "licence" in (tmp_path / "deep" / "out" / store.CARD).read_text()
    assert config["base_model"] == "me/model"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_file_for_other_blocks_is_refused_and_leaves_nothing(small: Path, tmp_path: Path):
    other = Fingerprint(("layer.weight", "more.weight"), ((3, 4), (2, 2)))
    with pytest.raises(ValueError, match=r"it lacks 1: 'more.weight'; it has 1 others: 'layer.bias'"):
        import_published(small, "me/model", tmp_path / "deep" / "out", other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.pth"]


@pytest.mark.parametrize("kind", ["full", "file", "link"])
def test_a_place_that_is_taken_is_refused(small: Path, tmp_path: Path, kind: str):
    out = tmp_path / "out"
    if kind == "full":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to("elsewhere")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="exists and is no empty directory: choose another --out"):
        import_published(small, "me/model", out, PRINTS)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_unknown_base_model_is_refused_with_those_known(small: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"the blocks of 'me/model' are not known here: meta-llama/Llama-3.2-1B, "):
        import_published(small, "me/model", tmp_path / "out")


def test_of_an_import_movement_is_from_what_blocks_began_with_together_and_unknown_without(tmp_path: Path):
    names = tuple("abcd")
    modules: dict[str, Any] = {name: module() for name in names}
    with torch.no_grad():
        modules["c"].get_parameter("2.bias").add_(0.5)
    torch.save(modules, tmp_path / "four.pth")
    tuner = import_published(tmp_path / "four.pth", "me/model", tmp_path / "out", Fingerprint(names, ((2, 2),) * 4))
    assert [value > 0 for value in movement(tuner)] == [False, False, True, False]
    assert [value != 0 for value in sigma_change(tuner)] == [False, False, True, False]
    torch.save({"a": module()}, tmp_path / "one.pth")
    alone = import_published(tmp_path / "one.pth", "me/model", tmp_path / "alone", Fingerprint(("a",), ((2, 2),)))
    assert movement(alone) == sigma_change(alone) == []


def test_every_published_file_has_its_model():
    assert set(FILES) == set(KNOWN_MODELS)


TODAY = list(FILES)[date.today().toordinal() % len(FILES)]


@pytest.mark.parametrize("base", [pytest.param(base, marks=() if base == TODAY else pytest.mark.slow) for base in FILES])
def test_each_published_file_imports_verifies_and_drives_its_architecture(base: str, tmp_path: Path):
    path, (_, count, dtype) = published(base), FILES[base]
    import_published(path, base, tmp_path / "tuner")
    findings = verify(tmp_path / "tuner", known_fingerprint(base))
    assert [one.what for one in findings if one.level == "error"] == []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(base))
    tuner = Tuner.from_pretrained(tmp_path / "tuner")
    tuner.check(model)
    blocks = Blocks.of(model)
    assert len(blocks) == count
    sigma = tuner.sigma(tuner.features(typical_statistics(tuner)), blocks.names).detach()
    assert sigma.shape == (count,)
    assert (sigma > 0).all()
    assert 0.1 < tuner.factor(sigma, blocks) < 10
    kept, found = safetensors.torch.load_file(tmp_path / "tuner" / store.WEIGHTS), read_published(path)
    rows = [found.names.index(name) for name in blocks.names]
    assert all(kept[name].dtype == dtype and torch.equal(kept[name], found.weights[name][rows]) for name in NAMES)


def test_the_smallest_published_tuner_gives_the_sigma_of_its_modules(tmp_path: Path):
    base = "meta-llama/Llama-3.2-1B"
    path = published(base)
    modules = modules_of(path)
    tuner = import_published(path, base, tmp_path / "tuner")
    names = tuner.fingerprint.names
    assert all(torch.equal(tuner.network.get_parameter(n), v) for n, v in stacked(modules, names).items())
    features = torch.rand(len(names), 5, generator=torch.Generator().manual_seed(1)) * 3
    for scale in (0.1, 1.0, 5.0):
        with torch.no_grad():
            direct = torch.stack([modules[name](features[i] * scale).abs()[0] for i, name in enumerate(names)])
            ours = tuner.sigma(features * scale, names)
        assert (ours - direct).abs().max() < 1e-6
