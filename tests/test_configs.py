"""Every configuration in ``configs``: it parses, says only what differs from the defaults, and runs."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from daily import daily_slice

from l2l.cli import main
from l2l.experiments.presets.quickstart import RECIPE
from l2l.meta.config import MetaTrainConfig
from l2l.models.load import load_tokenizer
from l2l.models.shapes import tiny_random
from l2l.train.config import FineTuneConfig
from l2l.tuners.api import Tuner

pytestmark = pytest.mark.in_turn

ROOT = Path(__file__).parent.parent
COMMANDS = {"fine_tune": ("fine-tune", FineTuneConfig), "meta_train": ("meta-train", MetaTrainConfig)}
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name in COMMANDS)
FAMILIES = {"opt-125m": "opt", "opt-1.3b": "opt", "llama-3.2-1b": "llama", "qwen2.5-0.5b": "qwen2"}
NAMES = {"l2l-tiny", *FAMILIES}

SMALL = "--steps 3 --batch_size 4 --train_size 16 --dev_size 8 --checkpoint_every 2 --log_every 1 --progress false"
SMALL_BY_KIND = {
    "fine_tune": "--task world_topic --test_size 8 --eval_every 2",
    "meta_train": "--tasks world_topic,world_job --validation_tasks world_season --validate_every 2"
    " --validation_steps 1 --restart_every 2",
}


def identity(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def given(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``--print_config`` prints."""
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--print_config"])
    assert leaving.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("kind", COMMANDS)
def test_there_is_a_configuration_for_the_embedded_model_and_four_of_the_hub(kind: str):
    assert {path.stem for path in CONFIGS if path.parent.name == kind} >= NAMES


@pytest.mark.parametrize("path", CONFIGS, ids=identity)
def test_a_configuration_begins_with_the_command_that_runs_it(path: Path, capsys):
    lines = path.read_text().splitlines()
    assert len(lines) <= 18
    program, command, flag, config, *rest = shlex.split(lines[0].removeprefix("# "))
    assert (program, command, flag) == ("l2l", COMMANDS[path.parent.name][0], "--config")
    assert config == path.relative_to(ROOT).as_posix()
    assert printed([command, flag, str(path), *rest], capsys)["out"] == rest[rest.index("--out") + 1]


@pytest.mark.parametrize("path", CONFIGS, ids=identity)
def test_the_command_line_reads_a_configuration_as_it_stands(path: Path, capsys):
    command, _ = COMMANDS[path.parent.name]
    parsed = printed([command, "--config", str(path)], capsys)
    assert {name: parsed[name] for name in given(path)} == given(path)


@pytest.mark.parametrize("path", CONFIGS, ids=identity)
def test_a_configuration_states_only_what_differs_from_the_defaults(path: Path):
    _, kind = COMMANDS[path.parent.name]
    defaults = {field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)}
    assert [name for name, value in given(path).items() if defaults[name] == value] == []


def test_the_configuration_of_the_embedded_tuner_is_the_recipe_of_the_quickstart():
    recipe = yaml.safe_load(RECIPE.read_text())["meta"]
    config = dataclasses.asdict(MetaTrainConfig(**given(ROOT / "configs/meta_train/l2l-tiny.yaml")))
    assert {name: config[name] for name in recipe} == recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A tiny random model per family, with the embedded tokenizer, as directories."""
    tokenizer = load_tokenizer("l2l/tiny")
    found = {"l2l-tiny": "l2l/tiny"}
    for name, family in (FAMILIES | {"stories260K": "llama", "bitnet-tinystories-1M": "llama"}).items():
        folder = tmp_path_factory.mktemp(name)
        tiny_random(family, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.mark.parametrize("path", daily_slice(CONFIGS, 5, name=identity))
def test_a_configuration_runs_for_three_steps_on_a_tiny_model_of_its_family(path: Path, models, tmp_path):
    command, _ = COMMANDS[path.parent.name]
    small = f"{SMALL} {SMALL_BY_KIND[path.parent.name]}".split()
    out = tmp_path / "out"
    model = models[max((name for name in models if path.stem.startswith(name)), key=len)]
    code = main([command, "--config", str(path), "--model", model, "--out", str(out), *small])
    assert code == 0
    assert {"config.yaml", "metrics.csv", "summary.json"} <= {entry.name for entry in out.iterdir()}
    if path.parent.name == "meta_train":
        assert Tuner.from_pretrained(out).provenance.base_model in (Path(model).name, "l2l/tiny")
