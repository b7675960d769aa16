"""Runs under tuning schemes, from their arguments to the adapter they leave."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import same_bits
from daily import daily_slice
from torch import Tensor, nn

import l2l
from l2l.cli import main
from l2l.models.load import load_model, load_tokenizer
from l2l.models.schemes import ADAPTERS
from l2l.models.shapes import tiny_random
from l2l.params import Blocks
from l2l.train.config import KNOWN, FineTuneConfig, doubts
from l2l.train.evaluate import EvaluateConfig
from l2l.train.evaluate import run_evaluation as evaluate
from l2l.train.trainer import Session, prepare_fine_tuning

pytestmark = pytest.mark.in_turn

torch.set_num_threads(1)
TASK = "world_topic"
SMALL: dict[str, Any] = {
    "task": TASK,
    "batch_size": 4,
    "train_size": 16,
    "dev_size": 8,
    "test_size": 8,
    "eval_every": 3,
    "checkpoint_every": 4,
    "log_every": 1,
    "progress": False,
}
SCHEMES = [*ADAPTERS, "head"]
FAMILIES = ["opt", "llama", "gpt2"]
GRID = [(family, scheme) for family in FAMILIES for scheme in SCHEMES]


def fine_tune(out: Path, model: Any = "l2l/tiny", **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune(model, out=str(out), **{**SMALL, "steps": 6, **options})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Tiny random models of each family with the embedded tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer("l2l/tiny")
    for family in FAMILIES:
        tiny_random(family, vocab_size=len(tokenizer), initializer_range=0.3).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


def parts_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of what is frozen and of what is trained."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, parameter in model.named_parameters():
        found[parameter.requires_grad][name] = parameter.detach().clone()
    return found


@pytest.mark.parametrize(("family", "scheme"), daily_slice(GRID, 3))
def test_steps_move_what_is_trained_and_not_a_bit_of_the_base(family, scheme, saved):
    parts = prepare_fine_tuning(FineTuneConfig(str(saved / family), scheme=scheme, **SMALL))
    frozen, trained = parts_of(parts.model)
    for step in range(3):
        assert torch.isfinite(torch.tensor(parts.optimizer.step(parts.closures.at(step))))
    parts.optimizer.theta.restore()
    frozen_after, trained_after = parts_of(parts.model)
    assert same_bits(frozen, frozen_after)
    assert parts.optimizer.blocks.names == tuple(trained_after)
    for name, value in trained_after.items():
        assert value.isfinite().all()
        assert not torch.equal(value, trained[name])


@pytest.mark.parametrize(("family", "scheme"), daily_slice(GRID, 3))
def test_what_a_run_saves_is_evaluated_to_the_numbers_of_its_summary(family, scheme, saved, tmp_path):
    result = fine_tune(tmp_path, str(saved / family), scheme=scheme, steps=4)
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file() == (scheme in ADAPTERS)
    assert (tmp_path / "model" / "model.safetensors").is_file() == (scheme == "head")
    again = load_model(tmp_path / "model")
    kept = dict(again.named_parameters())
    assert all(torch.equal(kept[block.name], block.tensor) for block in Blocks.of(result.model))
    scores = evaluate(EvaluateConfig(str(tmp_path / "model"), TASK, rows=8, progress=False))
    assert scores["loss"] == result.summary["best"]["test"]["loss"]


@pytest.mark.parametrize("scheme", daily_slice(SCHEMES, 1))
def test_a_broken_off_run_continued_is_the_whole_run(scheme, tmp_path, monkeypatch):
    whole = fine_tune(tmp_path / "whole", scheme=scheme)
    step = Session.step

    def break_off(self: Session, optimizer: Any) -> float:
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return step(self, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", break_off)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(tmp_path / "broken", scheme=scheme)
    continued = fine_tune(tmp_path / "broken", scheme=scheme)
    assert same_bits(parts_of(whole.model)[True], parts_of(continued.model)[True])
    logs = [(tmp_path / name / "steps.l2l").read_bytes() for name in ("whole", "broken")]
    assert logs[0] == logs[1]
    name = "model.safetensors" if scheme == "head" else "adapter_model.safetensors"
    weights = [(tmp_path / run / "model" / name).read_bytes() for run in ("whole", "broken")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("scheme", daily_slice(["lora", "prefix"], 1))
def test_the_loops_do_the_same_bit_for_bit_under_an_adapter(scheme, tmp_path):
    bare = fine_tune(tmp_path / "bare", scheme=scheme, steps=3)
    lightning = fine_tune(tmp_path / "lightning", scheme=scheme, steps=3, loop="lightning")
    assert same_bits(parts_of(bare.model)[True], parts_of(lightning.model)[True])


@pytest.mark.parametrize("scheme", daily_slice(SCHEMES, 2))
def test_a_half_precision_base_is_tuned_without_moving(scheme, tmp_path):
    result = fine_tune(tmp_path, scheme=scheme, steps=3, dtype="bfloat16", save="log")
    frozen, trained = parts_of(result.model)
    assert {value.dtype for value in trained.values()} == {torch.bfloat16 if scheme == "head" else torch.float32}
    base = load_model("l2l/tiny", "bfloat16").get_input_embeddings().weight
    assert any(value.shape == base.shape and torch.equal(value, base) for value in frozen.values())
    assert result.summary["last"]["test"]["loss"] < 10


def test_an_adapter_finds_the_directory_of_its_base_from_anywhere(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved)
    result = fine_tune(tmp_path, "opt", scheme="ia3", steps=1)
    monkeypatch.chdir(tmp_path)
    assert same_bits(parts_of(load_model(tmp_path / "model"))[False], merged(parts_of(result.model)))


def merged(parts: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Frozen and trained tensors together: in a loaded model all are frozen."""
    return parts[0] | parts[1]


