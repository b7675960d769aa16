"""``l2l bench``: the models it builds, the textbook loop, what it measures, leaves and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Quadratic, farthest, same_bits, weights
from torch import nn

from l2l.cli import main
from l2l.models.shapes import shape_config
from l2l.tools import bench
from l2l.tools.bench import (
    CACHE,
    FORWARDS,
    LEARNED,
    PLAIN,
    POPULATION,
    RSGN_STEP,
    SPREAD,
    STEP,
    TEXTBOOK,
    WHOLE,
    BenchConfig,
    Top,
    build,
    causal_loss,
    checksum,
    contenders,
    measure,
    peaks,
    ratio,
    rounds,
    textbook_step,
    tokens,
)

CPU = torch.device("cpu")
NEEDED = (
    *("step_over_two_forwards", "reference_over_ours", "learned_over_mezo", "peak_over_inference"),
    *("tokens_per_second", "backend", "dtype", "threads", "shape"),
)


def tiny(**options) -> BenchConfig:
    small = {"model": "opt-tiny-shape", "batch_size": 2, "length": 8, "repeats": 2, "threads": 1, "progress": False}
    return BenchConfig(**{**small, **options})


def test_the_command_leaves_bench_json_with_the_promised_figures(tmp_path: Path, capsys):
    sizes = ["--batch-size", "2", "--length", "8", "--repeats", "2", "--threads", "1", "--progress", "false"]
    assert main(["bench", "--model", "opt-tiny-shape", "--dtype", "fp32", *sizes, "--out", str(tmp_path)]) == 0
    assert "step_over_two_forwards" in capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(NEEDED) <= found.keys()
    assert (found["shape"], found["dtype"], found["threads"]) == ("opt-tiny-shape", "fp32", 1)
    assert found["seconds"].keys() == {FORWARDS, STEP, LEARNED, PLAIN, TEXTBOOK}
    assert all(len(values) == 2 for values in found["samples"].values())
    assert found["tokens_per_second"] == pytest.approx(2 * 8 / found["seconds"][STEP])
    assert found["restore_bit_identical"] is None
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["step_over_two_forwards"] == found["step_over_two_forwards"]
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("update", ["master", "stochastic"])
def test_half_precision_is_restored_bit_for_bit(update: str):
    found = measure(tiny(dtype="bf16", update=update, repeats=1, learned=False, textbook=False))
    assert found["restore_bit_identical"] is True
    assert found["update"] == update
    assert found["reference_over_ours"] is None
    assert found["learned_over_mezo"] is None


def test_the_number_of_threads_is_set_and_put_back_after_an_error_too(monkeypatch):
    def broken(*_):
        raise RuntimeError(f"built with {torch.get_num_threads()} threads")

    monkeypatch.setattr(bench, "build", broken)
    with pytest.raises(RuntimeError, match="built with 2 threads"):
        measure(tiny(threads=2))
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_a_population_is_measured_beside_its_forward_passes():
    found = measure(tiny(population=4, learned=False, textbook=False))
    assert found["seconds"].keys() == {FORWARDS, STEP, POPULATION, RSGN_STEP, PLAIN}
    for name, figure in ((POPULATION, "population_over_forwards"), (RSGN_STEP, "rsgn_over_forwards")):
        per_forward = [2 * a / b / 5 for a, b in zip(*(found["samples"][each] for each in (name, FORWARDS)), strict=True)]
        assert found[figure] == pytest.approx(sum(per_forward) / 2)  # the median of two rounds
    assert measure(tiny(learned=False, textbook=False))["population_over_forwards"] is None


@pytest.mark.slow
def test_of_the_top_layers_passes_leave_out_what_lies_below(monkeypatch: pytest.MonkeyPatch):
    found = measure(tiny(train_layers="top:1", learned=False, textbook=False))
    assert found["seconds"].keys() == {FORWARDS, STEP, PLAIN, WHOLE, CACHE}
    pairs = zip(found["samples"][WHOLE], found["samples"][FORWARDS], strict=True)
    assert found["whole_over_top"] == pytest.approx(sum(a / b for a, b in pairs) / 2)  # the median of two rounds
    model = build("opt-tiny-shape", "fp32", CPU)
    ids, calls = tokens(tiny(), 512), []
    layers: Any = model.get_decoder().layers
    top = Top.of(model, ids, "top:1")
    layers[0].fc1.register_forward_hook(lambda *_: calls.append("below"))
    layers[1].fc1.register_forward_hook(lambda *_: calls.append("above"))
    whole, above = causal_loss(model, ids, None), causal_loss(model, ids, None, torch.ones_like(ids))
    with top.cache.attached():
        assert above() == whole()
    assert calls == ["above", "below", "above"]
    assert not any(parameter.requires_grad for parameter in layers[0].parameters())


def test_every_contender_evaluates_the_same_loss():
    model = build("opt-tiny-shape", "fp32", CPU)
    config = tiny()
    closure = causal_loss(model, tokens(config, 512), None)
    for contender in contenders(model, closure, config).values():
        with contender() as step:
            assert step() == pytest.approx(math.log(512), rel=0.05)


def test_rounds_restore_the_weights_and_leave_the_random_state_of_torch_alone():
    model = build("opt-tiny-shape", "fp32", CPU)
    config = tiny()
    closure = causal_loss(model, tokens(config, 512), None)
    before, state = closure().item(), torch.get_rng_state()
    rounds(contenders(model, closure, config), CPU, 1, lambda _: None)
    assert closure().item() == pytest.approx(before, abs=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loss_is_that_of_transformers():
    model = build("opt-tiny-shape", "fp32", CPU)
    ids = tokens(tiny(batch_size=3, length=12), 512)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
        logits = model(input_ids=ids).logits
    assert causal_loss(model, ids, None)().item() == pytest.approx(expected.item(), rel=1e-6)
    last = torch.nn.functional.cross_entropy(logits[:, -4:-1].flatten(0, 1), ids[:, -3:].flatten())
    assert causal_loss(model, ids, 3)().item() == pytest.approx(last.item(), rel=1e-6)


def test_ratios_are_medians_of_the_rounds_own_ratios():
    seconds = {"a": [2.0, 30.0, 4.4], "b": [1.0, 10.0, 2.0]}
    assert ratio(seconds, "a", "b") == pytest.approx(2.2)
    assert ratio(seconds, "a", "c") is None


def test_peaks_count_the_memory_of_a_contender():
    def hungry():
        from contextlib import contextmanager

        @contextmanager
        def context():
            yield lambda: float(torch.full((2**24,), 1.0)[-1])

        return context()

    def modest():
        from contextlib import nullcontext

        return nullcontext(lambda: 1.0)

    found = peaks({"modest": modest, "hungry": hungry}, CPU, 1, lambda _: None)
    assert found["hungry"] - found["modest"] == pytest.approx(2**26, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_sees_one_bit_and_a_swap(dtype: torch.dtype):
    values = torch.linspace(1, 2, 1000).to(dtype)
    before = checksum([values])
    assert checksum([values.clone()]) == before
    flipped = values.clone()
    flipped.view(torch.int16)[700] ^= 1
    assert checksum([flipped]) != before
    swapped = values.clone()
    swapped[[3, 900]] = values[[900, 3]]
    assert checksum([swapped]) != before
    assert checksum([values[:500], values[500:]]) != checksum([values[500:], values[:500]])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "opt-9b-shape"], "'opt-9b-shape'"),
        (["--model", "/no/such/model"], "'/no/such/model'"),
        (["--model", "opt-tiny-shape", "--length", "999"], "999"),
        (["--model", "opt-tiny-shape", "--length", "1"], "length=1"),
        (["--dtype", "int3"], "'int3'"),
        (["--device", "cuda:99"], "'cuda:99'"),
        (["--device", "teapot"], "'teapot'"),
        (["--repeats", "0"], "repeats=0"),
        (["--threads", "0"], "threads=0"),
        (["--update", "sometimes"], "update"),
        (["--answer_tokens", "64"], "answer_tokens=64"),
    ],
)
def test_bad_input_ends_in_one_line_and_nothing_is_written(options: list[str], named: str, tmp_path: Path, capsys):
    assert main(["bench", *options, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("l2l: ")
    assert named in lines[0]
    assert not (tmp_path / "out").exists()


def test_matrices_are_random_norms_one_and_biases_zero():
    model = build("opt-tiny-shape", "fp32", CPU)
    assert not model.training
    matrices = [p for p in model.parameters() if p.ndim > 1]
    whole = torch.cat([p.detach().flatten() for p in matrices])
    assert whole.std().item() == pytest.approx(SPREAD, rel=0.02)
    assert whole.mean().item() == pytest.approx(0, abs=SPREAD / 100)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (parameter == expected).all(), name


def test_weights_depend_on_the_seed_only_and_the_head_stays_tied():
    first, same, other = (build("opt-tiny-shape", "bf16", CPU, seed) for seed in (0, 0, 1))
    assert first.dtype == torch.bfloat16
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    pairs = list(zip(first.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(left, right) for left, right in pairs)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.mark.parametrize("name", ["opt-tiny-shape", "smollm2-135m-shape"])
def test_a_shape_has_the_buffers_of_its_architecture(name: str):
    from transformers import AutoModelForCausalLM

    config = shape_config(name)
    config.num_hidden_layers = 1
    wanted = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    found = dict(build(name, "fp32", CPU).named_buffers())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_model_of_another_name_is_loaded():
    assert build("l2l/tiny", "fp32", CPU, length=16).name_or_path.endswith("tiny")


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="max_length 129"):
        build("opt-tiny-shape", "fp32", CPU, length=129)


def test_the_textbook_step_moves_along_the_noise_of_its_two_losses():
    model, evaluated, losses = Quadratic(), [], []
    start = weights(model)

    def closure() -> torch.Tensor:
        evaluated.append(weights(model))
        losses.append(model())
        return losses[-1]

    textbook_step(list(model.parameters()), closure, seed=3, lr=0.01, epsilon=1e-2)
    torch.manual_seed(3)
    slope = (losses[0].item() - losses[1].item()) / 2e-2
    for name, value in start.items():
        noise = torch.normal(0.0, 1.0, value.shape)
        torch.testing.assert_close(evaluated[0][name], value + 1e-2 * noise)
        torch.testing.assert_close(evaluated[1][name], value - 1e-2 * noise)
        torch.testing.assert_close(weights(model)[name], value - 0.01 * slope * noise, rtol=1e-4, atol=1e-5)


def test_the_textbook_loop_descends():
    model = Quadratic()
    before = model().item()
    for seed in range(60):
        textbook_step(list(model.parameters()), model, seed, lr=0.03)
    assert model().item() < 0.5 * before


def test_in_bfloat16_the_textbook_loop_drifts_without_any_update():
    """Its restore is not exact: the reason why the package perturbs half precision functionally."""
    model = nn.Linear(64, 64).to(torch.bfloat16)
    before = weights(model)
    for seed in range(20):
        textbook_step(list(model.parameters()), lambda: 1.0, seed)
    assert not same_bits(before, weights(model))
    assert farthest(before, weights(model)) < 0.1


def test_the_textbook_step_refuses_a_loss_that_is_not_finite():
    with pytest.raises(FloatingPointError):
        textbook_step(list(Quadratic().parameters()), lambda: float("nan"), 0)
