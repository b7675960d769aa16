"""Every task renders a row to the exact text it promises."""

from __future__ import annotations

import pytest

from l2l.tasks import get_task
from l2l.tasks.base import Example, HubData
from l2l.tasks.render import render

CASES = {
    "sst2": (
        {"sentence": "a fine film . ", "label": 1},
        Example("a fine film . It was", (" terrible", " great"), (1,)),
    ),
    "sst5": (
        {"text": "a fine film .", "label": 3},
        Example("a fine film . It was", (" terrible", " bad", " okay", " good", " great"), (3,)),
    ),
    "rte": (
        {"premise": "Cats sleep.", "hypothesis": "Animals rest.", "label": 0},
        Example(
            'Cats sleep.\nGiven this text, is it true that "Animals rest."? Answer Yes or No.\n', ("Yes", "No"), (0,)
        ),
    ),
    "cb": (
        {"premise": "it may rain.", "hypothesis": "it rains", "label": 2},
        Example(
            'Suppose it may rain.\nDoes it follow that "it rains"? Answer Yes, No or Maybe.\n',
            ("Yes", "No", "Maybe"),
            (2,),
        ),
    ),
    "boolq": (
        {"passage": "Water boils.", "question": "is water hot", "label": 1},
        Example("Water boils. Is water hot?\n", ("No", "Yes"), (1,)),
    ),
    "copa": (
        {
            "premise": "The man fell.",
            "choice1": "I'd pushed.",
            "choice2": "He was ill.",
            "question": "cause",
            "label": 1,
        },
        Example("The man fell because", (" I'd pushed.", " he was ill."), (1,)),
    ),
    "trec": (
        {"text": "Where is Lima ?", "coarse_label": 4},
        Example(
            "Where is Lima ?\nType of answer:",
            (" Abbreviation", " Entity", " Description", " Person", " Location", " Number"),
            (4,),
        ),
    ),
    "ag_news": (
        {"text": "Stocks rise.", "label": 2},
        Example("Stocks rise.\nTopic:", (" World", " Sports", " Business", " Technology"), (2,)),
    ),
    "squad": (
        {"title": "Peru", "context": "Lima is big.", "question": "What is big?", "answers": {"text": ["Lima", "lima"]}},
        Example(
            "Title: Peru\nContext: Lima is big.\nQuestion: What is big?\nAnswer:", (" Lima\n",), (0,), ("Lima", "lima")
        ),
    ),
    "snli": (
        {"premise": "A man surfs. ", "hypothesis": "A man is wet.", "label": 1},
        Example(
            'A man surfs.\nDoes it follow that "A man is wet."? Answer Yes, Maybe or No.\n',
            ("Yes", "Maybe", "No"),
            (1,),
        ),
    ),
    "mnli": (
        {"premise": "yeah i know", "hypothesis": "I did not know. ", "label": 2},
        Example(
            'yeah i know\nDoes it follow that "I did not know."? Answer Yes, Maybe or No.\n',
            ("Yes", "Maybe", "No"),
            (2,),
        ),
    ),
    "wic": (
        {"word": "hold", "sentence1": "Hold a table.", "sentence2": "I hold a hand.", "label": 0},
        Example(
            'Is "hold" used in the same sense in both sentences? Answer Yes or No.\nHold a table.\nI hold a hand.\n',
            ("No", "Yes"),
            (0,),
        ),
    ),
    "wsc": (
        {"text": "Ann saw Eve . She waved.", "span1_text": "Eve", "span2_text": "She", "label": 1},
        Example(
            'Ann saw Eve . She waved.\nIn this text, does "she" stand for "Eve"? Answer Yes or No.\n',
            ("No", "Yes"),
            (1,),
        ),
    ),
    "multirc": (
        {"paragraph": "Lima is big. ", "question": "What is big?", "answer": "Lima", "label": 1},
        Example(
            'Lima is big.\nQuestion: What is big?\nIs "Lima" a right answer? Answer Yes or No.\n', ("No", "Yes"), (1,)
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_renders_its_row_to_the_promised_text(name):
    row, expected = CASES[name]
    task = get_task(name)
    assert render(task, row, "row 0") == expected
    assert task.name == name
    assert isinstance(task.source, HubData)


@pytest.mark.parametrize("name", CASES)
def test_every_field_a_task_lists_is_needed(name):
    row, _ = CASES[name]
    task = get_task(name)
    for field in task.fields:
        with pytest.raises(ValueError, match=f"here: field '{field}' is missing"):
            render(task, {key: value for key, value in row.items() if key != field}, "here")


def test_the_forms_and_metrics_are_the_fields_usual_ones():
    kinds = {name: (get_task(name).form, get_task(name).metric) for name in CASES}
    assert kinds.pop("copa") == ("lm", "accuracy")
    assert kinds.pop("squad") == ("lm", "f1")
    assert set(kinds.values()) == {("classification", "accuracy")}


def test_boolq_keeps_a_question_mark_that_is_there():
    row = {"passage": "P.", "question": "is it so?", "label": 0}
    assert get_task("boolq").example(row).prompt == "P. Is it so?\n"


def test_copa_continues_an_effect_with_so():
    row = {"premise": "It rained", "choice1": "I ran.", "choice2": "We ran.", "question": "effect", "label": 0}
    assert get_task("copa").example(row) == Example("It rained so", (" I ran.", " we ran."), (0,))


def test_wsc_asks_for_a_noun_on_one_line():
    row = {"text": "A b is it.", "span1_text": "A\nb", "span2_text": "it", "label": 1}
    assert get_task("wsc").example(row).prompt.splitlines()[1].startswith('In this text, does "it" stand for "A b"?')


@pytest.mark.parametrize("name", ["snli", "mnli"])
def test_the_middle_label_of_the_three_way_pairs_is_the_open_one_unlike_cb(name):
    row = {"premise": "P.", "hypothesis": "H.", "label": 0}
    answers = [task.example(row).options for task in (get_task(name), get_task("cb"))]
    assert answers == [("Yes", "Maybe", "No"), ("Yes", "No", "Maybe")]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sst2", {"label": -1}, r"field 'label' must be a whole number in 0..1, not -1"),
        ("sst2", {"label": "1"}, r"field 'label' must be a whole number"),
        ("sst2", {"label": None}, r"field 'label' is null"),
        ("sst2", {"sentence": 3}, r"field 'sentence' must be a string, not 3"),
        ("copa", {"question": "why"}, r"field 'question' must be 'cause' or 'effect', not 'why'"),
        ("copa", {"choice1": "  "}, r"cannot render"),
        ("snli", {"label": -1}, r"field 'label' must be a whole number in 0..2, not -1"),
        ("wsc", {"span1_text": 4}, r"field 'span1_text' must be a string, not 4"),
        ("squad", {"answers": {"text": []}}, r"'answers' holds no answer text"),
        ("squad", {"answers": {}}, r"cannot render this row: 'text'"),
    ],
)
def test_a_bad_value_names_the_place_and_the_field(name, change, message):
    row, _ = CASES[name]
    with pytest.raises(ValueError, match=r"^file.jsonl:7: .*" + message):
        render(get_task(name), row | change, "file.jsonl:7")


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_the_real_data_renders(name, shared):
    from l2l.tasks.rows import load_rows

    for split in ("train", "validation"):
        assert len(load_rows(get_task(name), split, shared / "data")) > 50


@pytest.mark.parametrize("name", ["snli", "mnli", "wic", "wsc", "multirc"])
def test_every_row_of_the_real_data_encodes_to_options_that_differ(name, shared):
    from l2l.models.load import load_tokenizer
    from l2l.tasks.encode import encode
    from l2l.tasks.rows import load_rows

    task, tokenizer = get_task(name), load_tokenizer(shared / "models" / "stories260K")
    for split in ("train", "validation"):
        rows = load_rows(task, split, shared / "data")
        encoded = encode(task, rows, tokenizer, 256)
        assert {example.gold[0] for example in encoded} == set(range(len(encoded[0].options)))
        for row, example in zip(rows, encoded, strict=True):
            assert example.gold == (row["label"],)
            assert max(len(option.ids) for option in example.options) <= 256
            assert len({option.ids[-option.length :] for option in example.options}) == len(example.options)
