"""RTE: does a premise entail a hypothesis? Label 0 is entailment."""

from __future__ import annotations

from l2l.tasks.base import Example, HubData, Row, Task
from l2l.tasks.render import label_index, text_of

_OPTIONS = ("Yes", "No")


def _example(row: Row) -> Example:
    premise, hypothesis = text_of(row, "premise"), text_of(row, "hypothesis")
    return Example(
        prompt=f'{premise}\nGiven this text, is it true that "{hypothesis}"? Answer Yes or No.\n',
        options=_OPTIONS,
        gold=(label_index(row, "label", len(_OPTIONS)),),
    )


TASK = Task(
    name="rte",
    source=HubData("aps/super_glue", "rte"),
    fields=("premise", "hypothesis", "label"),
    example=_example,
)
