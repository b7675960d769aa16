"""What a task is: rows, prompt, options or answer, loss form and metric, in one value; and how a row is rendered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Split: TypeAlias = Literal["train", "validation"]


@dataclass(frozen=True)
class Example:
    """One row, rendered. Prompt and option are joined as they stand: an option brings its own leading space."""

    prompt: str
    options: tuple[str, ...]
    """Candidate continuations. A generation task has one: the answer to learn."""
    gold: tuple[int, ...] = (0,)
    """Indices of the correct options; the first is the one trained on."""
    answers: tuple[str, ...] = ()
    """Reference answers of a generation task; empty where options are scored."""
    choices: tuple[str, ...] = ()
    """The options without what joins them to the prompt, where their lengths count (:class:`Scoring`); else empty."""


@dataclass(frozen=True)
class HubData:
    """A data set of the hub, read with ``datasets`` or from ``<data_dir>/<task>/<split>.jsonl``."""

    path: str
    name: str | None = None
    """Config of the data set; None: its only one."""
    splits: tuple[str, str] = ("train", "validation")
    """Names of the hub's splits that serve as train and validation. The same name twice: a fixed share of that split is
    held out as validation."""
    revision: str | None = None
    """Commit, tag or branch of the data set; None: its newest."""


@dataclass(frozen=True)
class FileData:
    """Rows of files of the user: JSON, JSON lines, CSV, TSV or parquet."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    """Empty: a fixed share of the train rows is held out."""


@dataclass(frozen=True)
class GeneratedData:
    """Rows that a function generates: a pure function of (split, row count, seed)."""

    generate: Callable[[Split, int, int], list[dict[str, Any]]]


@dataclass(frozen=True)
class Scoring:
    """Scores as lm-evaluation-harness defines them, in place of the package's own: see :mod:`l2l.tasks.harness`."""

    metrics: tuple[str, ...]
    """Their names there. Of scored options ``acc`` (log-probability, a sum), ``acc_norm`` (per character) and ``acc_bytes``
    (per byte of UTF-8): the first is the task's metric. Of a single text ``acc`` (each token is the likeliest) and
    ``perplexity``. Of generated answers ``exact_match``."""
    until: tuple[str, ...] = ()
    """A generated answer ends before the first of these texts, or at the end of text."""
    max_new_tokens: int = 0
    """Most tokens of a generated answer."""
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes_to_ignore: tuple[str, ...] = ()
    """What ``exact_match`` removes from answers and references before it compares them: see
    :func:`l2l.tasks.metrics.exact_matches`."""


@dataclass(frozen=True)
class GivenData:
    """Rows that are there, checked by whoever gives them; a fixed share of them is held out as validation."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Task:
    """A task: where its rows come from and how a row becomes text, a loss and a score."""

    name: str
    source: HubData | FileData | GeneratedData | GivenData
    fields: tuple[str, ...]
    """Columns that a row must have."""
    example: Callable[[Row], Example]
    form: Literal["classification", "lm"] = "classification"
    """``classification``: cross entropy over mean option log-probabilities. ``lm``: cross entropy on the gold tokens."""
    metric: Literal["accuracy", "f1", "exact_match", "reward"] = "accuracy"
    """``accuracy`` of the best scored option, of a generated answer token ``f1`` or, with `scoring`, ``exact_match``, or the
    mean ``reward`` of completions, which a function of the user gives (:mod:`l2l.train.rewards`)."""
    version: int = 1
    """Raised when prompt, options or metric change, so that figures stay comparable."""
    variants: Mapping[str, Callable[[Row], Example]] = field(default_factory=dict, hash=False)
    """Other ways to render a row, by name: ``sst2:empty`` is the variant ``empty`` of ``sst2``."""
    variant: str = ""
    """Which of the variants ``example`` is; empty for the usual prompt."""
    contextless: Callable[[Row], str] | None = None
    """The prompt without passage, sentence or premise, for calibrating option scores (Holtzman et al., 2021)."""
    official: Callable[[Sequence[Row], Sequence[str]], dict[str, float]] | None = None
    """The benchmark's own metrics, by name, from rows and the answer to each: the generated text, or the option."""
    sample: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Values of the row that documents the prompt; see :func:`sample_row`."""
    scoring: Scoring | None = None
    """How predictions are made and scored where that is not the package's own way."""

    @property
    def generates(self) -> bool:
        """Whether answers are generated; else options are scored."""
        return self.metric != "accuracy"

    def new_tokens(self, most: int) -> int:
        """Most tokens of a generated answer: the task's own number, else ``most``."""
        return most if self.scoring is None else self.scoring.max_new_tokens

    @property
    def label(self) -> str:
        """Name, version and, where it is not the usual prompt, variant: ``sst2@1``, ``sst2@1:empty``."""
        return f"{self.name}@{self.version}" + (f":{self.variant}" if self.variant else "")


def sample_row(task: Task) -> Row:
    """A row that documents the prompt: the first generated row, or names of fields in braces as their values.

    A field whose name ends in ``label`` is 0, and ``task.sample`` gives the values that have to be of another kind.
    """
    if isinstance(task.source, GeneratedData):
        return task.source.generate("validation", 1, 0)[0]
    shown: dict[str, Any] = {name: 0 if name.endswith("label") else f"{{{name}}}" for name in task.fields}
    return shown | dict(task.sample)


def render(task: Task, row: Row, where: str) -> Example:
    """Render one row with ``task.example`` and check the result.

    ``where`` says which row it is (``FILE:LINE`` or a number) and opens the message of every error.

    Raises:
        ValueError: a field is missing or empty, the task cannot render the row, it gives no option or an empty
            one, or the gold index points past the options.
    """
    for name in task.fields:
        if name not in row:
            raise ValueError(
                f"{where}: field {name!r} is missing; task {task.name!r} needs {', '.join(task.fields)} "
                f"and the row has {', '.join(map(str, row)) or 'no field'}"
            )
        if row[name] is None:
            raise ValueError(f"{where}: field {name!r} is null; task {task.name!r} needs a value there")
    try:
        example = task.example(row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: task {task.name!r} cannot render this row: {error}") from error
    if not example.options or not all(example.options):
        raise ValueError(f"{where}: task {task.name!r} gives the options {list(example.options)}; each must be non-empty")
    wrong = [index for index in example.gold if not 0 <= index < len(example.options)]
    if wrong or not example.gold:
        raise ValueError(
            f"{where}: task {task.name!r} gives the gold indices {list(example.gold)}; "
            f"they must lie in 0..{len(example.options) - 1}"
        )
    return example


def label_index(row: Row, field: str, count: int) -> int:
    """Read a class label: an integer (or a boolean) in ``0..count - 1``.

    Raises:
        ValueError: the field holds anything else. Hidden test labels, stored as -1, are among what is refused.
    """
    value = row[field]
    if not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"field {field!r} must be a whole number in 0..{count - 1}, not {value!r}")
    return int(value)


def text_of(row: Row, field: str) -> str:
    """Read a text field without its outer white space.

    Raises:
        ValueError: the field is not a string.
    """
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a string, not {value!r}")
    return value.strip()
