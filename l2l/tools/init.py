"""``l2l init``: a task file and a configuration of a first run, with comments, from a table of the user's.

Columns are guessed: a label is a column of few values that repeat, a text is one of several words. Tables are read as they
come (separators, encodings, JSON of several shapes); where a task could not read the file itself, its rows are written anew.
What is guessed or changed is said, and every guess has an option that overrides it.
"""

import csv
import io
import json
import keyword
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from l2l import costs
from l2l.arguments import Arguments
from l2l.methods.registry import declared_method
from l2l.models.load import load_tokenizer
from l2l.models.prefix import layer_list
from l2l.params import Blocks
from l2l.report.memory import available_bytes
from l2l.report.run_directory import write_whole
from l2l.tasks import task_names
from l2l.tasks.base import Row
from l2l.tasks.encode import tokenize
from l2l.tasks.inspect import CheckConfig, check_task
from l2l.tasks.sources import read_file
from l2l.train.config import BATCH_SIZE, TEST_ROWS

PAGE = "docs/your-task.md"
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Kinds of files that are read."""
DELIMITERS = ",;\t|"
LABELS = 20
"""Most values of a column that is taken for a label."""
LABEL_LENGTH = 60
"""Most characters of a label."""
REPEATED = 2
"""Rows per value, on average, from which on a column is taken for a label."""
WORDS = 2.0
"""Mean words of a column from which on it is taken for a text."""
SPOILED = 0.1
"""Share of rows that cannot be read, or lack a value, above which a file is refused."""
LABEL_NAMES = ("label", "labels", "target", "class", "category", "sentiment", "topic", "intent", "gold", "y")
ANSWER_NAMES = ("answer", "answers", "response", "output", "completion", "reply", "summary", "translation", "target")
OPTION_NAMES = ("choices", "options", "endings")
RESERVED = {"and", "else", "false", "if", "in", "is", "none", "not", "or", "true", "loop", "self"}
"""Words that no column of a template may be named."""
ROOM = 0.8
"""Share of the free memory that a suggested run may take."""
TOP = 5
"""Layers that a run trains of a model that has at least :data:`DEEP` times as many (docs/results)."""
DEEP = 3
DIRECTIONS = 16
"""Most directions of a step (:mod:`l2l.methods.rsgn`)."""
PASSES = 600
"""Forward passes of the suggested run: a first look."""


@dataclass(frozen=True)
class InitConfig(Arguments):
    """Write a task file and a configuration from a table: CSV, TSV, JSON, JSON lines or parquet."""

    file: str
    """The table."""
    model: str = "l2l/tiny"
    """The model to be trained: its tokenizer and its size are looked at. ``l2l/tiny``, a directory, or a hub id."""
    out: str = "."
    """Directory for the files."""
    name: str | None = None
    """Of the task, and so of the files; None: that of the table."""
    text: list[str] | None = None
    """Columns of the prompt, in order; None: guessed."""
    label: str | None = None
    """Column of the right option, or of the answer to be written; None: guessed."""
    overwrite: bool = False
    """Replace files that are there."""


# Reading a table as it comes.


@dataclass(frozen=True)
class Frame:
    """A table: rows under clean names, and what was done to get it."""

    rows: list[dict[str, Any]]
    notes: list[str]

    @property
    def columns(self) -> list[str]:
        """Names in order of their first occurrence."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def values(self, column: str) -> list[Any]:
        """A column; None where a row lacks it."""
        return [row.get(column) for row in self.rows]


