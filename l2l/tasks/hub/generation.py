"""Questions about a passage whose answer is generated: SQuAD 1.1 and DROP. Training is on the first reference answer."""

from l2l.tasks.base import Example, HubData, Row, Task, text_of
from l2l.tasks.metrics import answer_scores, span_scores


def _squad(row: Row) -> Example:
    """The answer is a span of the passage."""
    answers = tuple(row["answers"]["text"])
    if not answers:
        raise ValueError("field 'answers' holds no answer text")
    title, context, question = (text_of(row, field) for field in ("title", "context", "question"))
    return Example(
        prompt=f"Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        options=(f" {answers[0].strip()}\n",),  # the newline teaches where an answer ends; generation stops there
        answers=answers,
    )


def _drop_spans(row: Row) -> tuple[str, ...]:
    spans = tuple(dict.fromkeys(span.strip() for span in row["answers_spans"]["spans"] if span.strip()))
    if not spans:
        raise ValueError("field 'answers_spans' holds no span")
    return spans


def _drop(row: Row) -> Example:
    """The answer is spans of the passage, a number or a date."""
    spans = _drop_spans(row)
    return Example(
        prompt=f"Passage: {text_of(row, 'passage')}\nQuestion: {text_of(row, 'question')}\nAnswer:",
        options=(f" {spans[0]}\n",),
        answers=spans,
    )


def _drop_alternatives(row: Row) -> list[list[str]]:
    """Alternative answers, each with all its spans.

    The hub's column ``answers_spans`` lists the spans of all annotators in one row, so that each counts as an answer;
    a row that also holds the release's ``answer`` and ``validated_answers`` is scored by those.
    """
    if "answer" not in row:
        return [[span] for span in _drop_spans(row)]
    found: list[list[str]] = []
    for answer in (row["answer"], *row.get("validated_answers", ())):  # each is a number, spans, or a date
        spans = [str(answer["number"])] if str(answer["number"]) else list(answer["spans"])
        date = () if spans else filter(None, (answer["date"].get(part, "") for part in ("day", "month", "year")))
        found.append(spans or list(filter(None, [" ".join(date)])))
    return [spans for spans in found if spans]


TASKS = (
    Task(
        name="squad",
        source=HubData("rajpurkar/squad"),
        fields=("title", "context", "question", "answers"),
        example=_squad,
        form="lm",
        metric="f1",
        # The benchmark's other metric; its F1 is the task's own.
        official=lambda rows, texts: {"exact_match": answer_scores(texts, [row["answers"]["text"] for row in rows])[1]},
        sample={"answers": {"text": ["{answer}"]}},
    ),
    Task(
        name="drop",
        source=HubData("ucinlp/drop"),
        fields=("passage", "question", "answers_spans"),
        example=_drop,
        form="lm",
        metric="f1",
        # The benchmark's own metrics, which compare numbers by value and ask for all spans of an answer.
        official=lambda rows, texts: span_scores(texts, [_drop_alternatives(row) for row in rows]),
        sample={"answers_spans": {"spans": ["{answer}"]}},
    ),
)