def test_an_adapter_of_the_embedded_model_names_it_and_not_where_it_is_installed(tmp_path):
    fine_tune(tmp_path, scheme="lora", steps=1)
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "l2l/tiny"


@pytest.mark.parametrize(("scheme", "lr", "epsilon"), [("full", 1e-6, 1e-3), ("lora", 5e-5, 1e-2), ("prefix", 1e-3, 0.1)])
def test_learning_rate_and_epsilon_are_the_schemes_and_are_recorded(scheme, lr, epsilon, tmp_path):
    config = FineTuneConfig(scheme=scheme)
    assert (config.lr, config.epsilon) == (lr, epsilon)
    given = FineTuneConfig(scheme=scheme, lr=2e-4, epsilon=5e-3)
    assert (given.lr, given.epsilon) == (2e-4, 5e-3)
    summary = fine_tune(tmp_path, scheme=scheme, steps=1, save="log").summary
    assert (summary["lr"], summary["epsilon"], summary["scheme"]) == (lr, epsilon, scheme)
    assert (summary["config"]["lr"], summary["config"]["epsilon"]) == (lr, epsilon)
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (recorded["lr"], recorded["epsilon"]) == (lr, epsilon)


@pytest.mark.parametrize("scheme", KNOWN)
def test_the_defaults_of_a_scheme_are_not_doubted_on_large_models(scheme):
    known = KNOWN[scheme]
    assert doubts(scheme, known.lr, known.epsilon, 13 * 10**9) == []
    assert doubts(scheme, "auto", known.epsilon, 10**6) == []


@pytest.mark.parametrize(
    ("scheme", "lr", "epsilon", "parameters", "words"),
    [
        ("full", 5e-5, 1e-3, 10**9, "lr=5e-05 lies far above"),
        ("full", 1e-4, 1e-3, 10**9, "lr=0.0001 lies far above"),
        ("full", 1e-3, 1e-3, 10**6, ""),
        ("lora", 1e-6, 1e-2, 10**9, "lr=1e-06 lies far below"),
        ("prefix", 1e-6, 1e-1, 10**9, "lr=1e-06 lies far below"),
        ("prefix", 1e-3, 1e-3, 10**9, "epsilon=0.001 lies far below"),
    ],
)
def test_values_of_another_scheme_are_doubted(scheme, lr, epsilon, parameters, words):
    found = doubts(scheme, lr, epsilon, parameters)
    assert len(found) == bool(words)
    assert all(line.startswith(words) and scheme in line for line in found)


