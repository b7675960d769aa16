"""Options that share their prompt's row: the same numbers and gradients as rows of their own, or no sharing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from daily import daily_slice
from torch import nn

from l2l.models import batching as sharing
from l2l.models.batching import Grouping, longest_tree
from l2l.models.heads import token_logprobs
from l2l.models.shapes import tiny_random
from l2l.tasks import get_task
from l2l.tasks.base import Example, GeneratedData, Task
from l2l.tasks.encode import Batch, Encoded, EncodedOption, collate
from l2l.tasks.evaluate import evaluate
from l2l.tasks.losses import batch_loss, option_scores

torch.set_num_threads(1)
FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "opt", "gemma", "gpt_neox", "mixtral", "phi", "cohere", "gptj", "falcon"]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {}),
    ("mistral", {"sliding_window": 16}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("bloom", {}),
    ("mpt", {}),
    ("falcon", {"alibi": True}),
    ("rwkv", {}),
    ("jamba", {}),
    ("bart", {}),
]
"""Windows, ALiBi (refusing and ignoring what it is given), recurrent layers, positions that cannot be told."""


def examples(seed: int = 0) -> list[Encoded]:
    """Options of 1 to 6 tokens on prompts of 2 to 40; some options begin alike, one example is not worth a tree."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 128, (count,), generator=generator).tolist())

    shapes = [(40, (3, 3, 1, 5)), (9, (2, 2)), (2, (6, 6)), (25, (4, 2, 2, 2, 6)), (17, (1, 1)), (30, (3, 3))]
    prompts = [(ids(length), ids(2), lengths) for length, lengths in shapes]
    return [
        Encoded(tuple(EncodedOption(p + (fork + ids(k))[-k:], k) for k in lengths), (len(lengths) - 1,))
        for p, fork, lengths in prompts
    ]


def both(grouping: Grouping | None = None) -> tuple[Batch, Batch]:
    """The same examples in rows of their own, and sharing."""
    plain = collate(examples(), "classification", 0)
    shared = collate(examples(), "classification", 0, grouping=grouping or Grouping(tree=200))
    assert plain.attention_mask.ndim == 2 and shared.attention_mask.ndim == 3
    assert shared.input_ids.numel() < 0.6 * plain.input_ids.numel()
    return plain, shared


@pytest.fixture(params=[*[(family, "sdpa") for family in FAMILIES], ("llama", "eager"), ("gpt2", "eager")], ids=str)
def model(request):
    family, attention = request.param
    found = tiny_random(family, initializer_range=0.3)
    found.set_attn_implementation(attention)
    return found


@torch.no_grad()
def test_the_scores_and_the_loss_are_those_of_rows_of_their_own(model):
    assert longest_tree(model) > 256  # longer than the model has positions
    plain, shared = both()
    torch.testing.assert_close(token_logprobs(model, shared), token_logprobs(model, plain), atol=2e-5, rtol=0)
    losses = batch_loss(model, shared, "classification"), batch_loss(model, plain, "classification")
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


def test_the_gradients_are_those_of_rows_of_their_own(model):
    parameters = list(model.parameters())
    plain, shared = (torch.autograd.grad(batch_loss(model, batch, "classification"), parameters) for batch in both())
    for left, right in zip(shared, plain, strict=True):
        torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("groups", [2, 4])