def read_frame(path: Path) -> Frame:
    """Read a table of any of :data:`SUFFIXES`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has no rows or one column, or too many rows that do not fit its first line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: give the path of a table; see {PAGE}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        kind = f"{suffix} files" if suffix else "files without a suffix"
        raise ValueError(f"{path}: {kind} are not read: save the table as one of {', '.join(SUFFIXES)}; see {PAGE}")
    if suffix == ".parquet":
        frame = Frame([dict(row) for _, row in read_file(path)], [])
    else:
        text, notes = _decoded(path)
        frame = _json(path, text, notes) if suffix.startswith(".json") else _csv(path, text, notes)
    rows = [row for row in frame.rows if any(_said(value) for value in row.values())]
    if not rows:
        raise ValueError(f"{path}: holds no rows; see {PAGE}")
    if len(frame.columns) < 2:
        raise ValueError(f"{path}: has one column, {frame.columns[0]!r}: a task needs a text and a label; see {PAGE}")
    return _renamed(Frame(rows, frame.notes))


def _decoded(path: Path) -> tuple[str, list[str]]:
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16"), ["it is UTF-16"]
    if b"\0" in content:
        raise ValueError(f"{path}: holds binary data and no text: save the table as one of {', '.join(SUFFIXES)}; see {PAGE}")
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace"), ["it is not UTF-8, and is read as Windows-1252"]


def _csv(path: Path, text: str, notes: list[str]) -> Frame:
    """Comma, semicolon, tab or bar: the one by which most lines have as many cells as the first, and the most of them."""

    def cells(delimiter: str) -> list[list[str]]:
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(map(str.strip, row))]

    def fit(delimiter: str) -> tuple[float, int]:
        found = cells(delimiter)
        width = len(found[0]) if found else 0
        return (mean(len(row) == width for row in found), width) if width > 1 else (0.0, width)

    csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))
    delimiter = max(DELIMITERS, key=fit)
    table = cells(delimiter)
    if not table:
        raise ValueError(f"{path}: holds no rows; see {PAGE}")
    if delimiter != ("\t" if path.suffix.lower() == ".tsv" else ","):
        notes = [*notes, f"its cells are separated by {delimiter!r}"]
    names, body = table[0], table[1:]
    if any(cell.strip() and cell in {row[place] for row in body if len(row) > place} for place, cell in enumerate(names)):
        notes = [*notes, "its first line holds values, so that its columns have no names"]
        names, body = ["" for _ in names], table
    fitting = [row for row in body if len(row) == len(names)]
    if len(fitting) < (1 - SPOILED) * len(body):
        raise ValueError(
            f"{path}: {len(body) - len(fitting)} of {len(body)} rows have not the {len(names)} cells of the first line: put "
            f"texts that hold {delimiter!r} between double quotes; see {PAGE}"
        )
    if len(fitting) < len(body):
        notes = [*notes, f"{len(body) - len(fitting)} rows have not as many cells as the first line, and are left out"]
    unique = [
        name if name.strip() and names.index(name) == place else f"column_{place + 1}" for place, name in enumerate(names)
    ]
    return Frame([dict(zip(unique, row, strict=True)) for row in fitting], notes)


def _json(path: Path, text: str, notes: list[str]) -> Frame:
    """An array of objects, an object that holds one, an object of columns, or an object per line."""
    try:
        found = json.loads(text)
    except ValueError:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = []
        for number, line in lines:
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: neither JSON nor JSON lines: {error}; see {PAGE}") from error
    if isinstance(found, dict):
        lists = {name: value for name, value in found.items() if isinstance(value, list)}
        tables = [value for value in lists.values() if value and all(isinstance(row, dict) for row in value)]
        if len(tables) == 1:
            found = tables[0]
        elif lists and len({len(value) for value in lists.values()}) == 1:
            found = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        else:
            found = [found]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: must hold objects, one per row, with the columns as fields; see {PAGE}")
    return Frame(found, notes)


def _renamed(frame: Frame) -> Frame:
    """The table with names that a template can use."""
    clean: dict[str, str] = {}
    for place, name in enumerate(frame.columns):
        word = re.sub(r"\W+", "_", name.strip()).strip("_")
        if not word.isidentifier() or word in clean.values():
            word = f"column_{place + 1}"
        clean[name] = f"{word}_" if keyword.iskeyword(word) or word.lower() in RESERVED else word
    changed = [f"{name!r} is {word}" for name, word in clean.items() if name != word]
    notes = [*frame.notes, f"names of columns are made words: {', '.join(changed)}"] if changed else frame.notes
    return Frame([{clean[name]: value for name, value in row.items()} for row in frame.rows], notes)


def _said(value: Any) -> bool:
    """Whether a cell holds something."""
    return value is not None and bool(str(value).strip()) and value == value  # NaN is not equal to itself


# Guessing.


@dataclass(frozen=True)
class Guess:
    """What the columns of a table are."""

    texts: tuple[str, ...]
    """Of the prompt."""
    label: str
    """The right option, or the answer to be written."""
    labels: tuple[str, ...] = ()
    """The options of all rows; empty where rows have their own, or an answer is written."""
    options: str = ""
    """Column of each row's own options."""
    others: tuple[str, ...] = ()
    """Further columns that could have been the label."""

    @property
    def generates(self) -> bool:
        """Whether an answer is written."""
        return not self.labels and not self.options


