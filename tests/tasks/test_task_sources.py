"""Data sets and models by id, from the hub through ``datasets`` or from a cache without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_cache import add_snapshot, run_offline

from l2l import load_tokenizer
from l2l.tasks import get_task
from l2l.tasks.rows import load_rows

SST2 = get_task("sst2")
OLD, NEW = "a" * 40, "b" * 40
CARD = b"""---
configs:
- config_name: plain
  data_files:
  - split: train
    path: data/train.jsonl
  - split: validation
    path: data/test.jsonl
---
"""
ASK = """
import json, sys
from l2l import load_model, load_tokenizer
from l2l.tasks.base import Example, HubData, Task
from l2l.tasks.rows import load_rows

def rows(path, name=None, splits=("train", "validation"), revision=None, split="train"):
    task = Task("t", HubData(path, name, splits, revision), (), lambda row: Example(row["text"], (" a", " b")))
    return sorted(row["text"] for row in load_rows(task, split, None))

def model(name, revision=None):
    return [load_model(name, revision=revision).config.hidden_size, load_tokenizer(name, revision).eos_token]

answers = {}
for question in QUESTIONS:
    try:
        answers[question] = eval(question)
    except (FileNotFoundError, ValueError) as error:
        answers[question] = f"{type(error).__name__} {error}"
print(json.dumps(answers))
"""
"""Asks in a process of its own, because the libraries read where their cache is when they are first imported."""

QUESTIONS = (
    "rows('me/moods', 'plain')",
    "rows('me/moods', 'plain', split='validation')",
    "rows('me/moods', 'plain', revision='v1')",
    f"rows('me/moods', 'plain', revision={OLD!r})",
    f"rows('me/moods', 'plain', revision={NEW!r})",
    "rows('me/script')",
    "rows('me/none')",
    "rows('me/moods', 'plain', revision='v2')",
    "rows('me/alone')",
    "rows('me/moods', 'fancy')",
    "rows('me/moods', 'plain', ('train', 'dev'), split='validation')",
    "rows('me/kept', 'plain')",
    f"rows('me/kept', 'plain', revision={NEW!r})",
    f"rows('me/kept', 'plain', revision={OLD!r})",
    "model('me/small')",
    "model('me/small', 'v1')",
    f"model('me/small', {OLD!r})",
    "model('me/small', 'v2')",
    "model('me/no')",
)


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def ask(home: Path, questions: tuple[str, ...], **environment: str) -> dict[str, object]:
    return json.loads(run_offline(home, f"QUESTIONS = {questions!r}\n{ASK}", **environment))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A cache with two commits of a data set, of which the older has a tag, and an old one that is a script."""
    import pyarrow
    import pyarrow.parquet

    home = tmp_path_factory.mktemp("home")
    hub = home / "hub"
    old = {"README.md": CARD, "data/train.jsonl": jsonl("old"), "data/test.jsonl": jsonl("old test")}
    new = {"README.md": CARD, "data/train.jsonl": jsonl("new"), "data/test.jsonl": jsonl("new test")}
    add_snapshot(hub, "datasets", "me/moods", OLD, old, ("v1",))
    add_snapshot(hub, "datasets", "me/moods", NEW, new, ("main",))
    trap = f"open({str(home / 'trap')!r}, 'w').write('run')".encode()
    add_snapshot(hub, "datasets", "me/script", OLD, {"script.py": trap, "README.md": b"# old kind\n"}, ("main",))
    file = home / "copy.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["from the copy"]}), file)
    copy = {"default/train/0000.parquet": file.read_bytes()}
    add_snapshot(hub, "datasets", "me/script", NEW, copy, ("refs/convert/parquet",))
    add_snapshot(hub, "datasets", "me/alone", NEW, {"alone.py": trap, "data.jsonl": jsonl("beside")}, ("main",))
    _keep_in_datasets_own_cache(home)
    _add_models(home)
    return home


def _keep_in_datasets_own_cache(home: Path) -> None:
    """Rows of the commit ``NEW`` of ``me/kept``, as ``datasets`` leaves them."""
    from datasets import Dataset, DatasetInfo

    kept = home / "datasets" / "me___kept" / "plain" / "0.0.0" / NEW
    kept.mkdir(parents=True)
    Dataset.from_list([{"text": "kept"}]).save_to_disk(home / "saved")
    next((home / "saved").glob("*.arrow")).rename(kept / "kept-train.arrow")
    info = {"builder_name": "json", "dataset_name": "kept", "config_name": "plain", "version": "0.0.0"}
    splits = {"splits": {"train": {"name": "train", "num_examples": 1, "dataset_name": "kept"}}}
    DatasetInfo.from_dict(info | splits).write_to_directory(str(kept))


