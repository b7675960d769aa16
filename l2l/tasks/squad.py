"""SQuAD 1.1: answer a question with words from a passage."""

from __future__ import annotations

from l2l.tasks.base import Example, HubData, Row, Task
from l2l.tasks.render import text_of


def _example(row: Row) -> Example:
    answers = tuple(row["answers"]["text"])
    if not answers:
        raise ValueError("field 'answers' holds no answer text")
    title, context, question = (text_of(row, field) for field in ("title", "context", "question"))
    return Example(
        prompt=f"Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        # The newline teaches where an answer ends; generation stops there.
        options=(f" {answers[0].strip()}\n",),
        answers=answers,
    )


TASK = Task(
    name="squad",
    source=HubData("rajpurkar/squad"),
    fields=("title", "context", "question", "answers"),
    example=_example,
    form="lm",
    metric="f1",
)
