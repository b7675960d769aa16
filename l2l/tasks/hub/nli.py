"""Natural language inference: does a premise entail a hypothesis? RTE, CommitmentBank (CB), SNLI, MNLI."""

from dataclasses import replace

from l2l.tasks.base import Example, HubData, Row, Task, label_index, text_of


def _nli_task(name: str, source: HubData, options: tuple[str, ...], question: str, lead: str = "") -> Task:
    """A pair of sentences, then a question on the hypothesis.

    Args:
        options: answers in the order of the data set's labels.
        question: with ``{}`` for the hypothesis.
        lead: text before the premise.
    """

    def context_free(row: Row) -> str:
        return f"{question.format(text_of(row, 'hypothesis'))}\n"

    def example(row: Row) -> Example:
        prompt = f"{lead}{text_of(row, 'premise')}\n{context_free(row)}"
        return Example(prompt, options, (label_index(row, "label", len(options)),))

    def empty(row: Row) -> Example:
        return replace(example(row), prompt=f"{text_of(row, 'premise')}\n{text_of(row, 'hypothesis')}\n")

    return Task(
        name=name,
        source=source,
        fields=("premise", "hypothesis", "label"),
        example=example,
        variants={"empty": empty},
        contextless=context_free,
    )


TASKS = (
    _nli_task(
        "rte",
        HubData("aps/super_glue", "rte"),
        ("Yes", "No"),
        'Given this text, is it true that "{}"? Answer Yes or No.',
    ),
    _nli_task(
        "cb",
        HubData("aps/super_glue", "cb"),
        ("Yes", "No", "Maybe"),
        'Does it follow that "{}"? Answer Yes, No or Maybe.',
        lead="Suppose ",
    ),
    # The hub's copy has rows whose annotators did not agree, with the label -1. They are dropped before rows are
    # sampled (l2l.tasks.sources); a -1 in a data directory is an error that names the line.
    _nli_task(
        "snli",
        HubData("stanfordnlp/snli"),
        ("Yes", "Maybe", "No"),
        'Does it follow that "{}"? Answer Yes, Maybe or No.',
    ),
    # Validation is the matched one: the genres of the train split.
    _nli_task(
        "mnli",
        HubData("nyu-mll/glue", "mnli", splits=("train", "validation_matched")),
        ("Yes", "Maybe", "No"),
        'Does it follow that "{}"? Answer Yes, Maybe or No.',
    ),
)
