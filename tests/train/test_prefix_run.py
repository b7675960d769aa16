"""Whole runs on the top layers: the same weights with and without the cache, wherever it lies, also across an interruption."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_bits
from daily import daily_slice
from processes import kill_when_saved

import l2l
from l2l.cli import main
from l2l.estimators import finite_loss
from l2l.models.load import load_model, load_tokenizer
from l2l.models.prefix import NoPrefixError
from l2l.models.shapes import tiny_random
from l2l.noise import Key
from l2l.tools.estimate import EstimateConfig, run_estimate
from l2l.train import prefix
from l2l.train.config import FineTuneConfig
from l2l.train.prefix import FILE, choose_place
from l2l.train.trainer import _expected_costs, prepare_fine_tuning

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {
    "task": "world_topic",
    "lr": 1e-3,
    "steps": 6,
    "batch_size": 4,
    "train_size": 16,
    "dev_size": 8,
    "test_size": 8,
    "eval_every": 3,
    "checkpoint_every": 2,
    "progress": False,
    "train_layers": "top:1",
}


def fine_tune(out: Path, model: Any = "l2l/tiny", **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune(model, out=str(out), **{**SMALL, **options})


def weights(result: l2l.FineTuneResult) -> dict[str, torch.Tensor]:
    return dict(result.model.named_parameters())


RUNS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "dizo": {"method": "dizo", "method_args": {"interval": 2, "iterations": 1}},
    "auto": {"lr": "auto"},
    "micro-batches": {"micro_batch": 2, "steps": 1},  # a second step would put rows together otherwise, and may round otherwise
    "lora": {"scheme": "lora", "train_layers": "top:1/2"},
    "head": {"scheme": "head", "train_layers": "all"},
    "listed": {"train_layers": "1,3"},
    "bf16": {"dtype": "bf16"},
    "accuracy": {"objective": "accuracy"},
    "adamw": {"method": "adamw", "lr": 1e-4},
    "frozen by name": {"train_layers": "all", "freeze": r"embed|layers\.[01]\."},
}


@pytest.mark.parametrize("run", daily_slice(RUNS, 2))
def test_a_run_ends_with_the_same_weights_with_the_cache_wherever_it_lies(run, tmp_path):
    # One batch of every row: each step feeds the rows in the company in which they were computed.
    options = {"batch_size": 16, "steps": 4, "save": "log", **RUNS[run]}
    whole = fine_tune(tmp_path / "off", prefix_cache="off", **options)
    assert whole.summary["prefix_cache"] is None
    assert whole.summary["cache_seconds"] == 0
    for place in ("memory", "disk") if run in ("mezo", "bf16") else ("memory",):
        result = fine_tune(tmp_path / place, prefix_cache=place, **options)
        assert same_bits(weights(result), weights(whole))
        assert result.summary["prefix_cache"]["place"] == place
        assert result.summary["prefix_cache"]["rows"] > 16
        assert result.summary["cache_seconds"] > 0
        left = {path.name for path in (tmp_path / place).iterdir()}
        assert not {FILE, "best.safetensors", "checkpoint.safetensors"} & left
        for name in ("initial_loss", "final_loss", "accuracy", "trained_parameters"):
            assert result.summary[name] == whole.summary[name]


def watched(calls: list[tuple[int, int]]) -> Any:
    """The embedded model, whose layers note (layer, rows) when they compute something."""
    model = load_model("l2l/tiny")
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda _module, args, _output, index=index: calls.append((index, len(args[0]))))
    return model


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_lies_below_is_computed_once_per_row_when_it_is_met(place, tmp_path, monkeypatch):
    calls: list[tuple[int, int]] = []
    model, built = watched(calls), prefix.RunPrefix.build

    def build(self, *args: Any) -> None:
        calls.clear()
        built(self, *args)
        assert bool(calls) == (place == "disk")  # at once, or when a row is first met

    monkeypatch.setattr(prefix.RunPrefix, "build", build)
    options: dict[str, Any] = {"train_layers": "top:2", "length_groups": 1, "steps": 8, "prefix_cache": place}
    result = fine_tune(tmp_path, model, tokenizer=load_tokenizer("l2l/tiny"), **options)
    evaluations = result.summary["rows"]
    assert evaluations["dev"] == evaluations["test"] == 8
    scored = 2 + 3 + 4  # before the first step, after steps 3, 6 and 8, and the last and the best weights on two sets each
    upper = [layer for layer, _ in calls if layer > 1]
    assert upper.count(2) == upper.count(3) == result.summary["passes"] + scored
    below = [rows for layer, rows in calls if layer == 0]
    assert sum(below) == result.summary["prefix_cache"]["rows"] == 16 + 8 + 8 + 8  # reported train rows in their own batches
    model(input_ids=torch.arange(4)[None], use_cache=False)
    assert [layer for layer, _ in calls[-4:]] == [0, 1, 2, 3]  # the model is given back as it was


def test_behind_the_last_layer_rows_are_computed_where_their_own_batch_reads_them(tmp_path):
    options = {**SMALL, "scheme": "head", "train_layers": "all", "train_size": 32, "length_groups": 1}
    context = prepare_fine_tuning(FineTuneConfig(out=str(tmp_path), **options))
    assert context.prefix is not None and context.prefix.cache.lowest == 4
    chosen = [context.closures.batcher.indices(step)[step % 4] for step in (1, 3, 4, 6)]  # of four planned batches
    closure = context.closures._on(chosen, Key(0))
    whole = finite_loss(closure)
    context.prefix.plan(context, context.closures, 8)
    with context.prefix.cache.attached():
        assert finite_loss(closure) == pytest.approx(whole, rel=1e-6)
    assert len(context.prefix.cache.rows) >= 4 * 4, "their batches were computed in the middle of the pass"


def test_rows_that_no_step_comes_to_are_not_computed(tmp_path):
    calls: list[tuple[int, int]] = []
    options: dict[str, Any] = {"train_size": 64, "steps": None, "max_passes": 8, "batch_size": 4, "eval_every": 4}
    model = watched(calls)
    result = fine_tune(tmp_path, model, tokenizer=load_tokenizer("l2l/tiny"), train_layers="top:2", **options)
    assert result.summary["prefix_cache"]["rows"] == 4 * 4 + 8 + 8 + 8
    assert 0 < result.summary["cache_seconds"] < result.summary["train_seconds"] + result.summary["evaluate_seconds"]


COMMAND = (
    "fine-tune --task world_topic --lr 1e-3 --steps 20 --batch_size 4 --train_size 24 --dev_size 8 --test_size 8 --eval_every 8"
    " --checkpoint_every 5 --log_every 1 --progress false --train_layers top:1"
)


@pytest.mark.parametrize("place", daily_slice(["memory", "disk"], 1))
def test_a_killed_run_continued_is_the_uninterrupted_run(place, tmp_path):
    command = [*COMMAND.split(), "--prefix_cache", place, "--out"]
    kill_when_saved([*command, str(tmp_path / "killed")], tmp_path / "killed")
    assert (tmp_path / "killed" / FILE).exists() == (place == "disk")
    for name in ("killed", "whole"):
        assert main([*command, str(tmp_path / name)]) == 0
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for file in ("steps.l2l", "model/model.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["prefix_cache"]["lowest_layer"] == 3


def sst2(folder: Path, word: str) -> Path:
    """Rows of SST-2's shape."""
    for split, count in (("train", 30), ("validation", 10)):
        rows = [json.dumps({"sentence": f"a {word} film of {i} scenes", "label": i % 2}) for i in range(count)]
        (folder / "sst2").mkdir(parents=True, exist_ok=True)
        (folder / "sst2" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


class Killed(BaseException):
    """The process ends here."""


def interrupted(tmp_path: Path, monkeypatch, **options: Any) -> dict[str, Any]:
    """A run with a cache on disk, broken off after its first checkpoint, and its options."""
    from l2l.train import trainer

    tiny_random("llama", vocab_size=len(load_tokenizer("l2l/tiny"))).save_pretrained(tmp_path / "model")
    load_tokenizer("l2l/tiny").save_pretrained(tmp_path / "model")
    given = {**SMALL, "task": "sst2", "data_dir": str(sst2(tmp_path / "data", "fine")), "prefix_cache": "disk", **options}
    given |= {"model": str(tmp_path / "model"), "out": str(tmp_path / "out")}

    def step(self, optimizer: Any) -> float:
        if self.progress.step == 3:
            raise Killed
        return whole(self, optimizer)

    whole = trainer.Session.step
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Session, "step", step)
        with pytest.raises(Killed):
            l2l.fine_tune(**given)
    return given


