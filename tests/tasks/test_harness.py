"""Task files of lm-evaluation-harness: prompts, options, scores, refusals; and the scores of the harness itself, row by row."""

from __future__ import annotations

import json
import logging
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import harness_table
import numpy as np
import pytest
import torch
import yaml

from l2l import fine_tune
from l2l.models.load import load_model, load_tokenizer
from l2l.tasks import get_task
from l2l.tasks.base import Example, FileData, HubData, Scoring
from l2l.tasks.evaluate import evaluate, generate
from l2l.tasks.harness import FIELDS, METRICS, is_harness
from l2l.tasks.metrics import best_option, exact_matches, option_metrics
from l2l.tasks.rows import load_rows
from l2l.train.evaluate import EvaluateConfig, run_evaluation

CHOICE: dict[str, Any] = {
    "task": "mood",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
    "training_split": "train",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ text }}\nThe mood is",
    "doc_to_choice": ["bad", "good"],
    "doc_to_target": "label",
}
ANSWER = {**CHOICE, "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{ ['bad', 'good'][label] }}"}
TEXT = {**ANSWER, "output_type": "loglikelihood", "doc_to_target": " {{ text[:3] }}"}
OWN = {"task": "mine", "doc_to_text": "text", "doc_to_choice": ["a", "b"], "doc_to_target": "label"}
ROWS = [{"text": f"lily {'lost' if n % 2 else 'found'} ball number {n} .", "label": n % 2, "other": "why"} for n in range(24)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train", ROWS[:16]), ("test", ROWS[16:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def written(fields: dict[str, Any], name: str = "mood.yaml", **changes: Any) -> str:
    Path(name).write_text(yaml.safe_dump({key: value for key, value in {**fields, **changes}.items() if value is not None}))
    return name


def example(fields: dict[str, Any], row: dict[str, Any] = ROWS[0], **changes: Any) -> Example:
    return get_task(written(fields, **changes)).example(row)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (CHOICE, True),
        ({"output_type": "multiple_choice", "dataset_path": "me/data"}, True),
        ({"include": "other.yaml"}, True),
        (OWN | {"dataset_path": "me/data"}, False),
        (OWN | {"dataset_path": "me/data", "num_fewshot": 0}, True),
        (CHOICE | {"data_files": "all.csv"}, False),
        (CHOICE | {"form": "lm"}, False),
    ],
)
def test_a_file_is_known_by_its_fields(fields, expected):
    assert is_harness(fields) is expected


def test_a_file_of_each_kind_is_read_by_its_reader(folder):
    assert get_task(written(CHOICE)).scoring == Scoring(("acc", "acc_norm"))
    assert get_task(written(OWN, data_files={"train": "train.jsonl", "validation": "test.jsonl"})).scoring is None


def test_options_rows_and_name_are_those_of_the_file(folder):
    task = get_task(
        written(
            CHOICE, metadata={"version": 2.0}, dataset_kwargs={"data_files": {"train": "train.jsonl", "test": ["test.jsonl"]}}
        )
    )
    assert task.label == "mood@2"
    assert task.source == FileData((Path("train.jsonl"),), (Path("test.jsonl"),))
    prompt = "lily found ball number 0 .\nThe mood is"
    assert task.example(ROWS[0]) == Example(prompt, (" bad", " good"), (0,), choices=("bad", "good"))
    hub = get_task(written(CHOICE, dataset_path="me/moods", dataset_name="plain", dataset_kwargs={"revision": "v2"}))
    assert hub.source == HubData("me/moods", "plain", ("train", "test"), "v2")