def _add_models(home: Path) -> None:
    """Two commits of ``me/small``, of widths 8 and 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for commit, size, ref in ((OLD, 8, "v1"), (NEW, 16, "main")):
        folder = home / commit
        config = LlamaConfig(vocab_size=2810, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        LlamaForCausalLM(config).save_pretrained(folder)
        load_tokenizer("l2l/tiny").save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        add_snapshot(home / "hub", "models", "me/small", commit, files, (ref,))


@pytest.fixture(scope="module")
def answer(home) -> Callable[[str], object]:
    """The answer to one of `QUESTIONS` where ``HF_HUB_OFFLINE`` is set."""
    return ask(home, QUESTIONS).__getitem__


def test_data_sets_are_found_by_id_config_split_and_revision(home, answer):
    found = [answer(question) for question in QUESTIONS[:6]]
    assert found == [["new"], ["new test"], ["old"], ["old"], ["new"], ["from the copy"]]
    assert not (home / "trap").exists()


def test_what_is_not_in_the_cache_is_named_with_the_command_that_fetches_it(home, answer):
    absent, pinned, script, config, split = (str(answer(question)) for question in QUESTIONS[6:11])
    into = f"where there is a network, which puts it into {home / 'hub'}, or give a data directory"
    assert absent.startswith("FileNotFoundError data set 'me/none', split 'train' is neither in the local cache nor")
    assert f"run `hf download me/none --repo-type dataset` {into}" in absent
    assert "data set 'me/moods' at revision 'v2', config 'plain', split 'train'" in pinned
    assert f"run `hf download me/moods --repo-type dataset --revision v2` {into}" in pinned
    assert script.startswith("FileNotFoundError data set 'me/alone'") and not (home / "trap").exists()
    assert config.startswith("ValueError data set 'me/moods', config 'fancy', split 'train': BuilderConfig 'fancy' not")
    assert split.startswith("ValueError data set 'me/moods', config 'plain', split 'dev': Unknown split")


@pytest.mark.slow  # a process of its own, which imports all libraries
def test_datasets_own_switch_is_respected_too(home):
    found = ask(home, ("rows('me/moods', 'plain')", "rows('me/none')"), HF_DATASETS_OFFLINE="1")
    assert found["rows('me/moods', 'plain')"] == ["new"]
    assert str(found["rows('me/none')"]).startswith("FileNotFoundError data set 'me/none'")


def test_rows_that_datasets_kept_of_another_commit_do_not_pass_for_the_pinned_one(answer):
    assert answer("rows('me/kept', 'plain')") == answer(f"rows('me/kept', 'plain', revision={NEW!r})") == ["kept"]
    other = str(answer(f"rows('me/kept', 'plain', revision={OLD!r})"))
    assert f"holds commit {NEW}, not revision '{OLD}'; run `hf download" in other


def test_a_model_and_its_tokenizer_are_found_by_id_and_revision(answer):
    assert [answer(question)[0] for question in QUESTIONS[14:17]] == [16, 8, 8]  # pyright: ignore
    assert "model 'me/small' at revision 'v2' is neither in the local cache nor can it be fetched" in str(
        answer("model('me/small', 'v2')")
    )
    absent = str(answer("model('me/no')"))
    assert absent.startswith("FileNotFoundError model 'me/no'") and "run `hf download me/no" in absent


def test_rows_of_the_hub_are_read_with_datasets(monkeypatch):
    import datasets

    asked = []

    def fake(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"sentence": f"film {number}", "label": number % 2} for number in range(8)])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = load_rows(SST2, "validation", None, 3, seed=0)
    assert asked == [("stanfordnlp/sst2", None, "validation")]
    assert len(rows) == 3
    assert set(rows[0]) == {"sentence", "label"}


def test_a_script_data_set_is_read_from_the_hubs_parquet_copy(monkeypatch):
    import datasets

    def fake(path, name=None, split=None, data_files=None):
        if data_files is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found trec.py")
        assert data_files == {"test": "hf://datasets/CogComp/trec@refs%2Fconvert%2Fparquet/default/test/*.parquet"}
        return datasets.Dataset.from_list([{"text": "Who ?", "coarse_label": 3}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_rows(get_task("trec"), "validation", None) == [{"text": "Who ?", "coarse_label": 3}]


def hub_snli(monkeypatch, labels: list[int]) -> list[int]:
    """Labels of the rows that come from a hub whose SNLI has these labels, one row each."""
    import datasets

    rows = [{"premise": f"p {number}", "hypothesis": "h", "label": label} for number, label in enumerate(labels)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    return [row["label"] for row in load_rows(get_task("snli"), "validation", None, 4)]


def test_rows_of_snli_without_an_agreed_label_are_dropped_before_the_sample_is_drawn(monkeypatch):
    labelled = [0, 1, 2, 0, 1]
    assert hub_snli(monkeypatch, [-1, 0, -1, 1, 2, 0, -1, 1, -1]) == hub_snli(monkeypatch, labelled)
    assert len(hub_snli(monkeypatch, labelled)) == 4


def test_any_other_wrong_label_of_snli_is_still_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"stanfordnlp/snli validation row \d: .*'label' must be .* not -2"):
        hub_snli(monkeypatch, [0, -1, -2])


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("mnli", ("nyu-mll/glue", "mnli", "validation_matched")),
        ("wsc", ("aps/super_glue", "wsc.fixed", "validation")),
        ("wic", ("aps/super_glue", "wic", "validation")),
        ("multirc", ("aps/super_glue", "multirc", "validation")),
        ("snli", ("stanfordnlp/snli", None, "validation")),
    ],
)
def test_a_task_asks_the_hub_for_its_own_validation_split(monkeypatch, name, asked):
    import datasets

    def fake(path, config, split):
        raise ConnectionError(f"asked for {(path, config, split)}")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(FileNotFoundError) as caught:
        load_rows(get_task(name), "validation", None)
    assert str(asked) in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionError("no route"), FileNotFoundError("no such repository\nlong tale")])
def test_an_unreachable_hub_gives_one_line_that_says_what_to_do(monkeypatch, error):
    import datasets

    def fake(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(FileNotFoundError, match=r"'aps/super_glue', config 'rte'.*give a data directory") as caught:
        load_rows(get_task("rte"), "train", None)
    assert "\n" not in str(caught.value)


def test_a_row_of_the_hub_that_does_not_render_is_named(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"sentence": "x", "label": -1}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(ValueError, match=r"stanfordnlp/sst2 train row 0: .*'label'"):
        load_rows(SST2, "train", None)