def guess(frame: Frame, texts: Sequence[str] | None = None, label: str | None = None) -> Guess:
    """What the columns are, ``texts`` and ``label`` where they are given.

    Raises:
        ValueError: a column that was named is not there; or nothing looks like a text, or like a label or an answer.
    """
    columns = frame.columns
    for column in (*(texts or ()), *([label] if label else ())):
        if column not in columns:
            raise ValueError(f"there is no column {column!r}: name one of {', '.join(columns)}; see {PAGE}")
    filled = {name: [value for value in frame.values(name) if _said(value)] for name in columns}
    options = _first(OPTION_NAMES, [name for name in columns if filled[name] and all(map(_is_options, filled[name]))])
    found = [name for name in columns if name != options and name not in (texts or ())]
    given = [name for name in found if _is_label(filled[name]) or name == label]
    if options:
        own = [name for name in found if _names_options(frame, name, options)]
        label = label or _first(LABEL_NAMES + ANSWER_NAMES, own)
    labelled = label or _first(LABEL_NAMES, [name for name in given if name.lower() in LABEL_NAMES])
    written = [name for name in found if _is_text(filled[name])]
    answer = next((name for name in written if name.lower() in ANSWER_NAMES), None)
    if labelled is None and answer is None and given:
        labelled = min(given[::-1], key=lambda name: (all(map(_is_number, filled[name])), len(_distinct(filled[name]))))
    chosen = labelled or answer
    if chosen is None and len(written) > 1:
        chosen = written[-1]
    if chosen is None:
        raise ValueError(
            f"no column looks like a label (2 to {LABELS} values that repeat) or an answer: name it by --label, one of "
            f"{', '.join(columns)}; see {PAGE}"
        )
    prompts = tuple(texts or [name for name in written if name != chosen])
    if not prompts:  # single words
        words = [name for name in found if name not in (chosen, *given) and not all(map(_is_number, filled[name]))]
        prompts = tuple(words[:1])
    if not prompts:
        raise ValueError(
            f"no column beside {chosen!r} looks like a text: name it by --text, of {', '.join(columns)}; see {PAGE}"
        )
    labels = () if options or not _is_label(filled[chosen]) else tuple(_distinct(filled[chosen]))
    return Guess(prompts, chosen, labels, options or "", tuple(name for name in given if name != chosen))


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """The column whose name comes first among ``names``; else the first column."""
    order = {name: place for place, name in enumerate(names)}
    return min(columns, key=lambda column: order.get(column.lower(), len(names)), default=None)


def _distinct(values: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(_text(value) for value in values))


