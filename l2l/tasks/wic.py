"""WiC: does a word have one sense in two sentences? Label 0 is no."""

from __future__ import annotations

from l2l.tasks.base import Example, HubData, Row, Task
from l2l.tasks.render import label_index, text_of

_OPTIONS = ("No", "Yes")


def _example(row: Row) -> Example:
    word, first, second = (text_of(row, field) for field in ("word", "sentence1", "sentence2"))
    return Example(
        prompt=f'Is "{word}" used in the same sense in both sentences? Answer Yes or No.\n{first}\n{second}\n',
        options=_OPTIONS,
        gold=(label_index(row, "label", len(_OPTIONS)),),
    )


TASK = Task(
    name="wic",
    source=HubData("aps/super_glue", "wic"),
    fields=("word", "sentence1", "sentence2", "label"),
    example=_example,
)
