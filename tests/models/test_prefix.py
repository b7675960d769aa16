"""Which layers are trained, and hidden states kept below them: the same losses as whole passes, to the last bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import same_bits
from torch import nn

import l2l
from l2l.models.heads import token_logprobs
from l2l.models.load import load_model, load_tokenizer
from l2l.models.prefix import (
    NoPrefixError,
    PrefixCache,
    check_train_layers,
    chosen_layers,
    layer_list,
    plan_fills,
    prefix_identity,
    row_keys,
    trace_layers,
    train_only,
)
from l2l.models.schemes import apply_scheme
from l2l.models.shapes import tiny_random
from l2l.tasks import get_task
from l2l.tasks.encode import collate, encode
from l2l.tasks.evaluate import evaluate, generate
from l2l.train.prefix import read_rows, write_rows

LAYERS = {"llama": "num_hidden_layers", "opt": "num_hidden_layers", "gpt2": "n_layer", "gpt_neox": "num_hidden_layers"}
LAYERS |= {"qwen2": "num_hidden_layers", "bitnet": "num_hidden_layers", "falcon": "num_hidden_layers", "bloom": "n_layer"}
"""Model type -> the field that says how many layers it has. Those of Falcon and BLOOM return tuples."""
FAMILIES = [*LAYERS, "l2l/tiny"]


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of four layers."""
    fields: dict[str, Any] = {"initializer_range": 0.3, LAYERS.get(family, ""): 4}
    found: Any = load_model(family) if "/" in family else tiny_random(family, **fields)
    return found.to(dtype).eval()


def cache_of(model: Any, spec: str = "top:2") -> PrefixCache:
    train_only(model, spec)
    trace = trace_layers(model)
    return PrefixCache(model, trace, trace.lowest_trained(model))


def filled(cache: PrefixCache, *batches: Any) -> PrefixCache:
    with cache.attached():
        for fill in plan_fills(cache.model, batches):
            cache.keep(fill, cache.compute(fill))
    return cache


def batch_of(rows: torch.Tensor, mask: torch.Tensor) -> Any:
    """Rows of which the last token of each is read."""
    last = mask.sum(1) - 1 if mask.ndim == 2 else mask.diagonal(dim1=1, dim2=2).sum(1) - 1
    indices = torch.arange(len(rows))
    read = {"rows": indices, "positions": last, "places": indices, "targets": rows[:, 0]}
    return SimpleNamespace(input_ids=rows, attention_mask=mask, **read, decoder_ids=None, pooled=False, at_places=())


def padded_batch() -> Any:
    """[5, 11] rows of unlike lengths."""
    lengths = torch.tensor([[3], [11], [7], [1], [9]])
    mask = (torch.arange(11) < lengths).long()
    return batch_of(torch.randint(1, 100, (5, 11), generator=torch.Generator().manual_seed(0)) * mask, mask)


@pytest.mark.parametrize(
    ("spec", "count", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("top:1", 4, [3]),
        ("top:5", 30, [25, 26, 27, 28, 29]),
        ("top:1/3", 4, [2, 3]),  # rounded up
        ("top:1/3", 30, list(range(20, 30))),
        ("top:1/1", 2, [0, 1]),
        ("25, 26,29", 30, [25, 26, 29]),
        ("[1,0]", 2, [0, 1]),
        ([3, 1, 3], 4, [1, 3]),
        ("2", 3, [2]),
        (2, 3, [2]),
    ],
)
def test_layers_are_chosen_from_the_top_or_by_number(spec, count, expected):
    assert list(chosen_layers(spec, count)) == expected


@pytest.mark.parametrize("spec", ["", "top", "top:0", "top:3/2", "top:1/0", "low:2", "1,x", "-1", "top:0.5", [], [-1], "1,,2"])
def test_what_names_no_layers_is_refused_before_a_model_is_loaded(spec):
    with pytest.raises(ValueError, match=r"train_layers=.* must be all, top:5, top:1/3, or numbers of layers"):
        check_train_layers(spec)


@pytest.mark.parametrize(("spec", "words"), [("top:5", "asks for 5 layers, but the model has 4"), ("2,4", "names layer 4, ")])
def test_layers_that_a_model_has_not_are_refused(spec, words):
    with pytest.raises(ValueError, match=words):
        chosen_layers(spec, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_top_is_the_last_layers_and_what_follows_them(family):
    model = model_of(family)
    layers = layer_list(model)
    assert layers is not None
    assert len(layers) == 4
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    train_only(model, "top:1")
    assert all(p.requires_grad == (layer is layers[3]) for layer in layers for p in layer.parameters())
    assert not embedding.weight.requires_grad
    assert head.weight.requires_grad == (head.weight is not embedding.weight)
    names = {name for name, p in model.named_parameters() if p.requires_grad and "layers." not in name and ".h." not in name}
    norms = {name for name in names if "norm" in name or "ln_f" in name}
    assert norms
    assert len(names - norms) == (head.weight is not embedding.weight)
    assert trace_layers(model).lowest_trained(model) == 3


def test_listed_layers_may_leave_some_out_and_what_is_frozen_stays_frozen():
    model = model_of("llama")
    model.model.layers[1].mlp.requires_grad_(False)
    train_only(model, [1, 3])
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "layers." in name}
    assert trained == {"1", "3"}
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert trace_layers(model).lowest_trained(model) == 1


