"""COPA: which of two alternatives is the cause, or the effect, of a premise?"""

from __future__ import annotations

from l2l.tasks.base import Example, HubData, Row, Task
from l2l.tasks.render import label_index, text_of

_CONNECTIVES = {"cause": "because", "effect": "so"}


def _continuation(alternative: str) -> str:
    """The alternative as the rest of a sentence: lower-cased at the start, unless it starts with I, I'm, I'd, …"""
    first = alternative.split(maxsplit=1)[0]
    keep = first == "I" or first.startswith("I'")
    return " " + (alternative if keep else alternative[0].lower() + alternative[1:])


def _example(row: Row) -> Example:
    question = row["question"]
    if question not in _CONNECTIVES:
        raise ValueError(f"field 'question' must be 'cause' or 'effect', not {question!r}")
    return Example(
        prompt=f"{text_of(row, 'premise').removesuffix('.')} {_CONNECTIVES[question]}",
        options=(_continuation(text_of(row, "choice1")), _continuation(text_of(row, "choice2"))),
        gold=(label_index(row, "label", 2),),
    )


TASK = Task(
    name="copa",
    source=HubData("aps/super_glue", "copa"),
    fields=("premise", "choice1", "choice2", "question", "label"),
    example=_example,
    form="lm",
)
