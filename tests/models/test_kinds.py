"""What kind a model is, and loading each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from l2l.models.batching import Grouping
from l2l.models.kinds import kind_of, kind_of_config
from l2l.models.load import context_length, load_model, load_tokenizer
from l2l.models.schemes import AdapterBase, apply_scheme, save_adapter
from l2l.models.shapes import tiny_random

KINDS = [
    ("llama", "auto", "causal"),
    ("mixtral", "auto", "causal"),
    ("bert", "auto", "masked"),
    ("roberta", "auto", "masked"),
    ("roberta", "classifier", "classifier"),
    ("gpt2", "classifier", "classifier"),
    ("t5", "auto", "seq2seq"),
    ("bart", "auto", "seq2seq"),
    ("bart", "classifier", "classifier"),
]


@pytest.mark.parametrize(("family", "head", "kind"), KINDS)
def test_a_model_is_known_by_its_class_and_a_checkpoint_by_what_it_was_saved_from(family, head, kind, tmp_path):
    model = tiny_random(family, head=head)
    assert kind_of(model) == kind
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.float32
    same = zip(model.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in same)


def test_a_class_derived_from_one_that_is_known_and_a_wrapped_model_are_of_its_kind():
    model = tiny_random("roberta")
    mine = type("Mine", (type(model),), {})(model.config)

    class Wrapper(nn.Module):
        def get_base_model(self) -> nn.Module:
            return mine

    assert kind_of(mine) == kind_of(Wrapper()) == "masked"


def test_a_module_that_is_no_model_of_transformers_counts_as_causal():
    assert kind_of(nn.Linear(2, 2)) == "causal"


def test_a_config_that_names_no_class_goes_by_what_the_type_is_made_for():
    found = {name: kind_of_config(AutoConfig.for_model(name)) for name in ("opt", "bert", "t5")}
    assert found == {"opt": "causal", "bert": "masked", "t5": "seq2seq"}
    assert kind_of_config(AutoConfig.for_model("bert", is_decoder=True)) == "causal"
    foreign = AutoConfig.for_model("llama", architectures=["Alien"], auto_map={"AutoModelForMaskedLM": "alien.Model"})
    assert kind_of_config(foreign) == "masked"


def test_the_head_asked_for_wins_and_an_unknown_one_is_named(tmp_path):
    tiny_random("bert").save_pretrained(tmp_path)
    assert kind_of(load_model(tmp_path, head="causal")) == "causal"
    with pytest.raises(ValueError, match="head is 'encoder'; use one of auto, causal, masked, seq2seq, classifier"):
        load_model(tmp_path, head="encoder")


@pytest.mark.parametrize("family", ["roberta", "bert", "gpt2", "t5"])
def test_a_fresh_classification_head_is_seeded_and_has_the_labels_asked_for(family, tmp_path):
    model = tiny_random(family)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, second, other = (load_model(tmp_path, head="classifier", num_labels=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert first.config.num_labels == 3
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(one, two) for one, two, _ in pairs)
    assert any(not torch.equal(one, three) for one, _, three in pairs)
    base = dict(model.base_model.named_parameters())
    kept = [name for name, value in first.base_model.named_parameters() if name in base and torch.equal(value, base[name])]
    assert len(kept) >= len(base) - 2  # a pooler, which masked language models do not have


def test_a_classifier_that_was_saved_keeps_its_own_number_of_labels(tmp_path):
    tiny_random("bert", head="classifier", num_labels=4).save_pretrained(tmp_path)
    assert load_model(tmp_path, num_labels=2).config.num_labels == 4


def test_a_fresh_head_excuses_no_other_missing_weight(tmp_path):
    tiny_random("roberta").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "roberta.encoder.layer.1.output.dense.weight"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights of RobertaForSequenceClassification, .*'{name}'"):
        load_model(tmp_path, head="classifier")


def test_another_head_than_the_checkpoint_holds_is_not_filled_with_noise(tmp_path):
    tiny_random("roberta", head="classifier").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was saved from RobertaForSequenceClassification"):
        load_model(tmp_path, head="masked")


def test_device_and_device_map_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto' are both given"):
        load_model(tmp_path, device="cpu", device_map="auto")


def test_a_device_map_is_passed_on(tmp_path: Path):
    tiny_random("opt").save_pretrained(tmp_path)
    assert load_model(tmp_path, device_map="cpu").device.type == "cpu"


def test_a_positional_table_with_a_padding_row_lasts_for_fewer_tokens():
    assert context_length(tiny_random("roberta")) == 256 - 2
    assert context_length(tiny_random("bert")) == 256
    model = tiny_random("roberta")
    assert model(input_ids=torch.full((1, 254), 7)).logits.shape == (1, 254, 128)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 255), 7))


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_rows_are_shared_only_where_a_causal_model_reads_them(family):
    model = tiny_random(family)
    assert Grouping.of(model).tree == 0
    with pytest.raises(ValueError, match=f"share_prompts=True, but {type(model).__name__} does not read"):
        Grouping.of(model, share_prompts=True)


def test_an_adapter_with_a_head_of_its_own_is_loaded_with_it(tmp_path):
    tiny_random("roberta").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", head="classifier", num_labels=3)
    adapted = apply_scheme(model, "lora")
    save_adapter(adapted, tmp_path / "adapter", AdapterBase(str(tmp_path / "base"), None))
    with pytest.raises(ValueError, match="holds a head 'classifier' that RobertaForMaskedLM has not; load it with head="):
        load_model(tmp_path / "adapter", head="masked")
    ids = torch.tensor([[5, 6, 7]])
    for again in (load_model(tmp_path / "adapter"), load_model(tmp_path / "adapter", head="classifier", num_labels=3)):
        torch.testing.assert_close(again(input_ids=ids).logits, adapted(input_ids=ids).logits)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_foreign_code_is_run_only_where_the_caller_says_so(load, tmp_path, monkeypatch):
    tiny_random("opt").save_pretrained(tmp_path)
    told: list[bool] = []

    def refuse(*_: object, trust_remote_code: bool, **__: object) -> None:
        told.append(trust_remote_code)
        raise ValueError("seen enough")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match="seen enough"):
            load(tmp_path, **options)
    assert told == [False, True]
