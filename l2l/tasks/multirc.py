"""MultiRC: is a candidate answer to a question about a paragraph right? One row per answer; label 0 is no.

The metric is accuracy over answers. The benchmark's own are F1 over all answers and exact match per question, whose
figures do not compare. Train and dev rows are drawn answer by answer and may share a paragraph.
"""

from __future__ import annotations

from l2l.tasks.base import Example, HubData, Row, Task
from l2l.tasks.render import label_index, text_of

_OPTIONS = ("No", "Yes")


def _example(row: Row) -> Example:
    paragraph, question, answer = (text_of(row, field) for field in ("paragraph", "question", "answer"))
    return Example(
        prompt=f'{paragraph}\nQuestion: {question}\nIs "{answer}" a right answer? Answer Yes or No.\n',
        options=_OPTIONS,
        gold=(label_index(row, "label", len(_OPTIONS)),),
    )


TASK = Task(
    name="multirc",
    source=HubData("aps/super_glue", "multirc"),
    fields=("paragraph", "question", "answer", "label"),
    example=_example,
)