def test_a_run_continued_on_other_rows_is_refused(tmp_path, monkeypatch):
    given = interrupted(tmp_path, monkeypatch)
    sst2(tmp_path / "data", "poor")
    with pytest.raises(ValueError, match=r"read something else: train rows texts: .*--overwrite true"):
        l2l.fine_tune(**given)
    (tmp_path / "out" / "run.json").unlink()  # the checkpoint has its identity, too
    with pytest.raises(ValueError, match=r"checkpoint.safetensors .* what the run reads has changed.*--overwrite true"):
        l2l.fine_tune(**given)
    assert (tmp_path / "out" / "checkpoint.safetensors").exists()
    l2l.fine_tune(**{**given, "out": str(tmp_path / "other")})  # the ways out
    l2l.fine_tune(**given, overwrite=True)


def test_a_run_continued_on_other_weights_is_refused(tmp_path, monkeypatch):
    given = interrupted(tmp_path, monkeypatch)
    tiny_random("llama", seed=1, vocab_size=len(load_tokenizer("l2l/tiny"))).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="read something else: model weights: "):
        l2l.fine_tune(**given)
    (tmp_path / "out" / "run.json").unlink()  # the checkpoint has its identity, too
    with pytest.raises(ValueError, match="what the run reads has changed"):
        l2l.fine_tune(**given)


