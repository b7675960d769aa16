"""Options that complete a text, trained on the right option's tokens: COPA, WinoGrande, ReCoRD."""

from collections.abc import Sequence
from dataclasses import replace

from l2l.tasks.base import Example, HubData, Row, Task, label_index, text_of
from l2l.tasks.metrics import answer_scores

_CONNECTIVES = {"cause": "because", "effect": "so"}
_BLANK = "_"
_PLACEHOLDER = "@placeholder"


def _copa_option(alternative: str) -> str:
    """The alternative as the rest of a sentence: lower-cased at the start, unless it starts with I, I'm, I'd, …"""
    first = alternative.split(maxsplit=1)[0]
    keep = first == "I" or first.startswith("I'")
    return " " + (alternative if keep else alternative[0].lower() + alternative[1:])


def _copa_connective(row: Row) -> str:
    question = row["question"]
    if question not in _CONNECTIVES:
        raise ValueError(f"field 'question' must be 'cause' or 'effect', not {question!r}")
    return _CONNECTIVES[question]


def _copa(row: Row) -> Example:
    """Which of two alternatives is the cause, or the effect, of a premise?"""
    return Example(
        prompt=f"{text_of(row, 'premise').removesuffix('.')} {_copa_connective(row)}",
        options=(_copa_option(text_of(row, "choice1")), _copa_option(text_of(row, "choice2"))),
        gold=(label_index(row, "label", 2),),
    )


def _copa_empty(row: Row) -> Example:
    """The premise as a sentence of its own, and the alternatives as the next."""
    options = tuple(f" {text_of(row, field)}" for field in ("choice1", "choice2"))
    return replace(_copa(row), prompt=text_of(row, "premise"), options=options)


def _winogrande(row: Row) -> Example:
    """Which of two names fills the blank of a sentence?

    The prompt is the sentence up to the blank; an option is a name with the rest of the sentence, so that the words
    after the name are scored too.
    """
    before, blank, after = text_of(row, "sentence").partition(_BLANK)
    if not blank or _BLANK in after:
        raise ValueError(f"field 'sentence' must hold one blank {_BLANK!r}")
    if row["answer"] not in ("1", "2"):
        raise ValueError(f"field 'answer' must be '1' or '2', not {row['answer']!r}")
    prompt = before.rstrip()
    space = " " if prompt else ""
    return Example(
        prompt=prompt,
        options=tuple(f"{space}{text_of(row, field)}{after}" for field in ("option1", "option2")),
        gold=(int(row["answer"]) - 1,),
    )


def _record_entities(row: Row) -> list[str]:
    return list(dict.fromkeys(row["entities"]))


def _record_option(query: str, entity: str) -> str:
    return " " + query.replace(_PLACEHOLDER, entity)


def _record(row: Row) -> Example:
    """Which entity of a news text fills the placeholder of a sentence about it?

    Every option is the whole sentence with one entity in it; several entities may be right, and the first is trained on.
    """
    passage, query = text_of(row, "passage"), text_of(row, "query")
    if _PLACEHOLDER not in query:
        raise ValueError(f"field 'query' must hold {_PLACEHOLDER!r}")
    entities = _record_entities(row)
    answers = list(dict.fromkeys(row["answers"]))
    unknown = [answer for answer in answers if answer not in entities]
    if unknown or not answers:
        raise ValueError(f"field 'answers' must name at least one of the entities and nothing else, not {answers}")
    # Marked lines of the text are its summary: they and the sentence to complete are shown as one list.
    bullets = passage.replace("@highlight\n", "- ")
    return Example(
        prompt=f"{bullets}\n-",
        options=tuple(_record_option(query, entity) for entity in entities),
        gold=tuple(entities.index(answer) for answer in answers),
    )


def _record_official(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
    """The benchmark's own metrics: F1 and exact match of the text of the chosen entity."""
    chosen = [
        next(entity for entity in _record_entities(row) if _record_option(text_of(row, "query"), entity) == text)
        for row, text in zip(rows, texts, strict=True)
    ]
    f1, exact = answer_scores(chosen, [row["answers"] for row in rows])
    return {"f1": f1, "exact_match": exact}


TASKS = (
    Task(
        name="copa",
        source=HubData("aps/super_glue", "copa"),
        fields=("premise", "choice1", "choice2", "question", "label"),
        example=_copa,
        form="lm",
        variants={"empty": _copa_empty},
        contextless=_copa_connective,
        sample={"question": "cause"},
    ),
    Task(
        name="winogrande",
        source=HubData("allenai/winogrande", "winogrande_m"),  # the size that zeroth-order work reports
        fields=("sentence", "option1", "option2", "answer"),
        example=_winogrande,
        form="lm",
        sample={"sentence": "{before} _ {after}", "answer": "1"},
    ),
    Task(
        name="record",
        source=HubData("aps/super_glue", "record"),
        fields=("passage", "query", "entities", "answers"),
        example=_record,
        form="lm",
        contextless=lambda _: "-",
        official=_record_official,
        sample={
            "query": "{before} @placeholder {after}",
            "entities": ("{entity 1}", "{entity 2}", "…"),
            "answers": ("{entity 1}",),
        },
    ),
)