def _text(value: Any) -> str:
    """A cell as text: whole floats, as of a column with gaps, without their point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _is_label(values: Sequence[Any]) -> bool:
    if any(isinstance(value, list | dict) for value in values):
        return False
    distinct = _distinct(values)
    few = 2 <= len(distinct) <= LABELS and len(values) >= REPEATED * len(distinct)
    return few and max(map(len, distinct)) <= LABEL_LENGTH


def _is_text(values: Sequence[Any]) -> bool:
    texts = [value for value in values if isinstance(value, str)]
    if not texts or len(texts) < len(values) or _is_label(values):
        return False
    return mean(len(text.split()) for text in texts) >= WORDS


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_options(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) and one.strip() for one in value)


def _names_options(frame: Frame, name: str, options: str) -> bool:
    """Whether every value is the text or the index of one of its row's options."""

    def names(value: Any, listed: list[str]) -> bool:
        text = _text(value)
        return text in [one.strip() for one in listed] or (text.isdecimal() and int(text) < len(listed))

    rows = [row for row in frame.rows if _said(row.get(name)) and _is_options(row.get(options))]
    return all(names(row[name], row[options]) for row in rows)


# What is written.


def rows_of(frame: Frame, found: Guess) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a task, with the columns that it uses, and a note on those that lack a value.

    Raises:
        ValueError: more than :data:`SPOILED` of the rows lack one.
    """
    used = [*found.texts, *([found.options] if found.options else []), found.label]
    rows = [row for row in frame.rows if all(_said(row.get(name)) for name in used)]
    left_out = len(frame.rows) - len(rows)
    if left_out > SPOILED * len(frame.rows):
        lacking = Counter(name for row in frame.rows for name in used if not _said(row.get(name)))
        where = ", ".join(f"{name} ({count})" for name, count in lacking.most_common())
        raise ValueError(
            f"{left_out} of {len(frame.rows)} rows lack a value, in {where}: fill them, drop them, or name other columns by "
            f"--text and --label; see {PAGE}"
        )
    clean = [{name: value if isinstance(value := row[name], list) else _text(value) for name in used} for row in rows]
    return clean, [f"{left_out} rows lack a value, and are left out"] if left_out else []


def _title(column: str) -> str:
    return column.replace("_", " ").strip().capitalize()


def prompt_of(found: Guess) -> str:
    """The template of the prompt: the text, or texts by their names, and the name of what is asked for."""
    texts = [f"{{{{ {name} }}}}" for name in found.texts]
    if len(texts) > 1 or found.generates:
        texts = [f"{_title(name)}: {text}" for name, text in zip(found.texts, texts, strict=True)]
    if found.options:
        return "\n".join([*texts, "Answer:"])
    return "\n".join([*texts, f"{_title(found.label)}:"])


TASK = """\
# Made by l2l init from {table}. The fields: {page}
{notes}# Look at it: {check}
task: {name}

# 1 row in 5 is held out to report on. With a file of your own for that: {{train: …, validation: …}}
data_files: {rows}

# What the model reads. {{{{ column }}}} is filled in from each row. The wording matters: try others.
doc_to_text: {prompt}

