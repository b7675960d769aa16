"""Classification of one sentence or short text: sentiment, subjectivity, question type, topic."""

from dataclasses import replace

from l2l.tasks.base import Example, HubData, Row, Task, label_index, text_of

_BINARY = (" terrible", " great")
_FIVE_LEVELS = (" terrible", " bad", " okay", " good", " great")


def _sentence_task(
    name: str, source: HubData, options: tuple[str, ...], cue: str, text: str = "text", label: str = "label"
) -> Task:
    """A text and a cue that one word completes.

    Args:
        options: words in the order of the data set's labels.
        cue: with the white space that separates it from the text.
        text, label: columns.
    """

    def example(row: Row) -> Example:
        return Example(f"{text_of(row, text)}{cue}", options, (label_index(row, label, len(options)),))

    def empty(row: Row) -> Example:
        return replace(example(row), prompt=text_of(row, text))

    return Task(
        name=name,
        source=source,
        fields=(text, label),
        example=example,
        variants={"empty": empty},
        contextless=lambda _: cue.lstrip(),
    )


TASKS = (
    # Sentences of film reviews: SST-2 and SST-5 (Socher et al., 2013), MR (Pang and Lee, 2005).
    _sentence_task("sst2", HubData("stanfordnlp/sst2"), _BINARY, " It was", text="sentence"),
    _sentence_task("sst5", HubData("SetFit/sst5"), _FIVE_LEVELS, " It was"),
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
)