def test_a_name_of_the_package_s_own_tasks_is_set_apart(folder):
    assert get_task(written(CHOICE, task="sst2")).label == "harness_sst2@1"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"doc_to_choice": {"a": "bad", "b": "good"}}, Example("lily", (" bad", " good"), (1,), choices=("bad", "good"))),
        ({"doc_to_choice": "all"}, Example("lily", (" no", " 1"), (1,), choices=("no", "1"))),
        ({"doc_to_choice": "{{ [word, 'x'] }}"}, Example("lily", (" 1", " x"), (1,), choices=("1", "x"))),
        # Digits that a template prints are an index; of a column, a text is that choice, as the harness has it.
        ({"doc_to_choice": "all", "doc_to_target": "{{ 0 }}"}, Example("lily", (" no", " 1"), (0,), choices=("no", "1"))),
        ({"doc_to_choice": "all", "doc_to_target": "word"}, Example("lily", (" no", " 1"), (1,), choices=("no", "1"))),
        ({"doc_to_target": "{{ [0, 1] }}"}, Example("lily", (" bad", " good"), (0, 1), choices=("bad", "good"))),
        ({"doc_to_target": "good", "target_delimiter": ""}, None),
        (
            {"description": "Moods of {{ text }}: "},
            Example("Moods of lily: lily", (" bad", " good"), (1,), choices=("bad", "good")),
        ),
        (
            {"doc_to_text": "{{ text | regex_replace('l+', 'L') }}"},
            Example("LiLy", (" bad", " good"), (1,), choices=("bad", "good")),
        ),
    ],
)
def test_fields_are_read_as_the_harness_reads_them(folder, changes, expected):
    row = {"text": "lily", "label": 1, "word": "1", "all": ["no", "1"]}
    Path("train.jsonl").write_text(json.dumps(row))
    Path("test.jsonl").write_text(json.dumps(row))
    if expected is None:  # a bare word that is no column is taken for a misspelt one
        with pytest.raises(ValueError, match="field 'doc_to_target': there is no column 'good'; the rows have text, label"):
            example(CHOICE, row, **changes)
        return
    assert example(CHOICE, row, **({"doc_to_text": "text"} | changes)) == expected


def test_a_text_to_predict_has_no_delimiter_and_an_answer_ends_as_it_will_be_cut(folder):
    assert example(TEXT).options == (" lil",)
    answer = example(ANSWER, generation_kwargs={"until": ["\n", "."], "max_gen_toks": 5})
    assert (answer.options, answer.answers) == ((" bad\n",), ("bad",))
    task = get_task("mood.yaml")
    assert (task.form, task.metric, task.generates, task.new_tokens(50)) == ("lm", "exact_match", True, 5)
    plain = get_task(written(ANSWER)).scoring
    assert plain is not None and (plain.until, plain.max_new_tokens) == (("\n\n",), 256)


def test_solved_rows_come_first_and_never_the_row_itself(folder):
    shots = {"num_fewshot": 2, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}, "description": "Moods.\n"}
    shown = ["lily found ball number 0 .\nThe mood is bad\n\n", "lily lost ball number 1 .\nThe mood is good\n\n"]
    third = "lily found ball number 2 .\nThe mood is bad\n\n"
    assert example(CHOICE, ROWS[20], **shots).prompt == "Moods.\n" + "".join(shown) + "lily found ball number 20 .\nThe mood is"
    assert example(CHOICE, ROWS[0], **shots).prompt == "Moods.\n" + shown[1] + third + "lily found ball number 0 .\nThe mood is"
    given = {"sampler": "first_n", "samples": [{"text": "a", "label": 1}, {"text": "b", "label": 0}], "fewshot_delimiter": "|"}
    found = example(CHOICE, ROWS[0], num_fewshot=2, training_split=None, fewshot_config=given)
    assert found.prompt.startswith("a\nThe mood is good|b\nThe mood is bad|lily found")
    with pytest.raises(ValueError, match="3 solved rows were asked for, and 2 others are there; lower num_fewshot"):
        example(CHOICE, ROWS[0], num_fewshot=3, training_split=None, fewshot_config=given)


def test_included_fields_hold_where_the_file_has_none(folder):
    Path("base").mkdir()
    written(CHOICE, "base/common.yaml", task="common", doc_to_choice=["sad", "happy"])
    found = get_task(written({"include": "base/common.yaml", "task": "two", "target_delimiter": "-"}))
    assert (found.name, found.example(ROWS[0]).options) == ("two", ("-sad", "-happy"))
    written({"include": "mood.yaml"}, "base.yaml")
    with pytest.raises(ValueError, match=r"field 'include': 'mood\.yaml' includes this file again"):
        get_task(written({"include": "base.yaml"}))


REFUSED: dict[str, Any] = {
    "group": "moods",
    "group_alias": "moods",
    "aggregate_metric_list": [{"metric": "acc"}],
    "class": "tasks.Mine",
    "custom_dataset": "tasks.rows",
    "doc_to_image": "image",
    "doc_to_audio": "audio",
    "gen_prefix": "It is",
    "fewshot_config": [{"fewshot_indices": [1]}, {"process_docs": "x"}, {"gen_prefix": "x"}],
    "metric_list": [[{"metric": "acc", "hf_evaluate": True}]],
    "filter_list": [[{"name": "first"}]],
    "process_docs": "x",
    "process_results": "x",
    "use_prompt": "promptsource:*",
    "unsafe_code": True,
}


