"""Kinds A2 and A6 of issue 16: what can fail at the end of a run is tried before its first step, and what a run saves is
loaded by ``l2l.load_model``, by transformers and by peft.

Situations of others, tried here: huggingface/transformers#29988 (a generation configuration that is read and not written,
after the last step), huggingface/transformers#30202 (tensors that share memory are dropped when a model is saved),
huggingface/peft#1059 and #1574 (an adapter with a name of its own lies where nobody looks for it), huggingface/peft#2252 (an
adapter that is named like a prefix of its tensors), huggingface/peft#1457 (an adapter of a base with added tokens),
huggingface/peft#2422 (a classifier's head beside the adapter), safetensors/safetensors#782 (files that only their owner
reads).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from daily import daily_slice
from safetensors.torch import load_file
from torch import nn

import l2l
from l2l.cli import main
from l2l.models.load import load_model, load_tokenizer
from l2l.models.schemes import ADAPTERS
from l2l.models.shapes import tiny_random
from l2l.report.run_directory import read_tensors

torch.set_num_threads(1)
SMALL: dict[str, Any] = {
    "task": "world_topic",
    "batch_size": 4,
    "train_size": 8,
    "dev_size": 4,
    "test_size": 4,
    "eval_every": 1,
    "lr": 1e-2,
    "epsilon": 1e-2,
    "steps": 2,
    "progress": False,
}
IDS = torch.tensor([[5, 9, 3, 7, 1, 2]])
pytestmark = [
    pytest.mark.in_turn,
    pytest.mark.filterwarnings("ignore"),  # of peft and transformers, about what these tests do on purpose
]


def fine_tune(out: Path, model: Any = "l2l/tiny", **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune(model, out=str(out), **{**SMALL, **options})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("l2l/tiny")


@pytest.fixture
def saved(tokenizer, tmp_path) -> Path:
    """A random model with the embedded tokenizer, in a directory of its own."""
    folder = tmp_path / "base"
    tiny_random("llama", vocab_size=len(tokenizer), initializer_range=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_loaded(result: l2l.FineTuneResult, **options: Any) -> None:
    """What the run saved computes what its model computes: loaded here, and by transformers and peft alone."""
    folder = result.out / "model"
    assert torch.equal(logits(load_model(folder, **options)), logits(result.model))
    classifies = "SequenceClassification" in type(load_model(folder, **options)).__name__ or options.get("head") == "classifier"
    auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    if (folder / "adapter_config.json").exists():
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = load_model("l2l/tiny") if named == "l2l/tiny" else auto.from_pretrained(named, dtype=torch.float32)
        plain: Any = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    else:
        plain = auto.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.allclose(logits(plain), logits(result.model), atol=1e-6)
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == load_tokenizer("l2l/tiny").get_vocab()
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o666 & ~umask()}


def umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found


def config_of(scheme: str) -> Any:
    made = {
        "lora": lambda: peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        ),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    return made[scheme]()


# A6: schemes x names x several adapters x a second run x an adapter as the base x a base that is nowhere else.

OWN = [(scheme, name) for scheme in ("lora", "ia3", "prompt", "prefix") for name in ("default", "mine", "lora", "a-b_c")]


@pytest.mark.parametrize(("scheme", "name"), daily_slice(OWN, 3))
def test_an_adapter_with_any_name_is_loaded(scheme, name, tokenizer, tmp_path):
    model = peft.get_peft_model(load_model("l2l/tiny"), config_of(scheme), adapter_name=name)
    assert_loaded(fine_tune(tmp_path / "run", model.eval(), tokenizer=tokenizer))


@pytest.mark.parametrize("active", ["first", "second"])
def test_of_several_adapters_the_one_that_is_trained_is_saved(active, tokenizer, tmp_path):
    model: Any = peft.get_peft_model(load_model("l2l/tiny"), config_of("lora"), adapter_name="first")
    model.add_adapter("second", config_of("lora"))
    model.set_adapter(active)
    assert_loaded(fine_tune(tmp_path / "run", model.eval(), tokenizer=tokenizer))


def test_adapters_that_are_active_together_are_refused_with_a_way_out_that_works(tokenizer, tmp_path):
    model: Any = peft.get_peft_model(load_model("l2l/tiny"), config_of("lora"), adapter_name="first")
    model.add_adapter("second", config_of("lora"))
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match=r"active together, and one is saved: choose one by model.set_adapter\('first'\)"):
        fine_tune(tmp_path / "run", model.eval(), tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
    model.set_adapter("first")
    assert_loaded(fine_tune(tmp_path / "run", model.eval(), tokenizer=tokenizer))


@pytest.mark.parametrize("scheme", daily_slice(["full", "head", *ADAPTERS], 2))
def test_every_scheme_on_a_directory(scheme, saved, tmp_path):
    assert_loaded(fine_tune(tmp_path / "run", str(saved), scheme=scheme))


@pytest.mark.parametrize("scheme", daily_slice(["full", "head", *ADAPTERS], 2))
@pytest.mark.parametrize("change", ["none", "trained", "resized", "merged"])
def test_every_scheme_on_a_model_that_lies_nowhere_as_it_is(change, scheme, tokenizer, saved, tmp_path):
    model: Any = load_model(saved)
    if change == "none":
        model.config._name_or_path = ""
    elif change == "trained":
        model = fine_tune(tmp_path / "first", model, tokenizer=tokenizer, save="log").model
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.add_(0.1)
    elif change == "resized":
        model.resize_token_embeddings(len(tokenizer) + 3)
    else:
        lora = peft.get_peft_model(model, config_of("lora"), adapter_name="mine")
        model = lora.merge_and_unload().requires_grad_(True)
    result = fine_tune(tmp_path / "run", model.eval(), tokenizer=tokenizer, scheme=scheme)
    assert (result.out / "model" / "base").is_dir() == (scheme in ADAPTERS)
    assert_loaded(result)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert torch.equal(logits(load_model(tmp_path / "moved" / "model")), logits(result.model))


@pytest.mark.parametrize("scheme", daily_slice(["full", "head", *ADAPTERS], 2))
def test_an_adapter_as_the_base_is_merged_and_trained_on(scheme, tmp_path):
    first = fine_tune(tmp_path / "first", scheme="lora", lr=0.3)
    result = fine_tune(tmp_path / "run", str(tmp_path / "first" / "model"), scheme=scheme)
    assert result.summary["initial_dev_loss"] == pytest.approx(first.summary["best"]["dev"]["loss"], abs=0.3)
    assert_loaded(result)


def test_virtual_tokens_as_the_base_are_refused_and_their_base_is_taken(tmp_path):
    fine_tune(tmp_path / "first", scheme="prompt")
    with pytest.raises(
        ValueError, match="cannot be merged into the weights: it is made of virtual tokens; give its base, 'l2l/tiny'"
    ):
        fine_tune(tmp_path / "run", str(tmp_path / "first" / "model"), scheme="lora")
    assert_loaded(fine_tune(tmp_path / "run", "l2l/tiny", scheme="lora"))


@pytest.mark.parametrize("scheme", ["lora", "prefix"])
def test_a_second_run_on_the_base_of_the_first_is_refused_or_right_and_the_way_out_works(scheme, tokenizer, tmp_path):
    base = load_model("l2l/tiny")
    expected = logits(base)
    first: Any = fine_tune(tmp_path / "first", base, scheme=scheme, tokenizer=tokenizer).model
    if scheme == "lora":
        for given in (base, first):
            with pytest.raises(ValueError, match=r"give `result.model.unload\(\)`"):
                fine_tune(tmp_path / "second", given, scheme="lora", tokenizer=tokenizer)
    assert not (tmp_path / "second").exists()
    again = first.unload() if scheme == "lora" else first.get_base_model()
    assert torch.equal(logits(again), expected)
    second = fine_tune(tmp_path / "second", again, scheme=scheme, tokenizer=tokenizer, seed=1)
    assert_loaded(second)
    assert not (tmp_path / "second" / "model" / "base").exists()
    merged = second.model.merge_and_unload() if scheme == "lora" else second.model.get_base_model()  # pyright: ignore
    assert_loaded(fine_tune(tmp_path / "third", merged, scheme=scheme, tokenizer=tokenizer, seed=1))


@pytest.mark.parametrize("scheme", ["full", "lora", "ia3"])
def test_a_classifier_is_loaded_with_the_head_that_it_was_trained_with(scheme, saved, tmp_path):
    result = fine_tune(tmp_path / "run", str(saved), head="classifier", scheme=scheme)
    again = load_model(tmp_path / "run" / "model")
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        found, expected = (model(input_ids=IDS, attention_mask=mask).logits for model in (again, result.model))
    assert torch.equal(found, expected)


# A2: before the first step.


def refused(model: Any, out: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        fine_tune(out, model, **options)
    assert not out.exists()
    assert not list(out.parent.glob(".writing-*"))


def test_attentions_in_the_config_are_refused_before_training_and_both_ways_out_work(saved, tmp_path, capsys):
    edit(saved / "config.json", output_attentions=True)
    refused(str(saved), tmp_path / "run", "--attn_implementation eager, or remove output_attentions")
    small = [f"--{name}={str(value).lower()}" for name, value in SMALL.items()]
    assert main(["fine-tune", *small, "--model", str(saved), "--out", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (
        main(["fine-tune", *small, "--model", str(saved), "--out", str(tmp_path / "run"), "--attn_implementation", "eager"])
        == 0
    )
    edit(saved / "config.json", output_attentions=False)
    assert_loaded(fine_tune(tmp_path / "second", str(saved)))


@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_a_generation_config_that_is_read_is_also_written(scheme, saved, tmp_path):
    (saved / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "do_sample": false}')
    result = fine_tune(tmp_path / "run", str(saved), scheme=scheme)
    assert_loaded(result)
    if scheme == "full":
        kept = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
        assert (kept["temperature"], kept["top_p"]) == (0.9, 0.6)


def test_a_config_that_is_no_json_is_refused_with_its_field(saved, tokenizer, tmp_path):
    model = load_model(saved)
    model.config.mine = object()
    refused(
        model, tmp_path / "run", r"LlamaConfig.mine is <object .*>, which is no JSON: remove or replace it", tokenizer=tokenizer
    )
    del model.config.mine
    assert_loaded(fine_tune(tmp_path / "run", model, tokenizer=tokenizer))


def test_weights_that_the_config_does_not_describe_are_refused(saved, tokenizer, tmp_path):
    model: Any = load_model(saved)
    model.model.layers = model.model.layers[:1]
    refused(model, tmp_path / "run", "its config needs 'model.layers.1", tokenizer=tokenizer)
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    assert_loaded(fine_tune(tmp_path / "run", model, tokenizer=tokenizer))
    wider: Any = load_model(saved)
    wider.lm_head = nn.Linear(wider.config.hidden_size, len(tokenizer) + 5, bias=False)
    refused(wider, tmp_path / "second", "'lm_head.weight' has shape", tokenizer=tokenizer)


def tie_by_hand(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def untie_by_hand(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)


def share_layers(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def fuse(model: Any) -> None:
    keys, values = model.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.v_proj.weight
    fused = torch.cat([keys.data, values.data])
    keys.data, values.data = fused[: len(keys)], fused[len(keys) :]


def freeze_transposed(model: Any) -> None:
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    frozen.data = frozen.data.t().contiguous().t()


@pytest.mark.parametrize("change", [tie_by_hand, untie_by_hand, share_layers, fuse, freeze_transposed])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_that_share_memory_or_are_not_contiguous_are_all_saved(change, tied, tokenizer, tmp_path):
    model = tiny_random("llama", vocab_size=len(tokenizer), initializer_range=0.3, tie_word_embeddings=tied)
    change(model)
    assert_loaded(fine_tune(tmp_path / "run", model, tokenizer=tokenizer))


def test_a_test_row_that_cannot_be_encoded_is_found_before_the_first_step(tmp_path, monkeypatch):
    from l2l.train.inputs import load_run_inputs

    def with_a_bad_test_row(*given: Any) -> Any:
        inputs = load_run_inputs(*given)
        inputs.splits.test[-1] = {**inputs.splits.test[-1], "text": 7}
        inputs.splits.test[-1].pop(next(iter(inputs.splits.test[-1])))
        return inputs

    monkeypatch.setattr("l2l.train.trainer.load_run_inputs", with_a_bad_test_row)
    refused("l2l/tiny", tmp_path / "run", "row 3")


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    refused("l2l/tiny", tmp_path / "run", r"the run takes up to [\d,]+ bytes, and 10,000 are free there: choose another --out")
    with pytest.raises(ValueError) as caught:
        fine_tune(tmp_path / "run")
    free = int(caught.value.args[0].partition("up to ")[2].partition(" bytes")[0].replace(",", "")) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    fine_tune(tmp_path / "log", save="log")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    fine_tune(tmp_path / "run")


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def read_only(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", read_only)
        refused("l2l/tiny", tmp_path / "run", r"run cannot be written to \(.*Permission denied\): choose another --out")


@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_a_model_that_cannot_be_saved_in_the_end_leaves_its_weights_and_the_run_goes_on(scheme, tmp_path, monkeypatch, capsys):
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    small = [f"--{name}={str(value).lower()}" for name, value in SMALL.items()]
    command = ["fine-tune", *small, "--scheme", scheme, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("l2l.models.saving.save_model", full_disk)
        assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    kept = tmp_path / "run" / "weights.safetensors"
    assert f"the model could not be saved ([Errno 28] No space left on device); its trained weights are kept in {kept}" in said
    weights = load_file(kept)
    assert read_tensors(tmp_path / "run" / "checkpoint.safetensors")["progress"]["step"] == 2
    assert main(command) == 0
    assert not kept.exists()
    again = dict(load_model(tmp_path / "run" / "model").named_parameters())
    assert weights
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_single_trained_tokens_and_biases_beside_an_adapter_are_saved_too(tokenizer, saved, tmp_path):
    for number, extra in enumerate(({"trainable_token_indices": [5, 9]}, {"bias": "all"})):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **extra)
        model: Any = peft.get_peft_model(load_model(saved), config, adapter_name="mine")
        assert_loaded(fine_tune(tmp_path / f"run{number}", model.eval(), tokenizer=tokenizer))