def test_a_run_with_the_learning_rate_of_another_scheme_says_so_in_one_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "l2l"):
        fine_tune(tmp_path, scheme="prefix", lr=1e-6, steps=1, save="log")
    said = [record.message for record in caplog.records if record.name.startswith("l2l.train")]
    assert len(said) == 1
    assert said[0].startswith("lr=1e-06 lies far below what is known to work for scheme 'prefix' here")


def test_a_tuner_of_the_full_model_is_refused_for_adapters_with_the_way_out(tmp_path):
    tuner = l2l.Tuner.for_model(l2l.load_model("l2l/tiny"))
    with pytest.raises(ValueError, match=r"none for those that scheme 'lora' trains: use scheme full, or a size-free"):
        fine_tune(tmp_path, method="learned", tuner=tuner, scheme="lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", daily_slice(SCHEMES, 2))
def test_a_size_free_tuner_serves_adapters(scheme, tmp_path):
    tuner = l2l.Tuner.for_model(l2l.load_model("l2l/tiny"), architecture="shared_mlp", start="random")
    result = fine_tune(tmp_path, method="learned", tuner=tuner, scheme=scheme, steps=3)
    assert result.summary["blocks"] == len(Blocks.of(result.model))


def test_dizo_projects_adapters(tmp_path):
    result = fine_tune(tmp_path, method="dizo", method_args={"interval": 2, "iterations": 1}, scheme="lora", steps=4)
    assert result.summary["passes"] == 4 * 2 + 2 * 2


def test_fields_that_mean_nothing_under_a_scheme_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scheme 'lora' trains no word embedding"):
        fine_tune(tmp_path, scheme="lora", sparse_embeddings=True)
    with pytest.raises(ValueError, match="compile=True does not go with scheme 'prefix'"):
        fine_tune(tmp_path, scheme="prefix", compile=True)
    with pytest.raises(ValueError, match="quantize='bnb4' freezes the weights that scheme 'full' trains"):
        FineTuneConfig(quantize="bnb4")
    with pytest.raises(ValueError, match="quantize='int3' must be one of none"):
        FineTuneConfig(scheme="lora", quantize="int3")  # pyright: ignore[reportArgumentType]


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("l2l.models.load.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes, which is not installed: pip install 'l2l\[quant\]'"):
        FineTuneConfig(scheme="lora", quantize="bnb8")


@pytest.mark.parametrize("quantize", ["torchao-int8", "bnb4", "bnb8"])
@pytest.mark.filterwarnings("ignore")  # of the packages' own loading
def test_a_quantised_base_is_tuned_through_float32_adapters(quantize, tmp_path):
    package = "torchao" if quantize == "torchao-int8" else "bitsandbytes"
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    result = fine_tune(tmp_path, scheme="lora", quantize=quantize, steps=3)
    assert {block.tensor.dtype for block in Blocks.of(result.model)} == {torch.float32}
    again = load_model(tmp_path / "model", quantize=quantize)
    ids = torch.tensor([[5, 9, 3]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, result.model(input_ids=ids).logits)
        assert not torch.equal(load_model("l2l/tiny")(input_ids=ids).logits, again(input_ids=ids).logits)


def test_the_command_line_takes_a_scheme_and_its_arguments(tmp_path, capsys):
    small = "--task world_topic --steps 1 --batch_size 4 --train_size 8 --dev_size 4 --test_size 4 --progress false"
    command = ["fine-tune", *small.split(), "--out", str(tmp_path), "--scheme", "lora", "--scheme_args", '{"r": 2}']
    assert main(command) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["scheme"], summary["config"]["scheme_args"], summary["lr"]) == ("lora", {"r": 2}, 5e-5)
    assert main([*command[:-1], '{"rank": 2}']) == 2
    assert "has no argument 'rank'" in capsys.readouterr().err