@pytest.mark.parametrize("scheme", ["lora", "ia3", "head"])
def test_under_a_scheme_what_it_trains_is_restricted(scheme):
    model = apply_scheme(model_of("llama"), scheme)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    train_only(model, "top:1")
    kept = {name for name, p in model.named_parameters() if p.requires_grad}
    assert kept == {name for name in before if ".layers.3." in name or scheme == "head"}
    assert trace_layers(model).lowest_trained(model) == (4 if scheme == "head" else 3)


def test_nothing_left_to_train_is_refused():
    model = model_of("llama")
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        train_only(model, "top:1")


def test_structure_is_found_without_weights():
    with torch.device("meta"):
        model = model_of("llama")
    train_only(model, "top:1")
    assert trace_layers(model).lowest_trained(model) == 3


class NoList(nn.Module):
    """A language model without a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 8), nn.Linear(8, 128)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (NoList, "NoList has no list of layers"),
        (lambda: tiny_random("t5"), "two stacks of layers"),
        (lambda: apply_scheme(tiny_random("llama"), "prompt"), "virtual tokens of Peft"),
        (lambda: tiny_random("albert"), "does not call its layers once each"),
    ],
)
def test_a_model_whose_layers_cannot_be_told_apart_is_refused_with_the_way_out(make, words):
    with pytest.raises(NoPrefixError, match=words):
        trace_layers(make())
    model = make()
    with pytest.raises(NoPrefixError, match="use all, and freeze parameters by their names"):
        train_only(model, "top:1")
    train_only(model, "all")


# The cache.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_losses_are_those_of_whole_passes_to_the_last_bit(family, dtype):
    model = model_of(family, dtype)
    batch = padded_batch()
    with torch.no_grad():
        whole = token_logprobs(model, batch)
        cache = filled(cache_of(model), batch)
        with cache.attached():
            assert torch.equal(token_logprobs(model, batch), whole)
            parameter = next(p for p in trace_layers(model).layers[3].parameters() if p.ndim == 2)
            parameter.mul_(1.5)  # what is trained still takes part
            moved = token_logprobs(model, batch)
        assert torch.equal(token_logprobs(model, batch), moved)
    assert not torch.equal(moved, whole)


@pytest.mark.parametrize("family", ["l2l/tiny", "opt", "gpt2"])
def test_rows_that_branch_are_kept_by_their_mask(family):
    model = model_of(family)
    visible = torch.ones(2, 6, 6, dtype=torch.bool).tril()
    visible[0, 4:, 2:4] = False  # two branches behind a prompt of two tokens
    visible[1, 5] = False  # padding
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]]).repeat(2, 1)
    batch = batch_of(ids, visible)
    with torch.no_grad():
        whole = token_logprobs(model, batch)
        cache = filled(cache_of(model), batch)
        assert sorted(len(states) for states in cache.rows.values()) == [5, 6]
        with cache.attached():
            assert torch.equal(token_logprobs(model, batch), whole)


def counted(module: nn.Module) -> list[int]:
    """Grows with each call of the module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_only_the_trained_layers_run():
    model = model_of("llama")
    calls = [counted(layer.mlp) for layer in model.model.layers]
    batch = padded_batch()
    cache = cache_of(model)
    for count in calls:
        count.clear()
    filled(cache, batch)
    assert [len(count) for count in calls] == [1, 1, 0, 0]
    with cache.attached():
        for _ in range(2):
            token_logprobs(model, batch)
    assert [len(count) for count in calls] == [1, 1, 2, 2]


def test_unknown_rows_and_other_calls_run_whole_and_detached_models_are_as_before():
    model = model_of("llama")
    batch, cache = padded_batch(), cache_of(model)
    calls = counted(model.model.layers[0].mlp)
    filled(cache, batch)
    calls.clear()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with cache.attached(), torch.no_grad():
        model(**inputs, use_cache=False)
        assert not calls
        for more in ({"use_cache": True}, {"use_cache": False, "output_hidden_states": True}):
            found = model(**inputs, **more)
            assert calls.pop()
        assert len(found.hidden_states) == 5
        other = batch.input_ids.clone()
        other[0, 0] += 1
        model(input_ids=other, attention_mask=batch.attention_mask, use_cache=False)
        assert calls.pop()
    model(**inputs, use_cache=False)
    assert calls.pop()
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_an_error_inside_a_pass_leaves_nothing_behind():
    model, batch = model_of("llama"), padded_batch()
    cache = filled(cache_of(model), batch)
    handle = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with cache.attached():
        with pytest.raises(ZeroDivisionError):
            token_logprobs(model, batch)
        handle.remove()
        calls = counted(model.model.layers[0].mlp)
        model(input_ids=batch.input_ids + 1, attention_mask=batch.attention_mask, use_cache=False)
        assert calls


