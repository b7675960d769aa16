"""``l2l fine-tune --match``: what a run does, and says, on models that are more or less the tuner's own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging

import l2l
from l2l.cli import main
from l2l.experiments.runner import non_default_options
from l2l.models.load import load_tokenizer
from l2l.models.shapes import tiny_random
from l2l.train.config import FineTuneConfig
from l2l.tuners.api import Tuner
from l2l.tuners.model import Provenance
from l2l.tuners.transfer import identified

pytestmark = pytest.mark.in_turn

SHORT = shlex.split("--method learned --lr 1e-4 --steps 3 --batch_size 2 --train_size 8 --dev_size 4 --test_size 4")
LAYERS = 2


class Wrapped(nn.Module):
    """The same blocks under names with a prefix."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def llama(seed: int = 0, layers: int = LAYERS, **sizes: Any) -> nn.Module:
    vocabulary = len(load_tokenizer("l2l/tiny"))
    return tiny_random("llama", seed, vocab_size=vocabulary, num_hidden_layers=layers, **sizes)


def tuner_for(model: nn.Module, identity: bool = False) -> Tuner:
    made = Tuner.for_model(model, hidden=4, start="random", provenance=Provenance("tests/base"))
    return identified(made, model) if identity else made


TUNERS: dict[str, Callable[[], Tuner]] = {
    "exact": lambda: tuner_for(llama(), True),
    "derivative": lambda: tuner_for(llama(seed=1), True),
    "renamed": lambda: tuner_for(Wrapped(llama())),
    "deeper": lambda: tuner_for(llama(layers=3)),
    "shallower": lambda: tuner_for(llama(layers=1)),
    "wider": lambda: tuner_for(llama(hidden_size=64, intermediate_size=96)),
    "family": lambda: tuner_for(tiny_random("opt")),
    "size-free": lambda: Tuner.for_model(tiny_random("opt"), "shared_mlp", start="random"),
}
CASES = [
    ("exact", "exact", ""),
    (
        "derivative",
        "exact",
        "(derivative): names and shapes are the same, the weights are others, as after fine-tuning",
    ),
    ("renamed", "shape", "(renamed): the shapes are the same under other names: 'inner.model.embed_tokens.weight' is"),
    ("deeper", "shape", "(subset): 21 blocks are the same; 9 missing in the model: 'model.layers.2.self_attn.q_proj"),
    ("shallower", "kind", "(subset): 12 blocks are the same; 9 not in the tuner: 'model.layers.1.self_attn.q_proj"),
    ("wider", "kind", "(other size): the blocks have the same roles in other shapes or numbers; 21 of another shape"),
    ("family", "kind", "(other family): the blocks have other names and shapes; "),
    ("size-free", "exact", ""),
]
LEVELS = ("exact", "shape", "kind")


@pytest.fixture(autouse=True)
def without_bars() -> Iterator[None]:
    """No loading bars: what the program's environment does for it in a process of its own."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A model, and tuners that are more or less its own."""
    folder = tmp_path_factory.mktemp("places")
    llama().save_pretrained(folder / "model")  # pyright: ignore[reportCallIssue]
    load_tokenizer("l2l/tiny").save_pretrained(folder / "model")
    for name, make in TUNERS.items():
        make().save_pretrained(folder / name)
    return folder


def run(places: Path, out: Path, tuner: str, *more: str) -> int:
    model = ["--model", str(places / "model"), "--tuner", str(places / tuner)]
    return main(["fine-tune", *model, "--out", str(out), *SHORT, *more])


@pytest.mark.parametrize(("tuner", "level", "said"), CASES, ids=[case[0] for case in CASES])
def test_a_run_at_the_level_that_is_needed_trains_and_says_what_the_model_is(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tuner: str, level: str, said: str
):
    assert run(places, tmp_path / "out", tuner, *(["--match", level] if level != "exact" else [])) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tuner for")]
    assert len(lines) == bool(said)
    assert all(f"tuner for 'tests/base' on this model {said}" in line for line in lines)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["steps"], summary["blocks"], summary["config"]["match"]) == (3, 9 * LAYERS + 3, level)


@pytest.mark.parametrize(("tuner", "needed", "said"), CASES, ids=[case[0] for case in CASES])
def test_a_stricter_level_is_refused_in_a_line_before_anything_is_written(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tuner: str, needed: str, said: str
):
    for level in LEVELS[: LEVELS.index(needed)]:
        assert run(places, tmp_path / "out", tuner, "--match", level) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("l2l: the tuner ")
        assert "'tests/base'" in line
        assert f" --match {needed}" in line
    assert not (tmp_path / "out").exists()


def test_adapters_are_refused_with_the_way_out_and_take_the_sigma_of_similar_blocks(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = ("--scheme", "lora", "--lr", "1e-3", "--epsilon", "1e-2")
    for level in ("exact", "shape"):
        assert run(places, tmp_path / "out", "exact", *lora, "--match", level) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("or give them the sigma of similar blocks with --match kind")
    assert run(places, tmp_path / "out", "exact", *lora, "--match", "kind") == 0
    assert "(subset): 21 blocks are the same; 8 not in the tuner: " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["blocks"] == 2 * 2 * LAYERS


def test_an_unknown_level_is_refused(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(places, tmp_path / "out", "exact", "--match", "loose") == 2
    assert "loose" in capsys.readouterr().err
    with pytest.raises(ValueError, match="match='loose' must be one of exact, shape, kind"):
        FineTuneConfig(match="loose")  # pyright: ignore[reportArgumentType]


def test_from_python_both_ways_take_match(places: Path, tmp_path: Path):
    model, tuner = llama(), Tuner.from_pretrained(places / "wider")
    with pytest.raises(ValueError, match=r"does not fit this model \(other size\).*try --match kind"):
        l2l.ZOFineTuner(model, tuner)
    optimizer = l2l.ZOFineTuner(model, tuner, lr=1e-4, match="kind")
    ids = torch.arange(12).reshape(2, 6)
    assert optimizer.step(lambda: model(input_ids=ids, labels=ids).loss) > 0
    small = {"steps": 2, "batch_size": 2, "train_size": 8, "dev_size": 4, "test_size": 4, "progress": False}
    name = str(places / "model")
    done = l2l.fine_tune(name, method="learned", tuner=tuner, match="kind", lr=1e-4, out=str(tmp_path / "out"), **small)
    assert done.summary["steps"] == 2


def test_frozen_blocks_do_not_need_another_level(places: Path):
    model = llama()
    for block in model.get_submodule("model.layers.0").parameters():
        block.requires_grad_(False)
    optimizer = l2l.ZOFineTuner(model, Tuner.from_pretrained(places / "exact"), lr=1e-4)
    assert len(optimizer.blocks) == 9 * (LAYERS - 1) + 3


def test_the_default_says_nothing_in_the_name_of_a_trial():
    assert non_default_options({"match": FineTuneConfig().match, "steps": 7}) == {"steps": 7}