def test_a_cache_of_other_rows_is_computed_anew(tmp_path, monkeypatch, caplog):
    """As where a run is killed before its first checkpoint, and its rows change meanwhile."""
    given = interrupted(tmp_path, monkeypatch)
    for path in (tmp_path / "out").glob("checkpoint*"):
        path.unlink()
    sst2(tmp_path / "data", "poor")
    found = l2l.fine_tune(**given).summary
    assert "prefix_cache.safetensors was made from something else: rows " in caplog.text
    assert found["final_loss"] == l2l.fine_tune(**given | {"out": str(tmp_path / "other")}).summary["final_loss"]


def test_a_file_does_not_depend_on_how_many_steps_were_predicted_to_fit_into_the_seconds(tmp_path, monkeypatch):
    from l2l.train import trainer

    limits = {"steps": None, "max_seconds": 0.5, "checkpoint_every": 100, "train_size": 20}
    monkeypatch.setattr(trainer, "_pass_seconds", lambda context: 1.0)
    given = interrupted(tmp_path, monkeypatch, **limits)
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()
    written = (tmp_path / "out" / FILE).read_bytes()
    monkeypatch.setattr(trainer, "_pass_seconds", lambda context: 1e-3)  # the machine is less busy now
    read: list[bytes] = []
    begin = trainer.Session.begin
    monkeypatch.setattr(
        trainer.Session, "begin", lambda self: (read.append((tmp_path / "out" / FILE).read_bytes()), begin(self))
    )
    assert l2l.fine_tune(**given).summary["prefix_cache"]["place"] == "disk"
    assert read == [written]