def test_evaluation_uses_it_and_generation_is_as_without():
    model, tokenizer = load_model("l2l/tiny"), load_tokenizer("l2l/tiny")
    task = get_task("world_topic")
    rows = l2l.tasks.load_splits(task, None, 8, 8, 8).test
    expected = evaluate(model, tokenizer, task, rows)
    written = generate(model, tokenizer, ["The weather is", "A man"], 64, max_new_tokens=5)
    cache = cache_of(model, "top:1")
    encoded = encode(task, rows, tokenizer, 128)
    longest_first = sorted(encoded, key=lambda one: -max(len(option.ids) for option in one.options))
    filled(cache, collate(longest_first, "classification", 0))
    calls = counted(model.model.layers[0].mlp)
    with cache.attached():
        assert evaluate(model, tokenizer, task, rows) == expected
        assert len(calls) <= 4  # the probes of the model for rows that branch
        assert generate(model, tokenizer, ["The weather is", "A man"], 64, max_new_tokens=5) == written


def test_gradients_flow_through_what_is_trained():
    model, batch = model_of("llama"), padded_batch()
    cache = cache_of(model)
    token_logprobs(model, batch).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.inference_mode():  # as evaluations fill
        filled(cache, batch)
    with cache.attached():
        token_logprobs(model, batch).sum().backward()
    assert same_bits({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


def test_rows_are_told_apart_by_tokens_mask_and_positions_but_not_by_padding():
    ids, mask = torch.tensor([[4, 5, 0], [0, 4, 5]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    keys, lengths = row_keys({"input_ids": ids, "attention_mask": mask})
    assert lengths == (2, 3)  # padding on the left is part of a row
    assert keys[0] != keys[1]
    wider = {"input_ids": torch.tensor([[4, 5, 9, 9]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    assert row_keys(wider)[0] == keys[:1]
    assert row_keys(wider | {"position_ids": torch.arange(4)[None]})[0] != keys[:1]
    causal = torch.full((1, 1, 4, 4), -1e9).triu(1)
    apart = causal.clone()
    apart[0, 0, 3, 1] = -1e9
    (first,), (second,) = (row_keys({"input_ids": torch.arange(4)[None], "attention_mask": m})[0] for m in (causal, apart))
    assert first != second


def test_a_row_is_computed_once_with_those_of_its_first_batch():
    model, batch = model_of("llama"), padded_batch()
    both = batch_of(batch.input_ids[[1, 1, 2]], batch.attention_mask[[1, 1, 2]])
    fills = plan_fills(model, [both, batch])
    assert [len(fill.keys) for fill in fills] == [2, 3]
    assert [fill.lengths for fill in fills] == [(11, 7), (3, 1, 9)]


# On disk.


def saved(path: Path, model: Any, cache: PrefixCache, batch: Any, context: int = 64) -> tuple[Path, dict[str, str]]:
    fills = plan_fills(model, [batch])
    identity = prefix_identity(model, trace_layers(model), cache.lowest, fills, context)
    with cache.attached():
        states = [cache.compute(fill) for fill in fills]
    write_rows(path, fills, states, trace_layers(model), identity)
    return path, identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_file_gives_back_the_same_bits(dtype, tmp_path):
    model, batch = model_of("llama", dtype), padded_batch()
    cache = filled(cache_of(model), batch)
    path, identity = saved(tmp_path / "cache", model, cache, batch)
    found = read_rows(path, identity)
    assert found.keys() == cache.rows.keys()
    assert all(torch.equal(found[key], states) for key, states in cache.rows.items())


def weights_changed(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (weights_changed, "weights below"),
        (lambda model: model.bfloat16(), "dtype .float32 there, bfloat16 now."),
        (lambda model: setattr(model.config, "rms_norm_eps", 0.5), "model config"),
        (lambda model: model.set_attn_implementation("eager"), "attention .sdpa there, eager now."),
        (lambda model: None, "context length .64 there, 32 now."),
        (lambda model: None, "rows"),
    ],
)
def test_a_stale_file_is_refused_with_what_has_changed(change, words, tmp_path):
    model, batch = model_of("llama"), padded_batch()
    cache = cache_of(model)
    path, _ = saved(tmp_path / "cache", model, cache, batch)
    change(model)
    if words == "rows":
        batch.input_ids[0, 0] += 1
    context = 32 if "context" in words else 64
    now = prefix_identity(model, trace_layers(model), cache.lowest, plan_fills(model, [batch]), context)
    with pytest.raises(ValueError, match=f"was made from something else: .*{words}"):
        read_rows(path, now)


def test_weights_above_may_change_and_a_file_of_another_kind_is_refused(tmp_path):
    model, batch = model_of("llama"), padded_batch()
    cache = cache_of(model)
    path, identity = saved(tmp_path / "cache", model, cache, batch)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.zero_()
        model.lm_head.weight.zero_()
    assert prefix_identity(model, trace_layers(model), 2, plan_fills(model, [batch]), 64) == identity
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(ValueError, match="is not readable: its checksum is another one"):
        read_rows(path, identity)
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="is not readable: it has "):
        read_rows(path, identity)
