"""SST-5: the sentiment of a sentence of a film review, from very negative to very positive in five steps."""

from __future__ import annotations

from l2l.tasks.base import Example, HubData, Row, Task
from l2l.tasks.render import label_index, text_of

_OPTIONS = (" terrible", " bad", " okay", " good", " great")


def _example(row: Row) -> Example:
    return Example(
        prompt=f"{text_of(row, 'text')} It was",
        options=_OPTIONS,
        gold=(label_index(row, "label", len(_OPTIONS)),),
    )


TASK = Task(
    name="sst5",
    source=HubData("SetFit/sst5"),
    fields=("text", "label"),
    example=_example,
)
