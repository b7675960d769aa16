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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sst2", {"label": -1}, r"field 'label' must be a whole number in 0..1, not -1"),
        ("sst2", {"label": "1"}, r"field 'label' must be a whole number"),
        ("sst2", {"label": None}, r"field 'label' is null"),
        ("sst2", {"sentence": 3}, r"field 'sentence' must be a string, not 3"),
        ("copa", {"question": "why"}, r"field 'question' must be 'cause' or 'effect', not 'why'"),
        ("copa", {"choice1": "  "}, r"cannot render"),
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
