"""Yes/no questions about a text: BoolQ, WiC, WSC, MultiRC. Label 0 is no."""

from collections.abc import Callable, Sequence
from typing import Any

from l2l.tasks.base import Example, HubData, Row, Task, label_index, text_of
from l2l.tasks.metrics import grouped_scores

_OPTIONS = ("No", "Yes")


def _yes_no_task(
    name: str,
    config: str,
    fields: tuple[str, ...],
    prompt: Callable[[Row], str],
    question: Callable[[Row], str],
    **others: Any,
) -> Task:
    """A task of SuperGLUE. ``question`` is the part of the prompt that remains without the text it is about."""
    return Task(
        name=name,
        source=HubData("aps/super_glue", config),
        fields=(*fields, "label"),
        example=lambda row: Example(prompt(row), _OPTIONS, (label_index(row, "label", len(_OPTIONS)),)),
        contextless=question,
        **others,
    )


def _boolq_question(row: Row) -> str:
    question = text_of(row, "question")
    question = question[:1].upper() + question[1:]
    mark = "" if question.endswith("?") else "?"
    return f"{question}{mark}\n"


def _wic_question(row: Row) -> str:
    return f'Is "{text_of(row, "word")}" used in the same sense in both sentences? Answer Yes or No.\n'


def _wsc_question(row: Row) -> str:
    noun = " ".join(text_of(row, "span1_text").split())  # a few spans hold a line break that the text does not have
    pronoun = text_of(row, "span2_text").lower()
    return f'In this text, does "{pronoun}" stand for "{noun}"? Answer Yes or No.\n'


def _multirc_question(row: Row) -> str:
    question, answer = text_of(row, "question"), text_of(row, "answer")
    return f'Question: {question}\nIs "{answer}" a right answer? Answer Yes or No.\n'


def _multirc_official(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
    questions = [(row["paragraph"], row["question"]) for row in rows]
    return grouped_scores(questions, [text == _OPTIONS[1] for text in texts], [row["label"] == 1 for row in rows])


TASKS = (
    # The SuperGLUE copy has the integer column "label"; google/boolq holds the same rows with a boolean "answer".
    _yes_no_task(
        "boolq",
        "boolq",
        ("passage", "question"),
        lambda row: f"{text_of(row, 'passage')} {_boolq_question(row)}",
        _boolq_question,
    ),
    # Does a word have one sense in two sentences?
    _yes_no_task(
        "wic",
        "wic",
        ("word", "sentence1", "sentence2"),
        lambda row: f"{_wic_question(row)}{text_of(row, 'sentence1')}\n{text_of(row, 'sentence2')}\n",
        _wic_question,
    ),
    # Does a pronoun (the second span) stand for a noun (the first span)? "wsc.fixed" has the rows of "wsc", with most
    # spans that are not words of the text corrected. The train split has 554 rows in all, so train and dev rows are
    # often fewer than were asked for; a run says how many.
    _yes_no_task(
        "wsc",
        "wsc.fixed",
        ("text", "span1_text", "span2_text"),
        lambda row: f"{text_of(row, 'text')}\n{_wsc_question(row)}",
        _wsc_question,
    ),
    # Is a candidate answer to a question about a paragraph right? One row per answer. The metric is accuracy over
    # answers; the benchmark's own are F1 over all answers and exact match per question, whose figures do not compare.
    # A sample of rows may hold only some answers of a question, which then is easier to get exact; train and dev rows
    # are drawn answer by answer and may share a paragraph.
    _yes_no_task(
        "multirc",
        "multirc",
        ("paragraph", "question", "answer"),
        lambda row: f"{text_of(row, 'paragraph')}\n{_multirc_question(row)}",
        _multirc_question,
        official=_multirc_official,
    ),
)