def refusals() -> list[tuple[str, Any]]:
    return [(name, one) for name, value in REFUSED.items() for one in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize(("name", "value"), refusals(), ids=str)
def test_a_refused_field_is_named_with_the_reason_and_is_fine_when_empty(folder, name, value):
    with pytest.raises(ValueError, match=rf"mood\.yaml: field '{name}[.\w]*' is refused: .{{20,}}[;,] ") as caught:
        get_task(written(CHOICE, **{name: value}))
    assert FIELDS[str(caught.value).split("'")[1]].what in str(caught.value)
    if name not in ("fewshot_config", "metric_list"):
        get_task(written(CHOICE, **{name: False}))


def test_every_field_that_is_refused_has_a_case():
    inner = {f"{name}.{key}" for name, one in refusals() if name == "fewshot_config" for key in one}
    inner |= {"metric_list.hf_evaluate"}
    assert {name for name, field in FIELDS.items() if field.status == "refused"} == {*REFUSED, *inner} - {
        "fewshot_config",
        "metric_list",
    }


WRONG: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"doc_to_txt": "x"}, "field 'doc_to_txt' is unknown; did you mean 'doc_to_text'?", {"doc_to_text": "x {{ text }}"}),
    ({"test_spilt": "x"}, "field 'test_spilt' is unknown; did you mean 'test_split'?", {}),
    ({"generation_kwargs": {"untl": "x"}}, "field 'generation_kwargs.untl' is unknown; did you mean", {}),
    (
        {"metric_list": ["acc"]},
        "field 'metric_list': 'acc' has another form; write it as",
        {"metric_list": [{"metric": "acc"}]},
    ),
    (
        {"metric_list": [{"metric": "bleu"}]},
        "metric 'bleu' is not computed of output_type multiple_choice; list one of acc",
        {},
    ),
    (
        {"metric_list": [{"metric": "acc", "aggregation": "median"}]},
        "aggregation 'median' of acc is not computed; write mean",
        {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]},
    ),
    ({"output_type": "loglikelihood_rolling"}, "field 'output_type': 'loglikelihood_rolling' is not supported here", {}),
    ({"task": ["a", "b"]}, "field 'task': a list of tasks is a group", {"task": "a"}),
    ({"num_fewshot": 2}, "field 'fewshot_config.sampler': 'default' draws other solved rows", {"num_fewshot": 0}),
    ({"repeats": 3}, "field 'repeats': 3: the likeliest answer is the same each time", {"repeats": 1}),
    ({"doc_to_text": "{{ txt }}"}, "field 'doc_to_text': there is no column 'txt'; the rows have text, label, other; did", {}),
    (
        {"doc_to_target": 2},
        "field 'doc_to_target': 2 is the index of no choice; the 2 choices count from 0 to 1",
        {"doc_to_target": 1},
    ),
    ({"doc_to_choice": [True, False]}, "field 'doc_to_choice': the choice True is no text; YAML reads yes, no", {}),
    ({"doc_to_choice": None}, "field 'doc_to_choice' is missing; list the choices", {}),
    ({"test_split": "dev"}, "field 'dataset_kwargs.data_files': has no split 'dev' but test, train", {"test_split": "train"}),
    ({"dataset_kwargs": {"data_files": "https://x/y.json"}}, "'https://x/y.json' is an address; download the file", {}),
    ({"dataset_kwargs": {"data_dir": "x"}}, "field 'dataset_kwargs.data_dir' is unknown; did you mean", {}),
    (
        {"dataset_path": None},
        "field 'dataset_path': None names no data; write a name of the hub",
        {"dataset_path": "me/moods", "dataset_kwargs": None},
    ),
    (
        {"metadata": {"version": "one"}},
        "field 'metadata': the version is 'one'; write a number",
        {"metadata": {"version": 1.5}},
    ),
]