def test_a_full_disk_is_one_error_and_leaves_no_half_file(tmp_path, monkeypatch):
    opened = Path.open

    class Full:
        """A file on a disk that is full after 1,000 bytes."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 1000

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, data: Any) -> None:
            self.room -= memoryview(data).nbytes
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = opened(path, *args, **kwargs)
        return Full(file) if path.name == FILE else file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ValueError, match=r"disk of .* is full: the prefix cache takes [\d,]+ bytes .*prefix_cache memory"):
        fine_tune(tmp_path / "run", prefix_cache="disk")
    assert {path.name for path in (tmp_path / "run").iterdir() if FILE in path.name or path.name.startswith(".")} == set()
    for place in ("memory", "off"):  # ways out
        fine_tune(tmp_path / place, prefix_cache=place)
    monkeypatch.setattr(Path, "open", opened)  # stands in for another disk
    fine_tune(tmp_path / "other", prefix_cache="disk")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_layers": "all", "prefix_cache": "memory"}, "below layer 1 is trained: train the top.*train_layers top:5"),
        ({"train_layers": "top:4", "prefix_cache": "disk"}, "something below layer 1 is trained"),
        ({"train_layers": "top:5"}, "asks for 5 layers, but the model has 4: use all, or fewer"),
        ({"train_layers": "last"}, "must be all, top:5"),
        ({"scheme": "prompt"}, "trains what lies below all layers: leave train_layers out, or use lora"),
        ({"sparse_embeddings": True}, "train_layers='top:1' trains no word embedding"),
        ({"prefix_cache": "ram"}, "must be one of auto, off, memory, disk"),
        ({"freeze": r"layers\.3|norm"}, "nothing would be trained"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fine_tune(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


class Scaled(torch.nn.Module):
    """A layer that also reads what those below it were given: it cannot do without them."""

    def __init__(self, layer: torch.nn.Module, shared: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.shared = layer, shared

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        found = self.layer(hidden_states, **kwargs)
        self.shared["bottom"] = self.shared.get("bottom", 0) + hidden_states
        return found + self.shared["bottom"]


def entangled() -> Any:
    model = load_model("l2l/tiny")
    shared: dict[str, torch.Tensor] = {}
    model.model.layers = torch.nn.ModuleList([Scaled(layer, shared) for layer in model.model.layers])
    model.model.register_forward_pre_hook(lambda *_: shared.clear())
    return model


def test_layers_that_cannot_be_left_out_are_found_and_said_in_one_line(tmp_path, caplog):
    options = {"tokenizer": load_tokenizer("l2l/tiny"), "save": "log", "length_groups": 1, "share_prompts": False}
    with caplog.at_level(logging.WARNING):
        result = fine_tune(tmp_path / "auto", entangled(), **options)
    said = [record.getMessage() for record in caplog.records if "prefix cache" in record.getMessage()]
    assert len(said) == 1
    assert "gives other losses without its lower layers" in said[0]
    assert result.summary["prefix_cache"] is None
    with pytest.raises(ValueError, match=r"prefix_cache='memory', but .*leave prefix_cache at auto"):
        fine_tune(tmp_path / "memory", entangled(), prefix_cache="memory", **options)


def test_a_run_of_all_layers_has_no_cache_and_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        context = prepare_fine_tuning(FineTuneConfig(**SMALL | {"train_layers": "all", "lr": 1e-3}))
    assert context.prefix is None
    assert not caplog.records


def test_a_place_is_chosen_by_what_is_free(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(prefix, "available_bytes", lambda device: 1000)
    assert choose_place("auto", 500, cpu, tmp_path) == "memory"
    assert choose_place("auto", 501, cpu, tmp_path / "not" / "there") == "disk"
    with pytest.raises(NoPrefixError, match="fit neither in memory nor on disk"):
        choose_place("auto", 2**60, cpu, tmp_path)
    assert choose_place("memory", 1000, cpu, tmp_path) == "memory"
    with pytest.raises(ValueError, match="takes 1,001 bytes, but 1,000 are free: use disk"):
        choose_place("memory", 1001, cpu, tmp_path)
    with pytest.raises(ValueError, match=r"prefix_cache='disk' takes .* use memory"):
        choose_place("disk", 2**60, cpu, tmp_path)
    (tmp_path / FILE).touch()
    assert choose_place("auto", 1, cpu, tmp_path) == "disk"  # an interrupted run goes on with its file


def test_a_gpu_is_relieved_by_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix, "available_bytes", lambda device: 1000 if torch.device(device).type == "cuda" else 5000)
    cuda = torch.device("cuda")
    assert [choose_place("auto", size, cuda, tmp_path) for size in (400, 600, 4000)] == ["memory", "pinned", "disk"]


def test_estimates_know_the_depth_and_the_cache():
    options: dict[str, Any] = {"model": "opt-125m-shape", "length": 32, "batch_size": 4}
    whole = run_estimate(EstimateConfig(**options))
    top = run_estimate(EstimateConfig(**options, train_layers="top:1/4", cached_rows=1000))
    off = run_estimate(EstimateConfig(**options, train_layers="top:1/4", prefix_cache="off"))
    assert (whole["layers_per_pass"], top["layers_per_pass"], off["layers_per_pass"]) == (12, 3, 12)
    assert top["prefix_cache_bytes"] == top["bytes"]["prefix_cache"] == 1000 * 32 * 768 * 4
    assert off["prefix_cache_bytes"] == whole["prefix_cache_bytes"] == 0
    assert top["trained_parameters"] == off["trained_parameters"] == 3 * 7_087_872 + 2 * 768
    assert top["flops_per_forward"] < whole["flops_per_forward"] / 2 == off["flops_per_forward"] / 2
    assert top["seconds_per_step"] < off["seconds_per_step"] < whole["seconds_per_step"]


def test_a_run_expects_the_cost_of_the_layers_that_it_runs():
    cached, whole = (
        _expected_costs(prepare_fine_tuning(FineTuneConfig(**SMALL | {"steps": 50, "prefix_cache": place})))
        for place in ("memory", "off")
    )
    assert (cached.seconds_per_step or 0) < (whole.seconds_per_step or 0)