def test_trees_split_by_length_give_the_same_numbers(groups):
    model, grouping = tiny_random("llama", initializer_range=0.3), Grouping(groups, tree=200)
    plain, shared = both(grouping)
    parts = grouping.split(shared)
    assert 2 <= len(parts) <= groups
    assert sum(part.input_ids.numel() for part in parts) < shared.input_ids.numel()
    for part in parts:
        assert part.attention_mask.shape == (*part.input_ids.shape, part.input_ids.shape[1])
    torch.testing.assert_close(token_logprobs(model, shared, parts), token_logprobs(model, plain), atol=2e-5, rtol=0)
    moved = replace(shared, parts=parts).to("meta")
    values = [value for part in moved.parts for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert {value.device.type for value in values} == {"meta"} and len(values) == 7 * len(parts)


@torch.no_grad()
def test_the_head_still_sees_only_what_is_read_and_a_model_without_one_gives_the_same(monkeypatch):
    model = tiny_random("llama", initializer_range=0.3)
    _, shared = both()
    shapes: list[Any] = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[:2])))
    gathered = token_logprobs(model, shared)
    handle.remove()
    assert shapes == [(1, len(shared.rows))] and len(shared.rows) < len(shared.targets)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(token_logprobs(model, shared), gathered, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_differs_by_its_rounding_only(attention):
    model = tiny_random("llama", initializer_range=0.3)
    model.set_attn_implementation(attention)
    plain, shared = both()
    exact = token_logprobs(model, plain)
    model.bfloat16()
    assert longest_tree(model)
    found, alone = token_logprobs(model, shared), token_logprobs(model, plain)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 2 * (alone - exact).abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_decoder_reads_trees_alike():
    model, graphs = tiny_random("llama", initializer_range=0.3), []
    plain, shared = both()
    expected = token_logprobs(model, plain)

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model.get_decoder().compile(dynamic=True, backend=backend)
    assert longest_tree(model)
    assert not graphs  # the probe is not worth a compilation
    for parts in ((), Grouping(2).split(shared), Grouping(4).split(shared)):
        torch.testing.assert_close(token_logprobs(model, shared, parts), expected, atol=2e-5, rtol=0)
    assert len(graphs) <= 2  # rows of any number and length; a single row is a graph of its own


@pytest.mark.parametrize(("family", "options"), REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_would_give_other_numbers_are_given_no_trees(family, options, dtype):
    model = tiny_random(family, **options).to(dtype)
    assert longest_tree(model) == 0
    assert Grouping.of(model).tree == 0
    with pytest.raises(ValueError, match=f"share_prompts=True, but {type(model).__name__} does not read a row that"):
        Grouping.of(model, share_prompts=True)


@pytest.mark.parametrize("window", [8, 24, 100, 240])
def test_a_window_that_the_config_hides_shows_in_the_numbers(monkeypatch, window):
    monkeypatch.setattr(sharing, "_PARTIAL", ("none of the names",))
    assert longest_tree(tiny_random("mistral", sliding_window=window)) == 0
    assert longest_tree(tiny_random("mistral", sliding_window=None)) == 248 + 64


def test_a_model_without_stated_positions_or_weights_is_not_asked():
    model = tiny_random("llama")
    assert longest_tree(nn.Linear(2, 2)) == 0
    model.config = SimpleNamespace(vocab_size=128)
    assert longest_tree(model) == 0
    assert longest_tree(tiny_random("llama").to("meta")) == 0


class Refuses(nn.Module):
    """A model that does not know ``position_ids``."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_forward_that_refuses_positions_turns_sharing_off_and_bad_numbers_are_no_agreement():
    model = tiny_random("llama")
    assert longest_tree(model)
    assert longest_tree(Refuses(model)) == 0
    model.lm_head.weight.data.fill_(torch.nan)
    assert longest_tree(model) == 0


def test_asking_leaves_a_model_and_the_global_generator_as_they_were():
    model = tiny_random("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    model.train()
    model.get_submodule("transformer.h.0").eval()
    modes = [module.training for module in model.modules()]
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert longest_tree(model) == longest_tree(model) > 0
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_sharing_is_on_where_it_is_exact_unless_it_is_turned_off():
    model = tiny_random("llama")
    assert Grouping.of(model, 3).tree == Grouping.of(model, 3, share_prompts=True).tree == 312
    assert Grouping.of(model, 3, share_prompts=False).tree == 0


def test_an_evaluation_asks_only_where_options_have_prompts_to_share(build_tokenizer, monkeypatch):
    tokenizer = build_tokenizer()
    model = tiny_random("llama", vocab_size=len(tokenizer), initializer_range=0.3)
    asked: list[nn.Module] = []
    monkeypatch.setattr(sharing, "longest_tree", lambda model: asked.append(model) or longest_tree(model))
    rows = [{"sentence": "the film was good . " * (1 + number % 5), "label": number % 2} for number in range(11)]
    evaluate(model, tokenizer, get_task("sst2"), rows)
    assert not asked
    task = Task(
        "mine",
        GeneratedData(lambda *_: []),
        (),
        lambda row: Example(row["sentence"], (" terrible film", " dull story"), (0,)),
    )
    own, shared = (evaluate(model, tokenizer, task, rows, 4, grouping=grouping) for grouping in (Grouping(), None))
    assert len(asked) == 1
    assert own.loss == pytest.approx(shared.loss, abs=1e-5)
    assert own.value == shared.value


@torch.no_grad()
@pytest.mark.parametrize("name", daily_slice(["trec", "sst5", "ag_news", "rte", "cb"], 2))
def test_real_tasks_of_a_small_vocabulary_feed_half_or_less_and_score_the_same(shared, stories, name):
    from l2l.tasks.encode import encode, padding_id
    from l2l.tasks.rows import load_rows

    model, tokenizer = stories
    task = get_task(name)
    rows = load_rows(task, "validation", str(shared / "data"))[:6]
    encoded = encode(task, rows, tokenizer, 512)
    grouping = Grouping.of(model)
    plain, tree = (collate(encoded, task.form, padding_id(tokenizer), grouping=one) for one in (None, grouping))
    fed = [sum(part.input_ids.numel() for part in grouping.split(one)) or one.input_ids.numel() for one in (plain, tree)]
    assert fed[1] < 0.6 * fed[0]
    scores = [option_scores(token_logprobs(model, one, grouping.split(one)), one) for one in (plain, tree)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=0)
