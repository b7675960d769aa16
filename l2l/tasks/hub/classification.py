"""Texts to classify by one of fixed options: sentiment and topic, natural language inference, yes/no questions.

Prompts are templates: ``{column}`` stands for the column's text without its outer white space.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from l2l.tasks.base import Example, HubData, Row, Task, label_index, text_of
from l2l.tasks.metrics import grouped_scores

_BINARY = (" terrible", " great")
_NO_YES = ("No", "Yes")


def _task(
    name: str,
    source: HubData,
    fields: tuple[str, ...],
    options: tuple[str, ...],
    prompt: str,
    contextless: str,
    empty: str | None = None,
    label: str = "label",
    edit: Callable[[dict[str, str]], dict[str, str]] = dict,
    **others: Any,
) -> Task:
    """A task whose options are the same in every row.

    Args:
        fields: columns of text.
        options: in the order of the data set's labels.
        prompt, contextless, empty: the templates of the prompt, of the prompt without the text that it is about, and of
            the variant ``empty``, if there is one.
        label: the column of the label.
        edit: changes the texts of a row before they are put into templates.
    """

    def fill(template: str, row: Row) -> str:
        return template.format_map(edit({field: text_of(row, field) for field in fields}))

    def example(row: Row) -> Example:
        return Example(fill(prompt, row), options, (label_index(row, label, len(options)),))

    variants = {} if empty is None else {"empty": lambda row: replace(example(row), prompt=fill(empty, row))}
    return Task(
        name, source, (*fields, label), example, variants=variants, contextless=lambda row: fill(contextless, row), **others
    )


def _sentence_task(
    name: str, source: HubData, options: tuple[str, ...], cue: str, text: str = "text", label: str = "label"
) -> Task:
    """A text, and a cue, with the white space before it, that one word completes."""
    return _task(name, source, (text,), options, f"{{{text}}}{cue}", cue.lstrip(), f"{{{text}}}", label)


def _nli_task(name: str, source: HubData, options: tuple[str, ...], question: str, lead: str = "") -> Task:
    """A premise, with ``lead`` before it, and a question on the hypothesis."""
    prompt, empty = f"{lead}{{premise}}\n{question}\n", "{premise}\n{hypothesis}\n"
    return _task(name, source, ("premise", "hypothesis"), options, prompt, f"{question}\n", empty)


def _boolq_edit(texts: dict[str, str]) -> dict[str, str]:
    question = texts["question"]
    mark = "" if question.endswith("?") else "?"
    return texts | {"question": question[:1].upper() + question[1:] + mark}


def _wsc_edit(texts: dict[str, str]) -> dict[str, str]:
    # A few spans hold a line break that the text does not have.
    return texts | {"span1_text": " ".join(texts["span1_text"].split()), "span2_text": texts["span2_text"].lower()}


def _multirc_official(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
    questions = [(row["paragraph"], row["question"]) for row in rows]
    return grouped_scores(questions, [text == _NO_YES[1] for text in texts], [row["label"] == 1 for row in rows])


_WIC = 'Is "{word}" used in the same sense in both sentences? Answer Yes or No.\n'
_WSC = 'In this text, does "{span2_text}" stand for "{span1_text}"? Answer Yes or No.\n'
_MULTIRC = 'Question: {question}\nIs "{answer}" a right answer? Answer Yes or No.\n'

TASKS = (
    # Sentences of film reviews: SST-2 and SST-5 (Socher et al., 2013), MR (Pang and Lee, 2005).
    _sentence_task("sst2", HubData("stanfordnlp/sst2"), _BINARY, " It was", text="sentence"),
    _sentence_task("sst5", HubData("SetFit/sst5"), (" terrible", " bad", " okay", " good", " great"), " It was"),
    _sentence_task("mr", HubData("cornell-movie-review-data/rotten_tomatoes", splits=("train", "test")), _BINARY, " It was"),
    # Sentences of customer reviews (Hu and Liu, 2004).
    _sentence_task("cr", HubData("SetFit/CR", splits=("train", "test")), _BINARY, " It was"),
    # Sentences on films that tell the plot (objective) or judge it (Pang and Lee, 2004).
    _sentence_task("subj", HubData("SetFit/subj", splits=("train", "test")), (" objective", " subjective"), " This is"),
    # The kind of answer that a question asks for, in six coarse classes.
    _sentence_task(
        "trec",
        HubData("CogComp/trec", splits=("train", "test")),
        (" Abbreviation", " Entity", " Description", " Person", " Location", " Number"),
        "\nType of answer:",
        label="coarse_label",
    ),
    _sentence_task(
        "ag_news",
        HubData("fancyzhx/ag_news", splits=("train", "test")),
        (" World", " Sports", " Business", " Technology"),
        "\nTopic:",
    ),
    _nli_task(
        "rte",
        HubData("aps/super_glue", "rte"),
        ("Yes", "No"),
        'Given this text, is it true that "{hypothesis}"? Answer Yes or No.',
    ),
    _nli_task(
        "cb",
        HubData("aps/super_glue", "cb"),
        ("Yes", "No", "Maybe"),
        'Does it follow that "{hypothesis}"? Answer Yes, No or Maybe.',
        lead="Suppose ",
    ),
    # The hub's copy has rows whose annotators did not agree, with the label -1. They are dropped before rows are
    # sampled (l2l.tasks.sources); a -1 in a data directory is an error that names the line.
    *(
        _nli_task(name, source, ("Yes", "Maybe", "No"), 'Does it follow that "{hypothesis}"? Answer Yes, Maybe or No.')
        for name, source in (
            ("snli", HubData("stanfordnlp/snli")),
            # Validation is the matched one: the genres of the train split.
            ("mnli", HubData("nyu-mll/glue", "mnli", splits=("train", "validation_matched"))),
        )
    ),
    # The SuperGLUE copy has the integer column "label"; google/boolq holds the same rows with a boolean "answer".
    _task(
        "boolq",
        HubData("aps/super_glue", "boolq"),
        ("passage", "question"),
        _NO_YES,
        "{passage} {question}\n",
        "{question}\n",
        edit=_boolq_edit,
    ),
    # Does a word have one sense in two sentences?
    _task(
        "wic",
        HubData("aps/super_glue", "wic"),
        ("word", "sentence1", "sentence2"),
        _NO_YES,
        f"{_WIC}{{sentence1}}\n{{sentence2}}\n",
        _WIC,
    ),
    # Does a pronoun (the second span) stand for a noun (the first span)? "wsc.fixed" has the rows of "wsc", with most
    # spans that are not words of the text corrected. The train split has 554 rows in all, so train and dev rows are
    # often fewer than were asked for; a run says how many.
    _task(
        "wsc",
        HubData("aps/super_glue", "wsc.fixed"),
        ("text", "span1_text", "span2_text"),
        _NO_YES,
        f"{{text}}\n{_WSC}",
        _WSC,
        edit=_wsc_edit,
    ),
    # Is a candidate answer to a question about a paragraph right? One row per answer. The metric is accuracy over
    # answers; the benchmark's own are F1 over all answers and exact match per question, whose figures do not compare.
    # A sample of rows may hold only some answers of a question, which then is easier to get exact; train and dev rows
    # are drawn answer by answer and may share a paragraph.
    _task(
        "multirc",
        HubData("aps/super_glue", "multirc"),
        ("paragraph", "question", "answer"),
        _NO_YES,
        f"{{paragraph}}\n{_MULTIRC}",
        _MULTIRC,
        official=_multirc_official,
    ),
)
