"""Kind 1 of issue 16, *a run is known by the text of its configuration, not by what that names*.

A run that is continued has read what it reads now, or the message names what has changed, old -> new; what changes nothing
never refuses. Situations of others: a data set that grew between two runs (TensorAuto/OpenTau #502), epochs added after the
learning rate had decayed to 0 (huggingface/transformers #18070), another data set after a checkpoint (NVIDIA-NeMo/RL #2519).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import l2l
from l2l.cli import main
from l2l.models.load import load_tokenizer
from l2l.models.shapes import tiny_random
from l2l.report.run_directory import RunDirectory
from l2l.train import trainer
from l2l.train.replay import differences

pytestmark = pytest.mark.in_turn

STEPS, CUT = 4, 2
SIZES = "--train_size 6 --dev_size 2 --test_size 2 --batch_size 2 --lr 1e-3 --eval_every 2 --checkpoint_every 1 --log_every 1"
METHOD = '''
from dataclasses import dataclass
from l2l.methods.base import MethodInfo, Method

@dataclass(frozen=True)
class Mine(Method):
    """MeZO along plus and minus one."""

    info = MethodInfo("nobody, nowhere", "nothing at all")
    distribution: str = "rademacher"
'''
OBJECTIVE = """
def score(model, tokenizer, rows):
    return float(sum(parameter.detach().abs().mean() for parameter in model.parameters())) + len(rows)
"""
TASK = {
    "task": "moods",
    "data_files": {"train": "data/train.csv", "validation": "data/test.csv"},
    "training_split": "train",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ text }} the day was",
    "doc_to_choice": ["bad", "good"],
    "doc_to_target": "{{ 'good' if mood == 'happy' else 'bad' }}",
}


class Cut(BaseException):
    """Stands for whatever ends a process."""


def write_csv(path: Path, number: int, first: int = 0) -> None:
    rows = [f"the cat of day {first + i} slept .,{('sad', 'happy')[i % 2]}\n" for i in range(number)]
    path.write_text("text,mood\n" + "".join(rows))


def save_model(folder: Path, seed: int = 0) -> None:
    tiny_random("llama", seed=seed, vocab_size=len(load_tokenizer("l2l/tiny"))).save_pretrained(folder)


def command(*more: str, out: str = "runs/a", task: str = "moods.yaml", model: str = "model") -> list[str]:
    given = ["fine-tune", "--task", task, "--model", model, "--out", out, "--steps", str(STEPS), *SIZES.split()]
    return [*given, "--progress", "false", *more]


def broken_off(*arguments: str) -> None:
    """Run the command until a checkpoint of step :data:`CUT` is there."""
    whole = trainer.Session.step

    def step(self, optimizer: object) -> float:
        if self.progress.step == CUT:
            raise Cut
        return whole(self, optimizer)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(trainer.Session, "step", step)
        main(arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Model, task and data; a run broken off in ``runs/a``, and the same run uninterrupted in ``runs/whole``."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    write_csv(folder / "data" / "train.csv", 8)
    write_csv(folder / "data" / "test.csv", 2, 100)
    (folder / "moods.yaml").write_text(yaml.safe_dump(TASK))
    (folder / "mine.py").write_text(METHOD)
    (folder / "reward.py").write_text(OBJECTIVE)
    save_model(folder / "model")
    load_tokenizer("l2l/tiny").save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        broken_off(*command())
        assert main(command(out="runs/whole")) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A copy of it all in another place, which is the working directory."""
    shutil.copytree(made, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


@pytest.fixture
def refusal(capsys) -> Callable[..., str]:
    """Runs a command that must be refused, and leave the run as it is; gives the line it says."""

    def run(*arguments: str, out: str = "runs/a") -> str:
        before = {path: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}
        capsys.readouterr()
        assert main(arguments) == 2
        assert {path: path.read_bytes() for path in Path(out).iterdir() if path.is_file()} == before
        (line,) = capsys.readouterr().err.splitlines()
        first, then = line.index("hoose another --out"), line.find("overwrite")
        assert then == -1 or first < then, "it advises to destroy work first"
        return line

    return run


def weights(out: str) -> bytes:
    return (Path(out) / "model" / "model.safetensors").read_bytes()


# What changes what the run computes.


def flip_labels() -> None:
    path = Path("data/train.csv")
    flipped = path.read_text().replace("sad", "?").replace("happy", "sad").replace("?", "happy")
    path.write_text(flipped)


def turn_rows() -> None:
    head, *rows = Path("data/train.csv").read_text().splitlines()
    Path("data/train.csv").write_text("\n".join([head, *reversed(rows)]) + "\n")


def swap_two_numbers() -> None:
    """Two weights of one tensor trade places, which a hash of sums does not see."""
    found = load_file("model/model.safetensors")
    name = next(name for name, value in found.items() if value.ndim == 2)
    row = found[name][0]
    row[0], row[1] = row[1].clone(), row[0].clone()
    save_file(found, "model/model.safetensors", {"format": "pt"})


def edit_json(path: str, **values: object) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | values))


