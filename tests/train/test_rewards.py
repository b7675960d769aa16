"""Rewards of sampled completions as what is maximised: keyed noise, runs, replay, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import l2l
from l2l import cli
from l2l.models.load import load_tokenizer
from l2l.noise import Key, hash_bits, integers
from l2l.report.run_directory import read_metrics
from l2l.tasks.evaluate import generate
from l2l.tools.run_report import ReportConfig, run_report
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import make_closures
from l2l.train.replay import rebuild
from l2l.train.rewards import (
    AFTER,
    BEFORE,
    GivenReward,
    Reward,
    check_columns,
    check_rows,
    find_function,
    prompt_ids,
    read_prompts,
)
from l2l.train.runlog import NAME, read_log
from l2l.train.sampling import TransformersSampler, gumbel_noise
from l2l.train.trainer import prepare_fine_tuning

PLACES = ("kitchen", "garden", "barn", "office", "attic", "cellar", "yard", "library")
ROWS = [{"prompt": f"{name} is in the {place}.", "word": place} for name in ("anna", "the dog") for place in PLACES]
SMALL: dict[str, Any] = {
    "lr": 1e-3,
    "epsilon": 1e-2,
    "steps": 3,
    "batch_size": 4,
    "max_new_tokens": 3,
    "dev_size": 4,
    "test_size": 3,
    "eval_samples": 2,
    "log_every": 1,
    "progress": False,
    "save": "log",
}


def lengths(prompts: list[str], completions: list[str], word: list[str], **columns: Any) -> list[float]:
    """A reward that this test names by its path: letters of a completion, which tell weights apart."""
    assert len(prompts) == len(completions) == len(word) and not columns
    assert all(one in prompt for one, prompt in zip(word, prompts, strict=True))
    return [len(text) / 10 for text in completions]


def train(out: Path, **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune("l2l/tiny", out=str(out), **{"reward": lengths, "prompts": ROWS, **SMALL, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> l2l.FineTuneResult:
    return train(tmp_path_factory.mktemp("reward") / "run")


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def written(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# The noise.


def test_bits_are_those_that_signs_are_made_of_for_every_block_and_offset():
    key = Key(3, 5, 1)
    bits = hash_bits(["a", "b"], key, 40, offset=2**32 - 20)
    for row, name in zip(bits, ("a", "b"), strict=True):
        assert torch.equal(torch.where(row < 0, -1, 1), integers(name, key, 40, "rademacher", 2**32 - 20))


def test_noise_is_gumbel_and_its_largest_sum_is_drawn_with_the_probability_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    noise = gumbel_noise(Key(0, 0), range(20_000), 0, 4)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)
    shares = torch.bincount((noise + logits).argmax(1), minlength=4) / 20_000
    assert torch.allclose(shares.double(), logits.softmax(0), atol=0.015)


def test_noise_is_unlike_between_steps_places_and_positions_and_the_same_otherwise():
    base = gumbel_noise(Key(0, 1), [0, 1], 2, 50)
    assert torch.equal(base, gumbel_noise(Key(0, 1), [0, 1], 2, 50))
    assert torch.equal(base[1:], gumbel_noise(Key(0, 1), [1], 2, 50))
    others = [base[1], *(gumbel_noise(key, [0], at, 50)[0] for key, at in ((Key(0, 2), 2), (Key(1, 1), 2), (Key(0, 1), 3)))]
    assert not any(torch.equal(base[0], other) for other in others)


# The sampler.


def sampler(**options: Any) -> TransformersSampler:
    return TransformersSampler(l2l.load_model("l2l/tiny").eval(), load_tokenizer("l2l/tiny"), 5, **options)


def test_a_completion_does_not_depend_on_its_neighbours_padding_or_the_size_of_passes():
    one = sampler()
    texts = ["anna is in the", "where is the dog? the dog is in the", "karl", "the cat is in the barn. so"]
    prompts = [prompt_ids(one.tokenizer, text, "") for text in texts]
    together, key = one.sample(prompts, Key(0, 0), range(4)), Key(0, 0)
    assert together == sampler(rows=2).sample(prompts, key, range(4))
    assert together == [one.sample([prompt], key, [place])[0] for place, prompt in enumerate(prompts)]
    assert together != one.sample(prompts, Key(0, 1), range(4))
    assert len(set(one.sample([prompts[0]] * 5, key, range(5)))) > 1  # repeated rows of a batch are independent draws


def test_temperature_0_is_greedy_decoding_and_a_low_one_is_near_it():
    one = sampler(temperature=0.0)
    texts = ["anna is in the", "where is the dog?"]
    prompts = [prompt_ids(one.tokenizer, text, "") for text in texts]
    greedy = generate(one.model, one.tokenizer, texts, 64, 5)
    assert [one.tokenizer.decode(ids) for ids in one.sample(prompts, Key(0, 0), range(2))] == greedy
    assert sampler(temperature=1e-6).sample(prompts, Key(0, 0), range(2)) == one.sample(prompts, Key(0, 0), range(2))


def test_a_chat_is_fed_by_the_tokenizers_template_and_answered_as_a_message():
    tokenizer, seen = load_tokenizer("l2l/tiny"), list[Any]()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}so"
    prompt = [{"role": "user", "content": "anna is in the barn."}]

    def reward(prompts: Any, completions: Any) -> list[float]:
        seen.extend([prompts, completions])
        return [1.0]

    model = l2l.load_model("l2l/tiny").eval()
    own = Reward("it", reward).encoded([{"prompt": prompt}], ["row"], model, tokenizer, 4, None)
    assert own.ids[json.dumps(prompt, sort_keys=True)] == tuple(tokenizer("anna is in the barn. so").input_ids[1:])
    found = own.completions(TransformersSampler(model, tokenizer, 4), tokenizer, [{"prompt": prompt}], Key(0), [0])
    assert seen == [[prompt], [[{"role": "assistant", "content": found[0].completion}]]]


# Runs.


def test_losses_of_a_step_are_minus_the_rewards_and_a_function_of_weights_and_step():
    context = prepare_fine_tuning(FineTuneConfig(reward=f"{__name__}:lengths", prompts=str(len(ROWS)), **SMALL), given=given())
    first, again, next_ = (context.closures.at(step)() for step in (0, 0, 1))
    assert isinstance(first, torch.Tensor) and isinstance(again, torch.Tensor) and isinstance(next_, torch.Tensor)
    assert first.shape == (4,) and (first <= 0).all() and first.any()
    assert torch.equal(first, again) and not torch.equal(first, next_)
    shared = make_closures(
        context_of(context, parallel="data", micro_batch=3), context.optimizer.method, context.closures.batcher
    )
    assert float(shared.at(0)()) == pytest.approx(first.mean().item())  # pyright: ignore[reportArgumentType]


def given() -> GivenReward:
    return GivenReward(lengths, tuple(ROWS))


def context_of(context: Any, **options: Any) -> Any:
    return replace(context, config=replace(context.config, **options))


def test_a_run_reports_the_reward_and_what_was_written_before_and_after(run: l2l.FineTuneResult):
    rows, summary = read_metrics(run.out / "metrics.csv"), run.summary
    told = [float(row["reward"]) for row in rows if row["reward"]]
    assert [told[0], max(told)] == [summary["reward"][name]["value"] for name in ("start", "end")]
    assert summary["reward"]["rise"]["value"] == pytest.approx(max(told) - told[0])
    assert summary["best"]["dev"]["metric"] == "reward" and summary["objective"]["name"] == "reward"
    assert summary["initial_dev_loss"] == -told[0]
    before, after = ([json.loads(line) for line in (run.out / name).read_text().splitlines()] for name in (BEFORE, AFTER))
    assert len(before) == len(after) == 4 * 2
    assert all(one["reward"] == len(one["completion"]) / 10 for one in (*before, *after))
    held_out = {one["prompt"] for one in before}
    assert len(held_out) == 4 and held_out < {row["prompt"] for row in ROWS}


def test_the_log_of_a_reward_run_rebuilds_its_last_weights_bit_for_bit(tmp_path: Path):
    log = read_log(train(tmp_path / "whole", method="es", num_directions=3, temperature=0.8).out / NAME)
    assert len(log.steps) == 3 and len(set(log.steps[0].losses)) > 1
    model = l2l.load_model("l2l/tiny")
    context = prepare_fine_tuning(
        FineTuneConfig(**SMALL, method="es", num_directions=3, temperature=0.8, reward="x:y", prompts="z"), model, given=given()
    )
    for step in range(3):
        context.optimizer.step(context.closures.at(step))
    context.optimizer.theta.restore()
    assert equal(weights(rebuild(log, "l2l/tiny", "last")), weights(model))


def test_a_run_that_is_stopped_continues_to_the_same_bits(run: l2l.FineTuneResult, tmp_path: Path):
    calls = 0

    def stopping(**columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 9:  # in the third step
            raise KeyboardInterrupt
        return lengths(**columns)

    options = {"checkpoint_every": 1, "reward": stopping}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run" / "summary.json").exists()
    again = train(tmp_path / "run", **options)
    assert calls > 9
    assert again.summary["reward"] == run.summary["reward"]
    one, other = (read_log(out / NAME).steps for out in (run.out, again.out))
    assert [step.losses for step in one] == [step.losses for step in other]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fzoo", "rsgn", "learned"])
def test_methods_of_forward_passes_take_the_rewards_of_rows(method: str, tmp_path: Path):
    tuner = {"tuner": "l2l-tiny"} if method == "learned" else {}
    summary = train(tmp_path / "run", method=method, steps=1, **tuner).summary
    assert summary["steps"] == 1 and math.isfinite(summary["reward"]["end"]["value"])


def test_half_precision_weights_are_perturbed_as_copies_under_sampling(tmp_path: Path):
    result = train(tmp_path / "run", dtype="bfloat16", steps=2)
    losses = [step.losses for step in read_log(result.out / NAME).steps]
    assert result.summary["perturb"] == "functional" and any(plus != minus for plus, minus in losses)


def test_the_command_runs_a_function_of_a_file_and_the_page_shows_its_curve(tmp_path: Path, capsys: Any):
    (tmp_path / "short.py").write_text("def short(completions, **columns):\n    return [-len(text) for text in completions]\n")
    prompts, out = written(tmp_path / "prompts.jsonl", ROWS), str(tmp_path / "run")
    words = [f"--{name}={value}" for name, value in (SMALL | {"steps": 2}).items()]
    assert (
        cli.main(["fine-tune", f"--reward={tmp_path / 'short.py'}:short", f"--prompts={prompts}", f"--out={out}", *words]) == 0
    )
    assert "reward, start" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["replay", out, "--to", "last"]) == 0
    page = run_report(ReportConfig([out], str(tmp_path / "page.html"))).read_text()
    assert "Mean reward on dev by passes" in page and "Completions before and after" in page


# Refusals.


def scored(value: Any) -> Callable[..., Any]:
    return lambda prompts, completions: value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0], "gave 1 rewards for 2 completions"),
        (None, "gave a NoneType for 2 completions"),
        ([1.0, None], "gave None for row 1 of the batch, with the prompt 'b'"),
        ([math.nan, 1.0], "gave nan for row 0 of the batch, with the prompt 'a'"),
        ([1, "2"], "gave '2' for row 1"),
    ],
)
def test_rewards_that_are_no_numbers_are_named_by_row(value: Any, words: str):
    with pytest.raises(ValueError, match=words):
        Reward("m:f", scored(value)).checked(value, ["a", "b"])


def test_numbers_of_any_kind_are_rewards():
    assert Reward("m:f", scored(None)).checked(torch.tensor([1, 2]), ["a", "b"]) == [1.0, 2.0]
    assert Reward("m:f", scored(None)).checked([True, torch.tensor(0.5)], ["a", "b"]) == [1.0, 0.5]


def test_prompts_that_are_missing_empty_or_uneven_are_named_by_line(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        read_prompts(tmp_path / "none.jsonl")
    for rows, words in (
        ([], "have no row"),
        ([{"prompt": "a"}, {"text": "b"}], "p.jsonl:2: field 'prompt' is missing"),
        ([{"prompt": " "}], "p.jsonl:1: the prompt is empty"),
        ([{"prompt": [{"role": "user"}]}], "must be a text, or a chat"),
        ([{"prompt": "a", "x": 1}, {"prompt": "b"}], "p.jsonl:2: column 'x' is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            check_rows(*read_prompts(written(tmp_path / "p.jsonl", rows)))


def test_a_prompt_longer_than_the_context_and_a_chat_without_a_template_are_named():
    model, tokenizer = l2l.load_model("l2l/tiny").eval(), load_tokenizer("l2l/tiny")
    with pytest.raises(
        ValueError, match=r"here: the prompt has \d+ tokens, and with 4 new ones is longer than the 10 that fit"
    ):
        Reward("m:f", lengths).encoded([{"prompt": "anna is in the barn. so"}], ["here"], model, tokenizer, 4, 10)
    with pytest.raises(ValueError, match="here: the prompt is a chat, and the tokenizer has no chat template"):
        prompt_ids(tokenizer, [{"role": "user", "content": "a"}], "here")


def test_functions_that_are_not_there_or_do_not_take_the_columns_are_refused():
    with pytest.raises(ValueError, match="no module 'nowhere' can be imported"):
        find_function("nowhere:f")
    with pytest.raises(ValueError, match="has no function 'f'"):
        find_function("json:f")
    with pytest.raises(ValueError, match="does not fit: got an unexpected keyword argument 'x'; add"):
        check_columns("m:f", scored([]), ["x"])
    with pytest.raises(ValueError, match="rename the column"):
        check_columns("m:f", scored([]), ["completions"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": None}, "give prompts, a file of JSON lines"),
        ({"reward": None}, "give a reward, or leave prompts out"),
        ({"reward": "f"}, "must name a function"),
        ({"method": "adamw"}, "needs the gradient of what it minimises, and a reward has none"),
        ({"lr": "auto"}, "give lr as a number"),
        ({"task": "sst2"}, "task='sst2' does not go with a reward"),
        ({"objective": "f1"}, "objective='f1' does not go with a reward"),
        ({"temperature": -1.0}, "must be a number, at least 0"),
        ({"compile": True}, "compile=True does not go with"),
    ],
)
def test_configurations_that_do_not_go_with_a_reward_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        FineTuneConfig(**{"reward": "m:f", "prompts": "p.jsonl", **options})


def test_a_method_of_derivatives_and_a_model_that_writes_nothing_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="method 'forward_grad' needs the gradient"):
        train(tmp_path / "run", method="forward_grad")
    with pytest.raises(ValueError, match="give a causal language model"):
        TransformersSampler(l2l.load_model("l2l/tiny", head="classifier", num_labels=2), load_tokenizer("l2l/tiny"), 4)
