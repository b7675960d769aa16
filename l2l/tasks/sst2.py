"""SST-2: is a sentence of a film review negative or positive?"""

from __future__ import annotations

from l2l.tasks.base import Example, HubData, Row, Task
from l2l.tasks.render import label_index, text_of

_OPTIONS = (" terrible", " great")


def _example(row: Row) -> Example:
    return Example(
        prompt=f"{text_of(row, 'sentence')} It was",
        options=_OPTIONS,
        gold=(label_index(row, "label", len(_OPTIONS)),),
    )


TASK = Task(
    name="sst2",
    source=HubData("stanfordnlp/sst2"),
    fields=("sentence", "label"),
    example=_example,
)