{answer}
doc_to_target: {label}
{others}
# Raise it when the prompt changes, so that figures stay comparable.
metadata: {{version: 1}}
"""
WRITTEN = """\
# The answer is written, up to the end of its line.
output_type: generate_until"""
OWN_OPTIONS = """\
# Each row has its own options; the likeliest is the answer.
output_type: multiple_choice
doc_to_choice: {options}"""
SAME_OPTIONS = """\
# The options; the likeliest is the answer. Words that say what they mean are learned soonest. To reword them, give
# doc_to_target a template, such as "{{{{ 'good' if {label} == '1' else 'bad' }}}}".
output_type: multiple_choice
doc_to_choice: {labels}"""


def task_text(name: str, table: Path, rows: Path, found: Guess, notes: Sequence[str], check: str) -> str:
    """The task file; ``rows``: the file that it reads, from where it lies; ``check``: the command that looks at it."""
    answer = WRITTEN if found.generates else OWN_OPTIONS if found.options else SAME_OPTIONS
    others = f"# Other columns that could be the label (l2l init --label): {', '.join(found.others)}\n" if found.others else ""
    return TASK.format(
        table=table.name,
        page=PAGE,
        notes="".join(f"# {note}\n" for note in notes),
        check=check,
        name=name,
        rows=_quoted(str(rows)),
        prompt=_quoted(prompt_of(found)),
        answer=answer.format(options=found.options, label=found.label, labels=_quoted(list(found.labels))),
        label=found.label,
        others=others,
    )


def _quoted(value: Any) -> str:
    """A text or a list of texts for YAML, of which JSON is a part."""
    return json.dumps(value, ensure_ascii=False)


# The run.


@dataclass(frozen=True)
class Suggestion:
    """A first run that fits into memory."""

    options: dict[str, Any]
    why: dict[str, str]
    """A sentence for each option that has one."""
    peak_bytes: int
    fits: bool


def suggest(model: str, found: Guess, length: int, rows: int, room: int) -> Suggestion:
    """Scheme, layers (k), directions (N) and rows per step, by the predicted memory.

    Candidates are tried from the one that learns most: every weight in float32, smaller batches, then adapters beside
    weights in bfloat16; the last one is given where none fits.

    Args:
        length: tokens of a long row.
        rows: that are trained and evaluated on.
        room: bytes that are free.
    """
    config = costs.config_of(model)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(length, most) if isinstance(most, int) else length
    tried: list[Suggestion] = []
    for scheme, dtype in (("full", torch.float32), ("lora", torch.bfloat16)):
        empty = costs.meta_model(config, dtype)
        for batch in (BATCH_SIZE, BATCH_SIZE // 2, BATCH_SIZE // 4):
            tried.append(_candidate(empty, found, scheme, costs.Load(batch, length, batch), rows, room))
            if tried[-1].fits:
                return tried[-1]
    return tried[-1]


def _candidate(empty: Any, found: Guess, scheme: str, load: costs.Load, rows: int, room: int) -> Suggestion:
    """One run, on a model without data. What ``lora`` trains is small beside the model, and is not counted."""
    load = replace(load, read=load.tokens) if found.generates else load
    blocks, name = Blocks.of(empty), "mezo" if found.generates else "rsgn"
    plan = costs.Plan.of(empty.dtype, "in_place", "direct", declared_method(name, {}, empty), blocks)
    shape = costs.model_shape(empty, blocks)
    peak = sum(costs.memory_parts(shape, load, plan).values())
    layers, kept = layer_list(empty), rows * load.length * shape.width * empty.dtype.itemsize
    top = scheme == "full" and layers is not None and len(layers) >= DEEP * TOP and peak + kept <= ROOM * room
    peak += kept if top else 0
    what = "every weight" if scheme == "full" else "thin matrices beside the layers"
    why = {"scheme": f"{what}: {costs.gib(peak)} at most, of {costs.gib(room)} that are free, by prediction"}
    options: dict[str, Any] = {"scheme": scheme, "dtype": str(empty.dtype).removeprefix("torch.")}
    options |= {"train_layers": f"top:{TOP}" if top else "all", "batch_size": load.rows, "method": name}
    if top and layers is not None:
        below = f"what comes before is computed once per row and kept, {costs.gib(kept)}"
        why["train_layers"] = f"k = {TOP} of {len(layers)} layers; {below}. all: every layer"
    if found.generates:
        options["lr"], why["lr"] = "auto", "the step size is measured during the run"
    else:
        bound = load.rows * (max(len(found.labels), 2) - 1)
        options["num_directions"] = min(DIRECTIONS, bound)
        why["num_directions"] = f"N, at most batch_size * (options - 1) = {bound}"
        why["method"] = "reads logits along N directions a step; needs no learning rate"
    return Suggestion(options, why, peak, peak <= ROOM * room)


RUN = """\
# {command}
# Made by l2l init. Every option: l2l fine-tune --help. Which method: docs/which-method.md
{doubt}model: {model}
task: {task}
{options}
max_passes: {passes}  # a first look; or, by time, max_seconds: 600
out: {out}
"""
TOO_LARGE = "# This does not fit into the memory that is free here: take a smaller model, or a machine with more.\n"


def config_text(command: str, model: str, task: Path, name: str, found: Suggestion) -> str:
    """The configuration of a first run."""
    why = {option: f"  # {sentence}" for option, sentence in found.why.items()}
    lines = [f"{option}: {value}{why.get(option, '')}" for option, value in found.options.items()]
    return RUN.format(
        command=command,
        doubt="" if found.fits else TOO_LARGE,
        model=_quoted(model),
        task=_quoted(str(task)),
        options="\n".join(lines),
        passes=PASSES,
        out=_quoted(f"runs/{name}"),
    )


@dataclass(frozen=True)
class Written:
    """The files of a task and of its first run."""

    task: Path
    config: Path
    rows: Path
    """Of the task: the table itself, or its rows written anew."""
    guess: Guess
    notes: list[str]


def run_init(config: InitConfig) -> Written:
    """Read the table, and write the files.

    Raises:
        FileNotFoundError, ValueError: the table, its columns, the model or the directory are wrong; nothing is written.
    """
    table, out = Path(config.file), Path(config.out)
    frame = read_frame(table)
    found = guess(frame, config.text, config.label)
    rows, left_out = rows_of(frame, found)
    name = config.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", table.stem).strip("-.") or "mine"
    name = f"my-{name}" if name in task_names() else name
    tokenizer = load_tokenizer(config.model)
    texts = [" ".join(str(row[column]) for column in (*found.texts, found.label)) for row in rows]
    lengths = sorted(map(len, tokenize(tokenizer, texts)))
    suggestion = suggest(config.model, found, lengths[-1], len(rows) + TEST_ROWS, available_bytes())
    task, settings, own = out / f"{name}.yaml", out / f"{name}-fine-tune.yaml", out / f"{name}.jsonl"
    readable = _reads_as(table, rows)
    for path in (task, settings, *(() if readable else (own,))):
        if path.exists() and (not config.overwrite or path.resolve() == table.resolve()):
            way_out = "give another --name" if path.resolve() == table.resolve() else "give another --name, or --overwrite true"
            raise ValueError(f"{path} is there already: {way_out}; see {PAGE}")
    notes = [f"Of the table: {note}." for note in (*frame.notes, *left_out)]
    if not readable:
        notes.append(f"Its rows are written anew, to {own.name}: a task takes the values of a file as they stand.")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(own, lambda path: path.write_text(text, encoding="utf-8"))
    source = Path(os.path.relpath(table, out)) if readable else Path(own.name)
    check = f"l2l tasks check {task} --model {config.model}"
    text = task_text(name, table, source, found, notes, check)
    write_whole(task, lambda path: path.write_text(text, encoding="utf-8"))
    run = config_text(f"l2l fine-tune --config {settings}", config.model, task, name, suggestion)
    write_whole(settings, lambda path: path.write_text(run, encoding="utf-8"))
    return Written(task, settings, table if readable else own, found, notes)


def _reads_as(path: Path, rows: Sequence[Row]) -> bool:
    """Whether a task that reads the file itself would get these rows."""
    try:
        there = [row for _, row in read_file(path)]
    except ValueError:
        return False
    return len(there) == len(rows) and all(_same(row, own) for row, own in zip(there, rows, strict=True))


def _same(there: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    return all(there.get(name) == value for name, value in own.items())


def init_command(config: InitConfig) -> None:
    """Write the files, show three rendered examples with their tokens and the balance of labels, and say what to run."""
    written = run_init(config)
    found = written.guess
    what = "an answer to be written" if found.generates else "the right option"
    print(f"prompt: {', '.join(found.texts)}; {what}: {found.label}")
    print("\n".join(written.notes), end="\n" if written.notes else "")
    check_task(CheckConfig(str(written.task), config.model))
    print(f"written: {written.task}, {written.config}\nnext: l2l fine-tune --config {written.config}")
