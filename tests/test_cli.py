"""The command line: what works, and that bad input ends in one line, exit code 2, and nothing written."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.utils import logging

import l2l
from l2l.cli import COMMANDS, main
from l2l.models.shapes import tiny_random
from l2l.tuners.api import Tuner

TINY = shlex.split("--steps 2 --batch_size 2 --train_size 8 --dev_size 4 --test_size 4 --progress false")
META = shlex.split("--steps 2 --batch_size 2 --train_size 8 --dev_size 4 --validation_steps 1 --progress false")


@pytest.fixture(scope="module")
def tuner(tmp_path_factory) -> str:
    """A fresh tuner of the embedded model."""
    return str(Tuner.for_model(l2l.load_model("l2l/tiny")).save_pretrained(tmp_path_factory.mktemp("tuner")))


@pytest.fixture(autouse=True)
def without_bars():
    """No loading bars: what the program's environment does for it in a process of its own."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., str]:
    """Runs a command that must be refused; gives the one line it says."""

    def run(*arguments: str, code: int = 2) -> str:
        before = snapshot(tmp_path)
        assert main(arguments) == code
        assert snapshot(tmp_path) == before, "something was written"
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("l2l: ")
        return lines[0]

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def rows(folder: Path, task: str, train: str) -> str:
    """A data directory with these train lines and one validation line."""
    (folder / task).mkdir(parents=True)
    (folder / task / "train.jsonl").write_text(train)
    (folder / task / "validation.jsonl").write_text('{"sentence": "a fine film", "label": 1}\n')
    return str(folder)


@pytest.mark.parametrize("command", ["fine-tune", "evaluate"])
def test_an_unknown_task_is_named_and_a_near_one_suggested(command, refused, tmp_path):
    line = refused(command, "--task", "world_topik", "--out", str(tmp_path / "out"))
    assert "'world_topik'" in line
    assert "did you mean 'world_topic'?" in line


def test_an_unknown_task_of_a_pool_is_named(refused, tmp_path):
    line = refused("meta-train", "--tasks", "world_topic,world_jop", "--out", str(tmp_path / "out"))
    assert "'world_jop'" in line
    assert "'world_job'" in line


