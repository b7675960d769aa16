"""Kind A8: arguments are typed for the command line only. Python calls take what Python people pass, and record it plainly.

Tried because others met them: hiyouga/LlamaFactory #4014 (``2e-5`` of a YAML file is text), huggingface/transformers #18860
(a number that is a tensor cannot be written as JSON), MDIL-SNU/SIMPLE-NN #14 (a configuration that YAML cannot dump, because a
value in it has become a tensor).
"""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cases import Quadratic

import l2l
from l2l import arguments, cli
from l2l.cli import COMMANDS, main
from l2l.experiments.spec import CompareConfig
from l2l.meta.config import MetaTrainConfig
from l2l.train.config import FineTuneConfig


class Scheme(Enum):
    LORA = "lora"


class Name(str):
    def __str__(self) -> str:
        return "never"


PASSED: list[tuple[str, Any, Any]] = [
    *[("lr", kind(0.5), 0.5) for kind in (np.float32, np.float64, torch.tensor, str)],
    *[("lr", 1, 1.0), ("lr", "auto", "auto"), ("lr", np.str_("auto"), "auto"), ("lr", "2e-5", 2e-5)],
    *[("steps", kind(5), 5) for kind in (np.int64, np.int32, np.uint8, torch.tensor, str)],
    *[("overwrite", np.bool_(False), False), ("overwrite", torch.tensor(False), False)],
    *[("out", Path("runs/x"), "runs/x"), ("model", Path("models/x"), "models/x"), ("data_dir", Path("data"), "data")],
    *[("dtype", torch.bfloat16, "bfloat16"), ("device", torch.device("cuda", 1), "cuda:1")],
    *[("train_layers", layers, [1, 2]) for layers in ((1, 2), np.array([1, 2]), range(1, 3), {1, 2})],
    *[("scheme", Scheme.LORA, "lora"), ("task", Name("sst2"), "sst2"), ("max_seconds", 3, 3.0)],
    *[("method_args", {"interval": np.int64(3), "inner": (np.float64(0.5),)}, {"interval": 3, "inner": [0.5]})],
]


@pytest.mark.parametrize(("name", "given", "plain"), PASSED, ids=lambda value: repr(value)[:30])
def test_what_python_people_pass_is_what_a_command_line_says(name: str, given: Any, plain: Any):
    found = getattr(FineTuneConfig(**{name: given}), name)
    assert found == plain and type(found) is type(plain)


def test_a_configuration_made_of_them_is_plain_yaml_and_is_read_back():
    made = [
        FineTuneConfig(**{name: given for name, given, _ in PASSED}),
        MetaTrainConfig(tasks=("rte", "boolq"), lr=np.float32(1e-4), validation_lrs=np.array([0.1, 0.2]), out=Path("x")),
        CompareConfig(methods=("mezo", "dizo"), grid=(np.float64(1e-3), 1), seeds=np.int64(1), out=Path("y"), root=Path(".")),
    ]
    for config in made:
        assert type(config)(**yaml.safe_load(yaml.safe_dump(asdict(config)))) == config


WRONG = [("steps", "abc"), ("steps", "2e3"), ("lr", "abc"), ("match", "any"), ("overwrite", "maybe"), ("loop", "ring")]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_one_gives_the_line_that_the_command_line_gives(name, value, capsys, tmp_path):
    with pytest.raises(ValueError) as error:
        FineTuneConfig(**{name: value})
    assert main(["fine-tune", f"--{name}={value}", f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err == f"l2l: {error.value}\n"
    assert str(error.value).startswith(f"{name}={value!r} must be ")


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 2.5), ("steps", True), ("lr", [1]), ("out", 3), ("method_args", 3), ("train_layers", {1: 2})]
)
def test_wrong_types_are_named_with_value_and_rule(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* must be "):
        FineTuneConfig(**{name: value})


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if command.config])
def test_every_configuration_of_a_command_converts_at_one_place(command):
    assert issubclass(cli._imported(COMMANDS[command], COMMANDS[command].config), arguments.Arguments)


def test_optimizers_and_methods_take_numpy_numbers_and_tensors():
    plain, given = Quadratic(), Quadratic()
    one = l2l.MeZO(plain, lr=0.5, epsilon=0.25, seed=3, weight_decay=0.5, num_directions=2)
    numbers = {"lr": torch.tensor(0.5), "epsilon": np.float32(0.25), "seed": np.int64(3), "weight_decay": np.float64(0.5)}
    two = l2l.MeZO(given, **numbers, num_directions=np.int32(2))
    assert one.step(plain) == two.step(given)
    assert torch.equal(plain.matrix, given.matrix)
    assert two.state_dict()["param_groups"][0]["lr"] == 0.5
    torch.save(two.state_dict(), Path("/dev/null"))


def test_a_run_from_python_objects_is_recorded_plainly(tmp_path):
    options: dict[str, Any] = {"steps": np.int64(2), "batch_size": np.int64(2), "train_size": 8, "dev_size": 4, "test_size": 4}
    result = l2l.fine_tune(
        "l2l/tiny", lr=np.float32(1e-3), dtype=torch.float32, device=torch.device("cpu"), out=tmp_path / "run", **options,
        progress=np.bool_(False), save="log", method_args={},
    )  # fmt: skip
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (recorded["dtype"], recorded["device"], recorded["steps"]) == ("float32", "cpu", 2)
    assert recorded["lr"] == float(np.float32(1e-3))
    assert result.summary["steps"] == 2


def test_models_and_tuners_are_loaded_by_path_and_dtype(tmp_path):
    model = l2l.load_model("l2l/tiny", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    tuner = l2l.Tuner.for_model(l2l.load_model("l2l/tiny"), "shared_mlp", seed=np.int64(1), hidden=np.int64(8))
    saved = tuner.save_pretrained(tmp_path / "tuner")
    assert l2l.Tuner.from_pretrained(saved).architecture_args["hidden"] == 8
    model.save_pretrained(tmp_path / "model")
    l2l.load_tokenizer("l2l/tiny").save_pretrained(tmp_path / "model")
    small: dict[str, Any] = {"steps": 1, "batch_size": 2, "train_size": 8, "dev_size": 4, "test_size": 4, "progress": False}
    run = l2l.fine_tune(tmp_path / "model", tuner=saved, method="learned", match="kind", out=tmp_path / "run", **small)
    assert run.summary["config"]["model"] == str(tmp_path / "model")