@pytest.mark.parametrize(("change", "message", "mended"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_one_line_with_the_way_out(folder, change, message, mended):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        get_task(written(CHOICE, **change))
    assert message in str(caught.value) and "mood.yaml" in str(caught.value) and "\n" not in str(caught.value)
    get_task(written(CHOICE, **mended))


def test_code_is_refused_by_line_and_field_and_never_run(folder):
    Path("utils.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef text(row): return 'x'\n")
    text = yaml.safe_dump(CHOICE | {"test_split": "test"}).replace(
        "doc_to_text:", "process_docs: !function utils.text\ndoc_to_text:"
    )
    Path("mood.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=r"the tag '!function' of field 'process_docs' asks for code.* into the rows of a file"
    ):
        get_task("mood.yaml")
    assert not Path("ran").exists()
    with pytest.raises(ValueError, match="access to attribute '__class__' of 'str' object is unsafe"):
        example(CHOICE, doc_to_text="{{ text.__class__.__mro__ }}")


def test_sampling_and_inputs_that_differ_by_choice_are_refused(folder):
    with pytest.raises(ValueError, match="draws answers at random, and here they are the likeliest; write do_sample: false"):
        get_task(written(ANSWER, generation_kwargs={"do_sample": True, "temperature": 0.7}))
    get_task(written(ANSWER, generation_kwargs={"do_sample": False, "temperature": 0.7}))
    with pytest.raises(ValueError, match="field 'doc_to_text': the prompt '0' is a number, which the harness takes for inputs"):
        example(CHOICE, doc_to_text="{{ label }}")
    with pytest.raises(ValueError, match="field 'doc_to_target': -1 is the index of no choice"):
        example(CHOICE, ROWS[0] | {"label": -1})


def test_fields_without_effect_are_named_in_one_line_once(folder, caplog):
    path = written(CHOICE, tag="moods", task_alias="Mood", should_decontaminate=True)
    with caplog.at_level(logging.WARNING, "l2l.tasks.harness"):
        get_task(path), get_task(path)
    named = (
        "mood.yaml: without effect here: should_decontaminate (nothing is decontaminated), tag (tasks are named one by one), "
    )
    assert [record.message.startswith(named) for record in caplog.records] == [True]


def test_options_are_chosen_by_sum_by_characters_and_by_bytes():
    sums, choices = [-4.0, -5.0, -6.5], ["ab", "abcd", "éééé"]
    assert [best_option(name, sums, choices) for name in ("acc", "acc_norm", "acc_bytes")] == [0, 1, 2]
    assert best_option("acc", [-1.0, -1.0], ["a", "b"]) == 0
    rows = [Example("p", (" ab", " abcd", " éééé"), (1,), choices=tuple(choices))] * 2
    chosen, right, found = option_metrics(Scoring(("acc_norm", "acc")), rows, [sums, [-1.0, -9.0, -9.0]], [[False] * 3] * 2)
    assert (chosen, right, found) == ([1, 0], [1.0, 0.0], {"acc_norm": 0.5, "acc": 0.0})


def test_a_single_text_is_right_where_each_token_is_the_likeliest():
    rows = [Example("p", (" a",), choices=(" a",))] * 2
    _, right, found = option_metrics(Scoring(("perplexity", "acc")), rows, [[-1.0], [-3.0]], [[True], [False]])
    assert right == [1.0, 0.0] and found == {"perplexity": pytest.approx(np.exp(2.0)), "acc": 0.5}


def test_exact_match_compares_texts_as_they_are_but_for_what_is_ignored():
    answers = [("Paris", "Rome")] * 3
    assert exact_matches(["Paris", " Paris", "rome."], answers, Scoring(("exact_match",))) == [1, 0, 0]
    lenient = Scoring(("exact_match",), regexes_to_ignore=(r"^\s+",), ignore_case=True, ignore_punctuation=True)
    assert exact_matches(["Paris", " Paris", "rome."], answers, lenient) == [1, 1, 1]
    assert exact_matches(["a1"], [("a2",)], Scoring(("exact_match",), ignore_numbers=True)) == [1]


def test_the_likeliest_text_is_found_and_an_answer_ends_before_the_first_text_of_until(folder):
    model, tokenizer = load_model("l2l/tiny"), load_tokenizer("l2l/tiny")
    prompt = "the dog was"
    whole = generate(model, tokenizer, [prompt], 200, 12, until=())[0]
    assert len(whole.split()) > 4
    third = whole.split()[2]
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    cut = generate(model, tokenizer, [prompt], 200, 12, until=("never", third))[0]
    handle.remove()
    assert cut == whole[: whole.index(third)] and cut != cut.strip()
    assert len(calls) < 12
    row = {"text": prompt, "label": 0, "next": f" {whole}"}
    Path("train.jsonl").write_text(json.dumps(row))
    Path("test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"next": " zebra"}))
    task = get_task(written(TEXT, doc_to_text="text", doc_to_target="next"))
    scores = evaluate(model, tokenizer, task, load_rows(task, "validation", None))
    assert (scores.metric, scores.value, sorted(scores.rowwise)) == ("accuracy", 0.5, [0.0, 1.0])
    assert scores.official["acc"] == 0.5 and scores.official["perplexity"] > 1


def test_a_task_trains_and_the_saved_model_has_the_same_scores(folder):
    path = written(CHOICE, doc_to_choice=["bad", "very good"], metric_list=[{"metric": "acc_norm"}, {"metric": "acc"}])
    result = fine_tune(
        "l2l/tiny", path, steps=2, lr=1e-3, batch_size=4, train_size=8, dev_size=4, test_size=8, out="run", progress=False
    )
    found = run_evaluation(EvaluateConfig(model="run/model", task=path, progress=False))
    assert result.summary["best"]["test"]["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert {"accuracy", "official_acc", "official_acc_norm"} <= found.keys() and found["accuracy"] == found["official_acc_norm"]


def test_rows_of_a_json_array_and_numbers_of_csv_are_read(folder):
    Path("test.json").write_text(json.dumps(ROWS[:3], indent=1))
    files = {"data_files": {"train": "train.jsonl", "test": "test.json"}}
    task = get_task(written(CHOICE, dataset_kwargs=files))
    assert sorted(row["text"] for row in load_rows(task, "validation", None)) == sorted(row["text"] for row in ROWS[:3])
    Path("all.csv").write_text("text,label\nfine,1\npoor,0\n")
    kwargs = {"data_files": {"train": "all.csv", "test": "all.csv"}}
    task = get_task(written(CHOICE, dataset_path="csv", dataset_kwargs=kwargs))
    assert [task.example(row).gold for row in load_rows(task, "validation", None)] in ([(1,), (0,)], [(0,), (1,)])


def test_the_page_has_the_table_that_the_command_writes():
    page = Path(__file__).parents[2] / "docs" / "harness.md"
    text = page.read_text()
    assert text == harness_table.page_with_table(text) and text.count("| `output_type` |") == 1


def test_every_field_of_the_harness_itself_is_in_the_table():
    config = pytest.importorskip("lm_eval.config.task", reason="lm_eval is not installed: pip install 'l2l[harness]'")
    known = {name.partition(".")[0] for name in FIELDS}
    assert {field.name for field in fields_of(config.TaskConfig)} <= known
    inner = {name.partition(".")[2] for name in FIELDS if name.startswith("fewshot_config.")}
    assert {field.name for field in fields_of(config.FewshotConfig)} <= inner


def small(folder: Path, task: str, shared: Path, sizes: tuple[int, int]) -> dict[str, Any]:
    for split, count in zip(("train", "validation"), sizes, strict=True):
        lines = (shared / "data" / task / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return CHOICE | {
        "dataset_kwargs": {"data_files": {name: str(folder / f"{name}.jsonl") for name in ("train", "validation")}},
        "test_split": "validation",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS["multiple_choice"]
        ],
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports
@pytest.mark.parametrize("task", ["sst2", "boolq"])
def test_the_harness_gives_the_same_scores_of_200_rows_of_a_model_trained_here(folder, shared, task, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'l2l[harness]'")
    import harness_agreement

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prompts = {
        "sst2": {"doc_to_text": "Review: {{ sentence }}\nThe mood of it is", "doc_to_choice": ["very bad", "good"]},
        "boolq": {
            "doc_to_text": "{{ passage[:300] }}\n{{ question }}?\nIt is",
            "doc_to_choice": ["not so", "so"],
            "description": "Answer.\n",
        },
    }
    path = written(small(folder, task, shared, (60, 200)), **prompts[task])
    fine_tune(
        "l2l/tiny", path, steps=10, lr=1e-3, batch_size=8, train_size=40, dev_size=8, test_size=8, out="run", progress=False
    )
    with torch.random.fork_rng():
        found = harness_agreement.compare(path, "run/model")
    assert found.rows == 200 and found.differing <= 1
    for name, value in found.here.items():
        if name in found.there:
            assert abs(value - found.there[name]) <= 1 / 200 + 1e-9, name
    assert {"acc", "acc_norm", "acc_bytes"} <= found.here.keys() & found.there.keys()
