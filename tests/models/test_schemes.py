"""Tuning schemes: what is trained, where it begins, and that nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import same_bits, weights
from torch import Tensor, nn

from l2l.models.load import context_length, load_model
from l2l.models.schemes import ADAPTERS, AdapterBase, apply_scheme, quiet, save_adapter
from l2l.models.shapes import tiny_random
from l2l.params import Blocks

torch.set_num_threads(1)
FAMILIES = ["opt", "llama", "gpt2"]
MORE = [
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "cohere",
    "bloom",
]
IDS = torch.tensor([[5, 9, 3, 7, 1, 2]])


def base(family: str = "llama", **options: Any) -> Any:
    return tiny_random(family, **{"initializer_range": 0.3, **options})


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {block.name: block.tensor.detach().clone() for block in Blocks.of(model)}


def frozen(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("scheme", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES + MORE)
def test_only_adapters_are_blocks_and_the_base_keeps_its_bits(family, scheme):
    model = base(family)
    before = weights(model)
    adapted = apply_scheme(model, scheme)
    blocks = Blocks.of(adapted)
    assert all("lora_" in name or "ia3_" in name or "prompt_encoder" in name for name in blocks.names)
    assert all(block.tensor.dtype == torch.float32 and block.tensor.isfinite().all() for block in blocks)
    kept = frozen(adapted)
    assert len(kept) == len(before)
    assert all(torch.equal(left, right) for left, right in zip(kept, before.values(), strict=True))
    assert logits(adapted).isfinite().all()


@pytest.mark.parametrize("scheme", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_fixes_the_adapter_and_the_global_generator_stays(family, scheme):
    state = torch.random.get_rng_state()
    first, same, other = (trained(apply_scheme(base(family), scheme, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_bits(first, same)
    assert scheme == "ia3" or not same_bits(first, other)  # ia3 begins at one everywhere


@pytest.mark.parametrize("scheme", ["lora", "ia3"])
@pytest.mark.parametrize("family", FAMILIES + MORE)
def test_lora_and_ia3_begin_at_the_base(family, scheme):
    model = base(family)
    expected = logits(model)
    assert torch.equal(logits(apply_scheme(model, scheme)), expected)


@pytest.mark.parametrize("scheme", ADAPTERS)
def test_adapters_of_a_half_precision_base_are_float32(scheme):
    adapted = apply_scheme(base().bfloat16(), scheme)
    assert {block.tensor.dtype for block in Blocks.of(adapted)} == {torch.float32}
    assert {weight.dtype for weight in frozen(adapted)} == {torch.bfloat16}
    assert logits(adapted).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_trained_alone_as_a_copy_where_it_is_tied(family, tied):
    model = base(family, tie_word_embeddings=tied)
    expected, embedding = logits(model), model.get_input_embeddings().weight
    before = embedding.detach().clone()
    found = apply_scheme(model, "head")
    assert Blocks.of(found).names == ("lm_head.weight",)
    assert torch.equal(logits(found), expected)
    with torch.no_grad():
        found.get_output_embeddings().weight.add_(1.0)
    assert torch.equal(embedding, before)
    assert not torch.equal(logits(found), expected)


def test_a_head_untied_from_its_embedding_is_saved_as_a_weight_of_its_own(tmp_path):
    found = apply_scheme(base("gpt2", tie_word_embeddings=True), "head")
    with torch.no_grad():
        found.get_output_embeddings().weight.mul_(2.0)
    found.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(found))


@pytest.mark.parametrize("scheme", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_saved_beside_its_base_and_loads_with_the_same_bits(family, scheme, tmp_path):
    from peft import PeftModel

    base(family).save_pretrained(tmp_path / "base")
    adapted = apply_scheme(load_model(tmp_path / "base"), scheme, seed=3)
    with torch.no_grad():
        for block in Blocks.of(adapted):
            block.tensor.add_(torch.randn(block.tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    expected = logits(adapted)
    save_adapter(adapted, tmp_path / "adapter", AdapterBase(str(tmp_path / "base"), None))
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert torch.equal(logits(load_model(tmp_path / "adapter")), expected)
    plain: Any = load_model(tmp_path / "base")
    with quiet():
        again: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert torch.equal(logits(again), expected)


def test_a_base_that_the_adapter_was_not_made_for_is_refused(tmp_path):
    adapted = apply_scheme(base("gpt2"), "lora")
    base("llama").save_pretrained(tmp_path / "base")
    save_adapter(adapted, tmp_path / "adapter", AdapterBase(str(tmp_path / "base"), None))
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "is not the configuration"), ("[", "is not the"), ('{"base_model_name_or_path": null}', "names no base")],
)
def test_a_broken_adapter_configuration_is_named(content, message, tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_an_adapter_without_safetensors_is_not_looked_for_elsewhere(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_model(tmp_path)


def test_expert_tensors_of_three_dimensions_get_lora_where_they_are_named():
    model = base("mixtral")
    expected = logits(model)
    adapted = apply_scheme(model, "lora", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]})
    assert torch.equal(logits(adapted), expected)
    assert len(Blocks.of(adapted)) == 4  # A and B in two layers
    with torch.no_grad():
        for block in Blocks.of(adapted):
            block.tensor.add_(0.1)
    assert not torch.equal(logits(adapted), expected)


def test_arguments_reach_peft_and_are_checked_first():
    adapted = apply_scheme(base(), "lora", {"r": 2, "target_modules": ["o_proj"]})
    assert {tuple(block.tensor.shape) for block in Blocks.of(adapted)} == {(2, 32), (32, 2)}
    assert all("o_proj" in name for name in Blocks.of(adapted).names)
    with pytest.raises(ValueError, match=r"scheme 'lora' has no argument 'rank'; it has .*\br\b"):
        apply_scheme(base(), "lora", {"rank": 2})
    with pytest.raises(ValueError, match="scheme 'full' takes no scheme_args, but 'r' is given"):
        apply_scheme(base(), "full", {"r": 2})
    with pytest.raises(ValueError, match="scheme is 'adapter'; use one of full, lora"):
        apply_scheme(base(), "adapter")
    with pytest.raises(ValueError, match="num_virtual_tokens=0 must be"):
        apply_scheme(base(), "prefix", {"num_virtual_tokens": 0})


@pytest.mark.parametrize(("family", "head"), [("roberta", "classifier"), ("llama", "score")])
def test_the_head_of_a_classifier_is_trained_and_saved_with_the_adapter(family, head, tmp_path):
    base(family).save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"head": "classifier", "num_labels": 3}
    adapted = apply_scheme(load_model(tmp_path / "base", **options), "lora")
    assert {name.split(".")[2] for name in Blocks.of(adapted).names if "lora_" not in name} == {head}
    with torch.no_grad():
        for block in Blocks.of(adapted):
            block.tensor.add_(0.1)
    expected = logits(adapted)
    save_adapter(adapted, tmp_path / "adapter", AdapterBase(str(tmp_path / "base"), None))
    assert torch.equal(logits(load_model(tmp_path / "adapter", **options)), expected)


def test_what_peft_cannot_do_is_one_clear_error():
    with pytest.raises(ValueError, match=r"peft cannot apply scheme 'lora' to LlamaForCausalLM: .*choose layers by"):
        apply_scheme(base(), "lora", {"target_modules": ["c_attn"]})
    with pytest.raises(ValueError, match="finds no attention projections in MambaForCausalLM"):
        apply_scheme(tiny_random("mamba"), "ia3")
    with pytest.raises(ValueError, match="needs keys and values of one shape in every layer"):
        apply_scheme(tiny_random("mamba"), "prefix")
    with pytest.raises(ValueError, match="has an adapter already"):
        apply_scheme(apply_scheme(base(), "lora"), "ia3")


def test_full_leaves_the_model_as_it_is():
    model = base()
    model.lm_head.requires_grad_(False)
    assert apply_scheme(model, "full") is model
    assert "lm_head.weight" not in Blocks.of(model).names


def test_virtual_tokens_take_up_positions_of_the_context():
    plain, prefixed, prompted = base(), apply_scheme(base(), "prefix"), apply_scheme(base(), "prompt")
    assert [context_length(model) for model in (plain, prefixed, prompted)] == [256, 251, 246]
    with pytest.raises(ValueError, match=r"max_length 256 must lie in 2\.\.251"):
        context_length(prefixed, 256)