def new_prompt() -> None:
    Path("moods.yaml").write_text(yaml.safe_dump(TASK | {"doc_to_text": "{{ text }} it was"}))


CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "labels": (flip_labels, r"train rows labels: \w{16} -> \w{16}"),
    "order": (turn_rows, r"train rows texts: \w{16} -> \w{16}"),
    "length": (lambda: write_csv(Path("data/train.csv"), 9), r"train rows texts: "),
    "test rows": (lambda: write_csv(Path("data/test.csv"), 2, 50), r"else: test rows texts: \w{16} -> \w{16}\. Choose"),
    "prompt": (new_prompt, r"train rows texts: .*dev rows texts: .*test rows texts: "),
    "model": (lambda: save_model(Path("model"), seed=1), r"else: model weights: \w{16} -> \w{16}\. Choose"),
    "two numbers": (swap_two_numbers, r"else: model weights: "),
    "settings": (lambda: edit_json("model/config.json", rms_norm_eps=0.1), r"model settings rms_norm_eps: 1e-06 -> 0.1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_would_read_something_else_is_refused_and_goes_on_when_it_is_put_back(change, here, refusal, made):
    alter, said = CHANGES[change]
    alter()
    assert re.search(said, refusal(*command()))
    for name in ("data", "model", "moods.yaml"):  # the way out
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
        copy = shutil.copytree if (made / name).is_dir() else shutil.copy
        copy(made / name, name)
    assert main(command()) == 0
    assert weights("runs/a") == weights("runs/whole")


def test_the_other_ways_out_work(here, refusal):
    flip_labels()
    refusal(*command())
    assert main(command(out="runs/b")) == 0
    assert main(command("--overwrite", "true")) == 0
    assert weights("runs/a") == weights("runs/b") != weights("runs/whole")


def test_the_base_below_an_adapter_counts(here, refusal):
    lora = ("--scheme", "lora", "--lr", "1e-2")
    broken_off(*command(*lora, out="runs/lora"))
    save_model(Path("model"), seed=1)
    assert "model weights: " in refusal(*command(*lora, out="runs/lora"), out="runs/lora")


@pytest.mark.parametrize(("file", "options", "said"), [
    ("mine.py", ("--method", "./mine.py"), "method source: "),
    ("reward.py", ("--objective", "./reward.py:score"), "objective source: "),
])  # fmt: skip
def test_code_outside_the_package_counts(file, options, said, here, refusal):
    broken_off(*command(*options, out="runs/b"))
    Path(file).write_text(Path(file).read_text() + "\n# edited\n")
    assert said in refusal(*command(*options, out="runs/b"), out="runs/b")


def test_a_tuner_counts_by_its_content(here, refusal):
    model = l2l.load_model("model")
    l2l.Tuner.for_model(model, seed=1).save_pretrained("tuner")
    options = ("--method", "learned", "--tuner", "tuner")
    broken_off(*command(*options, out="runs/b"))
    shutil.move("tuner", "moved")
    l2l.Tuner.for_model(model, seed=2).save_pretrained("tuner")
    assert re.search(r"method tuner: \w{16} -> \w{16}", refusal(*command(*options, out="runs/b"), out="runs/b"))
    assert main(command("--method", "learned", "--tuner", "moved", out="runs/b")) == 0


def fine_tune(model: object, method: object = None, **options: object) -> object:
    sizes = {"train_size": 8, "dev_size": 4, "test_size": 4, "batch_size": 2, "checkpoint_every": 1, "steps": STEPS}
    return l2l.fine_tune(model, task="world_topic", method=method, out="runs/b", progress=False, **sizes, **options)


def test_a_model_without_a_name_is_known_by_its_weights_and_may_go_on_in_the_process_that_was_interrupted(here):
    first, second = (tiny_random("llama", seed=seed, vocab_size=len(load_tokenizer("l2l/tiny"))) for seed in (0, 1))
    given = {"tokenizer": load_tokenizer("l2l/tiny"), "lr": 1e-3}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        whole = trainer.Session.step
        patch.setattr(trainer.Session, "step", lambda self, optimizer: stop_at(self, whole, optimizer))
        fine_tune(first, **given)
    with pytest.raises(ValueError, match="model weights: "):
        fine_tune(second, **given)
    fine_tune(first, **given)


def stop_at(session: trainer.Session, whole: Callable[..., float], optimizer: object) -> float:
    if session.progress.step == CUT:
        raise Cut
    return whole(session, optimizer)


def test_a_method_object_is_known_by_its_fields(here):
    from l2l.methods.mezo import MeZO

    model, given = l2l.load_model("l2l/tiny"), {"lr": 1e-3}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        whole = trainer.Session.step
        patch.setattr(trainer.Session, "step", lambda self, optimizer: stop_at(self, whole, optimizer))
        fine_tune(model, MeZO(epsilon=1e-3), **given)
    with pytest.raises(ValueError, match=r"method epsilon: 0\.001 -> 0\.01"):
        fine_tune(model, MeZO(epsilon=1e-2), **given)


# What does not.


def moved_model() -> None:
    shutil.move("model", "elsewhere")


def a_column_more() -> None:
    for path in Path("data").glob("*.csv"):
        path.write_text("".join(f"{i},{line}\n" for i, line in enumerate(path.read_text().splitlines())))


def a_comment() -> None:
    Path("moods.yaml").write_text("# how was it?\n" + Path("moods.yaml").read_text())


HARMLESS: dict[str, tuple[Callable[[], object], Callable[[], list[str]]]] = {
    "slash": (lambda: None, lambda: command(out="runs/a/")),
    "dot": (lambda: None, lambda: command(out="./runs/a", task="./moods.yaml", model="./model/")),
    "absolute": (lambda: None, lambda: command(out=os.path.abspath("runs/a"), model=os.path.abspath("model"))),
    "moved model": (moved_model, lambda: command(model="elsewhere")),
    "a column more": (a_column_more, command),
    "a comment": (a_comment, command),
    "shown": (lambda: None, lambda: command("--progress", "true", "--log_every", "3", "--checkpoint_every", "7")),
    "loop": (lambda: None, lambda: command("--loop", "lightning")),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_never_refuses_and_the_weights_are_those_of_the_uninterrupted_run(name, here):
    alter, again = HARMLESS[name]
    alter()
    assert main(again()) == 0
    assert weights("runs/a") == weights("runs/whole")


def test_a_run_may_be_told_to_go_on_for_longer_and_is_the_longer_run(here):
    longer = ("--steps", "6")
    assert main(command(*longer)) == 0
    assert main(command(*longer, out="runs/longer")) == 0
    assert json.loads(Path("runs/a/summary.json").read_text())["steps"] == 6
    parted = differences(Path("runs/a/steps.l2l"), Path("runs/longer/steps.l2l"))
    assert parted == ["config.steps: 4 / 6"], "the configuration of its beginning is all that tells them apart"
    assert weights("runs/a") == weights("runs/longer")


def test_not_where_its_steps_depend_on_the_end_nor_backwards_nor_once_it_has_ended(here, refusal):
    cosine, planned = ("--schedule", "cosine"), ("--method", "adamu")
    broken_off(*command(*cosine, out="runs/b"))
    line = refusal(*command(*cosine, "--steps", "6", out="runs/b"), out="runs/b")
    assert "runs/b holds another run: steps: 4 -> 6 (which the schedule cosine depends on). Choose another --out" in line
    broken_off(*command(*planned, out="runs/c"))
    assert "method horizon: 4 -> 6" in refusal(*command(*planned, "--steps", "6", out="runs/c"), out="runs/c")
    line = refusal(*command("--steps", "1"))
    assert "has gone past steps=1, to 2: give a larger steps, as the 4 that it began with, or choose another --out" in line
    assert main(command()) == main(command("--steps", "1", out="runs/other")) == 0
    line = refusal(*command("--steps", "6", out="runs/whole"), out="runs/whole")
    assert "finished, which leaves no checkpoint to go on from (steps: 4 -> 6)" in line


def test_a_field_that_matters_is_named_with_both_values(here, refusal):
    line = refusal(*command("--batch_size", "3", "--seed", "5"))
    assert "holds another run: batch_size: 2 -> 3; seed: 0 -> 5. Choose another --out, or give the earlier values" in line


# The record itself.


@pytest.mark.parametrize("damage", ["missing", "cut short", "flipped"])
def test_a_damaged_record_is_named_and_the_run_goes_on(damage, here, caplog):
    path = Path("runs/a/run.json")
    content = path.read_text()
    damaged = {
        "missing": "",
        "cut short": content[: len(content) // 2],
        "flipped": content.replace('"texts": "', '"texts": "0'),
    }
    path.write_text(damaged[damage])
    if damage == "missing":
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert main(command()) == 0
    assert "runs/a/run.json is missing or damaged" in caplog.text
    assert weights("runs/a") == weights("runs/whole")


def test_a_damaged_configuration_is_read_from_the_record(here):
    Path("runs/a/config.yaml").write_bytes(b"\xff\x00out")
    assert main(command()) == 0
    assert RunDirectory.recorded("runs/a") == yaml.safe_load(Path("runs/a/config.yaml").read_text())


def test_digests_see_order_and_last_bits_and_not_where_tensors_lie():
    from l2l.train.inputs import tensors_digest

    value = torch.arange(6.0).reshape(2, 3)
    assert tensors_digest([value]) == tensors_digest([value.clone()]) == tensors_digest([value.t().contiguous().t()])
    others = [value.flip(0), value.reshape(3, 2), value.double(), value + 1e-6, torch.zeros(2, 3)]
    assert len({tensors_digest([other]) for other in (value, *others)}) == 6