def test_a_missing_data_file_is_named_with_its_fields(refused, tmp_path):
    line = refused("fine-tune", "--task", "sst2", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"))
    assert str(tmp_path / "sst2" / "train.jsonl") in line
    assert "sentence, label" in line


@pytest.mark.parametrize("flag", ["--data-dir", "--data_dir"])
@pytest.mark.parametrize("bad", ['{"sentence": "dull"', '{"sentence": "dull"}', '{"sentence": "dull", "label": 7}', "[1]"])
def test_a_malformed_row_is_named_by_file_and_line(bad, flag, refused, tmp_path):
    data = rows(tmp_path / "data", "sst2", f'{{"sentence": "dull", "label": 0}}\n\n{bad}\n')
    line = refused("fine-tune", "--task", "sst2", flag, data, "--out", str(tmp_path / "out"))
    assert f"{Path(data) / 'sst2' / 'train.jsonl'}:3" in line


def test_a_tuner_of_another_model_is_refused_with_missing_and_extra_blocks(refused, tmp_path):
    other = Tuner.for_model(tiny_random("gpt2")).save_pretrained(tmp_path / "other")
    line = refused("fine-tune", "--method", "learned", "--tuner", str(other), "--out", str(tmp_path / "out"))
    assert "missing in the model: 'transformer.wte.weight'" in line
    assert "not in the tuner: 'model.embed_tokens.weight'" in line


@pytest.mark.parametrize("keep", [0, 40, -1])
def test_corrupted_safetensors_are_refused(keep, refused, tuner, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(tuner).iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[:keep] if path.suffix == ".safetensors" else content)
    line = refused("fine-tune", "--method", "learned", "--tuner", str(broken), "--out", str(tmp_path / "out"))
    assert str(broken / "tuner.safetensors") in line
    assert "not a readable safetensors file" in line


@pytest.mark.parametrize("command", ["fine-tune", "meta-train"])
@pytest.mark.parametrize("option", ["epsilon", "lr"])
@pytest.mark.parametrize("value", ["0.0", "-0.5", ".nan", ".inf"])
def test_epsilon_and_lr_must_be_positive_and_finite(command, option, value, refused, tmp_path):
    line = refused(command, f"--{option}={value}", "--out", str(tmp_path / "out"))
    assert f"{option}={yaml.safe_load(value):.1f} must be positive and finite" in line


@pytest.mark.parametrize("option", ["steps", "batch_size", "eval_every"])
def test_counts_must_be_positive(option, refused, tmp_path):
    assert f"{option}=0 must be a whole number" in refused("fine-tune", f"--{option}", "0", "--out", str(tmp_path / "out"))


def test_a_value_of_another_type_is_refused(refused, tmp_path):
    assert "steps='many' must be a whole number" in refused("fine-tune", "--steps", "many", "--out", str(tmp_path / "out"))


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    model = l2l.load_model("l2l/tiny").requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad") as error:
        l2l.fine_tune(model, steps=2, train_size=4, dev_size=4, test_size=4, out=str(tmp_path / "out"), progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def broken_model(tmp_path) -> str:
    model = l2l.load_model("l2l/tiny")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    l2l.load_tokenizer("l2l/tiny").save_pretrained(tmp_path / "broken")
    return str(tmp_path / "broken")


def test_a_loss_that_is_not_finite_at_step_0_is_refused(broken_model, refused, tmp_path):
    line = refused("fine-tune", "--model", broken_model, *TINY, "--out", str(tmp_path / "out"))
    assert "step 0" in line
    assert "the loss is nan" in line


def test_a_loss_that_is_not_finite_at_step_0_of_meta_training_is_refused(broken_model, refused, tmp_path):
    tasks = ["--tasks", "world_topic", "--validation_tasks", "world_season"]
    line = refused("meta-train", "--model", broken_model, *tasks, *META, "--out", str(tmp_path / "out"))
    assert "the loss is nan" in line


@pytest.fixture
def finished(tmp_path, capsys) -> Path:
    assert main(["fine-tune", *TINY, "--save", "log", "--out", str(tmp_path / "done")]) == 0
    capsys.readouterr()
    return tmp_path / "done"


def test_a_directory_that_holds_a_run_is_refused(finished, refused):
    same = ["fine-tune", *TINY, "--save", "log", "--out", str(finished)]
    assert "holds this run, finished" in refused(*same)
    assert "holds another run" in refused(*same, "--seed", "5")
    assert "holds another run" in refused("evaluate", "--out", str(finished))
    assert "holds another run" in refused("meta-train", "--out", str(finished))
    assert "--overwrite true" in refused("quickstart", "--out", str(finished))
    assert main([*same, "--seed", "5", "--overwrite", "true"]) == 0
    assert json.loads((finished / "summary.json").read_text())["seed"] == 5


@pytest.mark.parametrize(
    "command",
    [
        *(["fine-tune", *TINY], ["meta-train"], ["evaluate", "--rows", "4"], ["quickstart"], ["doctor"]),
        *(["bench", "--model", "opt-tiny-shape"], ["estimate", "--model", "opt-tiny-shape"], ["lr-probe"]),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_directory_with_foreign_files_is_refused_and_left_alone(command, overwrite, refused, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    line = refused(*command, "--out", str(tmp_path), "--overwrite", overwrite)
    assert str(tmp_path) in line
    assert "choose another --out" in line


def test_an_output_path_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is not a directory" in refused("fine-tune", "--out", str(tmp_path / "file"))


def test_unknown_words_are_refused(refused, tmp_path):
    assert "--stepz" in refused("fine-tune", "--stepz", "3", "--out", str(tmp_path / "out"))
    assert "'fine-tuen'" in refused("fine-tuen")
    assert "fine-tune" in refused()
    line = refused("fine-tune", "--method", "meso", "--out", str(tmp_path / "out"))
    assert "'meso'" in line
    assert "did you mean 'mezo'" in line
    method_args = ["--method_args", "{intervall: 3}", "--method", "dizo"]
    assert "'intervall'" in refused("fine-tune", *method_args, "--out", str(tmp_path / "out"))


def test_a_configuration_that_is_not_there_or_names_unknown_fields_is_refused(refused, tmp_path):
    assert "absent.yaml" in refused("fine-tune", "--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "odd.yaml").write_text("stepz: 3\n")
    assert "stepz" in refused("fine-tune", "--config", str(tmp_path / "odd.yaml"))


def test_the_learned_method_needs_a_tuner_and_the_others_take_none(refused, tuner, tmp_path):
    assert "needs a tuner" in refused("fine-tune", "--method", "learned", "--out", str(tmp_path / "out"))
    assert "takes no tuner" in refused("fine-tune", "--method", "mezo", "--tuner", tuner, "--out", str(tmp_path / "out"))
    line = refused("fine-tune", "--method", "learned", "--tuner", "no-such", "--out", str(tmp_path / "out"))
    assert "'no-such'" in line


@pytest.mark.parametrize("command", ["fine-tune", "evaluate"])
def test_an_unknown_model_directory_is_refused(command, refused, tmp_path):
    line = refused(command, "--model", str(tmp_path / "absent"), "--out", str(tmp_path / "out"))
    assert f"no directory {str(tmp_path / 'absent')!r}" in line


@pytest.mark.parametrize(
    ("command", "more"), [("fine-tune", ["--perturb", "in_place"]), ("meta-train", [])], ids=["fine-tune", "meta-train"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_refused_where_they_cannot_be_served(command, more, dtype, refused, tmp_path):
    line = refused(command, "--dtype", dtype, *more, "--out", str(tmp_path / "out"))
    assert dtype in line
    assert "float32" in line


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert main(["--debug", "fine-tune", "--task", "nothing", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "unknown task 'nothing'" in error


def test_an_error_of_the_program_itself_is_not_disguised_as_bad_input(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("l2l.train.trainer.fine_tune_command", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fine-tune", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("arguments", [[], *(path.split() for path in COMMANDS)], ids=" ".join)
def test_every_command_has_help(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert "usage: l2l" in said
    words = COMMANDS[" ".join(arguments)].positional if arguments else {path.split()[0] for path in COMMANDS}
    assert all(word in said for word in words)


@pytest.mark.parametrize("path", COMMANDS)
def test_the_targets_of_a_command_exist_and_take_its_configuration(path):
    _, module, config, run, positional = COMMANDS[path]
    kind, function = [pkgutil.resolve_name(f"l2l.{module}:{name}") if name else None for name in (config, run)]
    required = [name for name, one in inspect.signature(function).parameters.items() if one.default is one.empty]
    assert len(required) == (config is not None)
    assert set(positional) <= {field.name for field in dataclasses.fields(kind)} if kind else not positional


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert l2l.__version__ in capsys.readouterr().out


def print_config(capsys, *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.filterwarnings("default::FutureWarning")
@pytest.mark.parametrize("form", ["flags", "equals", "file"])
def test_old_names_of_options_and_values_still_work(form, capsys, tmp_path):
    old = {"walk": "exact", "control_every": "7", "lr": "auto", "beta": "0.2"}
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(old).replace("'", ""))
    flags = [word for name, value in old.items() for word in (f"--{name}", value)]
    equals = [f"--{name}={value}" for name, value in old.items()]
    arguments = {"flags": flags, "equals": equals, "file": ["--config", str(file)]}[form]
    with warnings.catch_warnings(record=True) as warned:
        found = print_config(capsys, "fine-tune", *arguments)
    wanted = {("walk", "perturb"), ("control_every", "curvature_every"), ("beta", "step_fraction")}
    assert {f"{old!r} is now called {new!r}" for old, new in wanted} <= {str(one.message) for one in warned}
    assert (found["perturb"], found["curvature_every"], found["step_fraction"]) == ("functional", 7, 0.2)


@pytest.mark.filterwarnings("default::FutureWarning")
def test_an_old_and_a_new_name_of_one_option_are_refused_together(refused, tmp_path):
    (tmp_path / "both.yaml").write_text("walk: exact\nperturb: functional\n")
    assert "'walk' is the old name of 'perturb'" in refused("fine-tune", "--config", str(tmp_path / "both.yaml"))


def test_a_switch_needs_no_value(capsys):
    for words in (["--compile"], ["--compile", "--lr", "auto"], ["--compile", "true"], ["--compile=true"]):
        assert print_config(capsys, "fine-tune", *words)["compile"] is True
    assert print_config(capsys, "fine-tune", "--compile", "false")["compile"] is False


def test_lists(capsys):
    assert main(["tasks", "list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("sst2@1", "squad@1", "world_topic@1"))
    assert main(["methods", "list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("mezo", "dizo", "learned"))


def test_an_estimate_is_printed_and_an_unknown_shape_refused(capsys, refused):
    assert main(["estimate", "--model", "opt-tiny-shape"]) == 0
    said = capsys.readouterr().out
    assert "peak_bytes" in said
    assert "seconds_per_step" in said
    assert "opt-9b-shape" in refused("estimate", "--model", "opt-9b-shape")


def test_a_tuner_is_shown(tuner, capsys):
    assert main(["tuners", "show", tuner]) == 0
    assert "# Tuner for " in capsys.readouterr().out


def test_evaluate_prints_and_leaves_a_summary(capsys, tmp_path):
    command = ["evaluate", "--rows", "8", "--progress", "false"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "accuracy" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["task"], summary["split"], summary["rows"]) == ("world_topic@1", "test", 8)
    assert 0 <= summary["accuracy"] <= 1
    assert main([*command, "--split", "dev"]) == 0


@pytest.mark.in_turn
def test_the_installed_program_warns_and_refuses_in_a_line_each_after_loading_a_model_too(tmp_path):
    other = Tuner.for_model(tiny_random("gpt2")).save_pretrained(tmp_path / "other")
    options = ["--method", "learned", "--tuner", str(other), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "l2l", "fine-tune", *options, "--walk", "in_place"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    renamed, refusal = done.stderr.splitlines()
    assert renamed == "l2l: 'walk' is now called 'perturb'"
    assert refusal.startswith("l2l: the tuner was made for 'GPT2LMHeadModel' and does not fit this model")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # the configurations of all commands are imported
def test_a_script_that_completes_commands_and_options_is_printed(capsys):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'l2l[completion]'")
    with pytest.raises(SystemExit) as leaving:
        main(["--print_completion", "shtab-bash"])
    assert leaving.value.code == 0
    script = capsys.readouterr().out
    assert [name for name in ("fine-tune", "report", "tuners", "--train_layers", "--examples") if name not in script] == []
