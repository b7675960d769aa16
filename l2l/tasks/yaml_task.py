"""Tasks without code: a YAML file, in the field names of lm-evaluation-harness where they fit.

The file is data: nothing in it is run but jinja2 templates, and these in a sandbox. Whatever is wrong with it is one
line that names file, field or line, and the way out.
"""

import ast
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jinja2
import yaml
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from l2l.arguments import repeated_key
from l2l.tasks.base import Example, FileData, HubData, Row, Task
from l2l.tasks.sources import check_suffix, column_names

FIELDS = (
    "task",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "data_files",
    "training_split",
    "validation_split",
    "output_type",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "target_delimiter",
    "form",
    "metric_list",
    "metadata",
)
"""Fields of a task file."""

_UNSUPPORTED = {
    "description": "put its text at the head of doc_to_text",
    "test_split": "the rows to report on are those of validation_split",
    "generation_kwargs": "answers are generated greedily, up to the end of the line: remove it",
    "process_docs": "no Python is run: change the data instead",
    "process_results": "no Python is run: name a metric in metric_list",
    "include": "write the fields of that file out here",
    "num_fewshot": "prompts hold no further examples: remove it",
    "fewshot_split": "prompts hold no further examples: remove it",
    "fewshot_config": "prompts hold no further examples: remove it",
    "fewshot_delimiter": "prompts hold no further examples: remove it",
    "tag": "tasks are not grouped here: remove it",
    "group": "tasks are not grouped here: remove it",
    "should_decontaminate": "nothing is decontaminated here: remove it",
    "doc_to_decontamination_query": "nothing is decontaminated here: remove it",
}
"""Fields of lm-evaluation-harness that are not supported, and what to do instead."""

_METRICS: dict[str, dict[str, Literal["accuracy", "f1"]]] = {
    "multiple_choice": {"acc": "accuracy", "accuracy": "accuracy"},
    "generate_until": {"f1": "f1"},
}
"""Output type -> metrics by their names in a task file."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_REQUIRED = {
    "task": ("a name", "reviews"),
    "doc_to_text": ("the prompt", "'{{ text }} It was'"),
    "doc_to_target": ("the right answer", "label"),
}
"""Required fields with what to tell and to show a user who left them out."""

_FORMATS = ("json", "csv", "parquet")
"""What ``dataset_path`` may also say, in the manner of ``datasets``, where ``data_files`` names the files."""

_FIELD = re.compile(r"\s*(?:-\s+)?([\w.]+)\s*:")

_BARE_TEMPLATE = re.compile(r":\s*(\{\{|\{%)")


def read_task(file: Path, reserved: Collection[str] = ()) -> Task:
    """Read a task file and check it against the columns of its data files.

    Args:
        file: the YAML file; paths in it are relative to it.
        reserved: names that the task may not have, because they are taken.

    Raises:
        FileNotFoundError: there is no such file, or a data file that it names is absent.
        ValueError: it is not YAML, or a field is missing, unknown or wrong. Names file, field and the way out.
    """
    fields = read_yaml(file)
    for field in map(str, fields):
        if field in _UNSUPPORTED:
            raise ValueError(f"{file}: field {field!r} is not used here; {_UNSUPPORTED[field]}")
        if field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(FIELDS)}"
            raise ValueError(f"{file}: field {field!r} is unknown; {hint}")
    for field, (what, shown) in _REQUIRED.items():
        if fields.get(field) is None:
            raise ValueError(f"{file}: field {field!r} is missing; give {what}, as in {field}: {shown}")

    kind = fields.get("output_type", "multiple_choice" if "doc_to_choice" in fields else None)
    with field_errors(file, "output_type"):
        if not isinstance(kind, str) or kind not in _METRICS:
            raise ValueError(f"{kind!r} is not supported; use {' or '.join(_METRICS)}")
    generates = kind == "generate_until"
    if not generates and fields.get("doc_to_choice") is None:
        raise ValueError(f"{file}: field 'doc_to_choice' is missing; list the choices, as in doc_to_choice: [bad, good]")
    if generates and fields.get("doc_to_choice") is not None:
        raise ValueError(f"{file}: field 'doc_to_choice' has no use where answers are generated; remove it")

    source = _source(file, fields)
    renderer = _renderer(file, fields, generates)
    cells = {"doc_to_text": renderer.text, "doc_to_choice": renderer.choices, "doc_to_target": renderer.target}
    # A data set of the hub is checked when it is read.
    for path in (*source.train, *source.validation) if isinstance(source, FileData) else ():
        with field_errors(file, "data_files"):
            there = column_names(path)
        for field, cell in cells.items():
            for column in sorted(_columns(cell) - set(there)):
                near = difflib.get_close_matches(column, there, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "use one of these"
                has = f"{path} has {', '.join(there)}"
                raise ValueError(f"{file}: field {field!r}: there is no column {column!r}; {has}; {hint}")

    name = fields["task"]
    with field_errors(file, "task"):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name; use letters, digits, '_', '-' and '.'")
        if name in reserved:
            raise ValueError(f"{name!r} is a task of the package; give yours another name, so that figures stay apart")
    form = fields.get("form", "lm" if generates else "classification")
    with field_errors(file, "form"):
        if form not in ("lm", "classification"):
            raise ValueError(f"{form!r} is no form of loss; use classification or lm")
        if generates and form == "classification":
            raise ValueError("answers that are generated have no classification loss; use lm, or leave it out")
    known = _METRICS[kind]
    default = next(iter(known))
    with field_errors(file, "metric_list"):
        listed = fields.get("metric_list", [default])
        if not isinstance(listed, list) or len(listed) != 1:
            raise ValueError(f"{listed!r} must list one metric; use [{default}]")
        metric = listed[0].get("metric") if isinstance(listed[0], dict) else listed[0]
        if not isinstance(metric, str) or metric not in known:
            raise ValueError(f"metric {metric!r} is not known for output_type {kind}; use {' or '.join(known)}")
    with field_errors(file, "metadata"):
        metadata = fields.get("metadata", {"version": 1})
        version = metadata.get("version", 1) if isinstance(metadata, dict) else metadata
        whole = isinstance(version, int | float) and not isinstance(version, bool) and float(version).is_integer()
        if not isinstance(metadata, dict) or not whole or version < 0:
            raise ValueError(f"the version is {version!r}; give a whole number, as in metadata: {{version: 1}}")
    # A template may do without a column, so ``fields`` are empty: what is missing is found where a row is rendered.
    return Task(name, source, (), renderer.example, form, known[metric], int(version))


def _renderer(file: Path, fields: Mapping[str, Any], generates: bool) -> "RowRenderer":
    with field_errors(file, "doc_to_text"):
        text = _cell(fields["doc_to_text"])
    with field_errors(file, "doc_to_choice"):
        choices: tuple[CompiledTemplate, ...] | Cell | None = None
        if not generates:
            given = fields["doc_to_choice"]  # texts to choose from, or where a row has its own
            choices = tuple(map(compile_template, _check_choices(given))) if isinstance(given, list) else _cell(given)
    with field_errors(file, "doc_to_target"):
        target: Cell | int = fields["doc_to_target"]
        if not isinstance(target, int) or isinstance(target, bool) or choices is None:
            target = _cell(target)
        elif isinstance(choices, tuple):
            target = _gold_index(target, [choice.text for choice in choices])
    with field_errors(file, "target_delimiter"):
        delimiter = fields.get("target_delimiter", " ")
        if not isinstance(delimiter, str):
            raise ValueError(f"{delimiter!r} is no text; put it in quotes")
    return RowRenderer(file, text, choices, target, delimiter)


def _cell(value: object) -> "Cell":
    """A template where the text holds one, else the name of a column."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is neither a column's name nor a template such as '{{{{ text }}}}'")
    is_template = any(mark in value for mark in ("{{", "{%", "{#"))
    return compile_template(value) if is_template else value


def _columns(cell: "Sequence[Cell] | Cell | int | None") -> frozenset[str]:
    if isinstance(cell, str):
        return frozenset({cell})
    if isinstance(cell, CompiledTemplate):
        return cell.columns
    return frozenset().union(*map(_columns, cell)) if isinstance(cell, tuple) else frozenset()


# The file.


def read_yaml(file: Path) -> dict[str, Any]:
    """The fields of a YAML file. Tags that name Python, such as ``!function``, and fields given twice are refused."""
    if not file.is_file():
        raise FileNotFoundError(f"no task file {str(file)!r}; give the path of a YAML file, or the name of a task")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from error
    try:
        if twice := repeated_key(text):
            raise ValueError(f"{file}:{twice[1]}: field {twice[0]!r} stands there twice; remove one")
        fields = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        tag = re.search(r"tag '([^']*)'", error.problem or "")
        if tag is not None and isinstance(error, yaml.constructor.ConstructorError):
            named = _FIELD.match(text.splitlines()[line - 1])
            of = f" of field {named[1]!r}" if named else ""
            raise ValueError(
                f"{file}:{line}: the tag {tag[1]!r}{of} asks for code, and a task file is never run; write a template "
                "instead, such as doc_to_text: '{{ question }}', or put what the code makes into the rows of a file"
            ) from error
        # The most common syntax error is a bare template: an open brace begins a mapping in YAML.
        bare = any(_BARE_TEMPLATE.search(one) for one in text.splitlines()[max(0, line - 2) : line])
        quote = "put templates in quotes, as in doc_to_text: '{{ text }} It was'"
        hint = quote if bare else "check quotes, colons and indentation there"
        raise ValueError(f"{file}:{line}: not YAML: {error.problem}; {hint}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: must hold fields such as 'task: name', not {type(fields).__name__}")
    return fields


# Where rows come from.


def _source(file: Path, fields: Mapping[str, Any]) -> FileData | HubData:
    """The source that the fields ``data_files``, or ``dataset_path`` and those beside it, name."""
    kwargs = fields.get("dataset_kwargs") or {}
    known = ("revision", "data_files")
    with field_errors(file, "dataset_kwargs"):
        if not isinstance(kwargs, dict):
            raise ValueError(f"{kwargs!r} must be a mapping, as in dataset_kwargs: {{revision: main}}")
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} is not supported; use {' or '.join(known)}")
    path, files = fields.get("dataset_path"), fields.get("data_files", kwargs.get("data_files"))
    if files is not None and path not in (None, *_FORMATS):
        raise ValueError(f"{file}: field 'data_files' stands beside dataset_path {path!r}; remove one of the two")
    if files is None and path in _FORMATS:
        raise ValueError(f"{file}: field 'data_files' is missing; dataset_path {path} needs the files to read")
    if files is None and path is None:
        raise ValueError(
            f"{file}: field 'data_files' is missing; name your files, as in data_files: {{train: train.csv, "
            "validation: validation.csv}, or a data set of the hub by dataset_path"
        )
    train = _text_field(file, fields, "training_split") or "train"
    if files is None:
        return HubData(
            path=_text_field(file, fields, "dataset_path") or "",
            name=_text_field(file, fields, "dataset_name"),
            splits=(train, _text_field(file, fields, "validation_split") or train),
            revision=_text_field(file, kwargs, "revision"),
        )
    named = files if isinstance(files, dict) else {train: files}
    validation = _text_field(file, fields, "validation_split") or ("validation" if "validation" in named else train)
    with field_errors(file, "data_files"):
        for split in (train, validation):
            if split not in named:
                role = "training_split" if split == train else "validation_split"
                raise ValueError(f"has no split {split!r} but {', '.join(map(str, named))}; add it, or name {role}")
        idle = next((name for name in named if name not in (train, validation)), None)
        if idle is not None:
            raise ValueError(f"split {idle!r} is not used; name it as training_split or validation_split, or remove it")
        return FileData(_paths(file, named[train]), () if validation == train else _paths(file, named[validation]))


def _text_field(file: Path, fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{file}: field {name!r}: {value!r} is no text; put it in quotes")
    return value


def _paths(file: Path, value: object) -> tuple[Path, ...]:
    """Files of a split, relative to the task file."""
    names: Sequence[object] = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{value!r} names no file; give a path, or a list of paths")
    paths = tuple(file.parent / str(name) for name in names)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{file}: field 'data_files': no file {str(path)!r}; paths are relative to the task file: mend the path "
                "or put the file there"
            )
        check_suffix(path)
    return paths


# How a row is rendered.


@dataclass(frozen=True)
class CompiledTemplate:
    """A template, ready to render rows."""

    text: str
    columns: frozenset[str]
    """The columns that the template may ask a row for."""
    template: jinja2.Template

    def render(self, row: Row) -> str:
        """The text for a row. A column that the row lacks, and a null that would be printed, are ValueErrors."""
        try:
            return self.template.render(**row)
        except jinja2.UndefinedError as error:
            raise ValueError(f"{error.message}; the row has {', '.join(row)}") from error
        except (jinja2.TemplateError, ArithmeticError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"the template fails on this row: {error}") from error


def compile_template(text: str, environment: jinja2.Environment | None = None) -> CompiledTemplate:
    """Parse a template without running it, in an ``environment`` of :func:`sandbox`; None: one without further filters.

    Raises:
        ValueError: it cannot be parsed.
    """
    environment = environment or _ENVIRONMENT
    try:
        parsed, template = environment.parse(text), environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"template syntax, line {error.lineno} of the text: {error.message}") from error
    names = find_undeclared_variables(parsed) - environment.globals.keys()
    return CompiledTemplate(text, frozenset(names), template)


def _not_null(value: object) -> object:
    """Refuse to print null, which jinja2 would print as the word None."""
    if value is None:
        raise ValueError("a value that the template prints is null")
    return value


def sandbox() -> jinja2.Environment:
    """A sandbox: a template can neither reach into Python nor change a row. A last newline is kept."""
    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_not_null)


_ENVIRONMENT = sandbox()


Cell: TypeAlias = str | CompiledTemplate
"""One value per row: that of a column, by its name, or the text of a template."""


@dataclass(frozen=True)
class RowRenderer:
    """Prompt, options and target of a row, as the fields of a task file define them."""

    file: Path
    """The task file, for messages."""
    text: Cell
    choices: tuple[CompiledTemplate, ...] | Cell | None
    """``None`` where the answer is generated."""
    target: Cell | int
    """An int is the same right choice for every row."""
    delimiter: str = " "
    """Stands between prompt and option."""

    def example(self, row: Row) -> Example:
        """Render a row. A field that fails on it is a ValueError that names file and field."""
        with field_errors(self.file, "doc_to_text"):
            prompt = _text(_value(self.text, row), "prompt")
        if self.choices is None:
            with field_errors(self.file, "doc_to_target"):
                answers = tuple(_text(one, "answer").strip() for one in _targets(self.target, row, "answer"))
            return Example(prompt, (f"{self.delimiter}{answers[0]}\n",), answers=answers)
        with field_errors(self.file, "doc_to_choice"):
            if isinstance(self.choices, tuple):
                choices = _check_choices([choice.render(row) for choice in self.choices])
            else:
                choices = _check_choices(_listed(self.choices, row))
        with field_errors(self.file, "doc_to_target"):
            gold = tuple(_gold_index(one, choices) for one in _targets(self.target, row, "target"))
        return Example(prompt, tuple(self.delimiter + choice for choice in choices), gold)


@contextmanager
def field_errors(file: Path, field: str) -> Iterator[None]:
    """Put file and field before the message of a ValueError raised within."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: field {field!r}: {error}") from error


def _check_choices(values: Sequence[Any]) -> tuple[str, ...]:
    """Require at least two choices that are texts, not blank, and differ."""
    for value in values:
        if isinstance(value, bool):
            raise ValueError(f"the choice {value} is no text; YAML reads yes, no, true and on so: put it in quotes")
        if not isinstance(value, str):
            raise ValueError(f"the choice {value!r} is no text; put it in quotes")
        if not value.strip():
            raise ValueError(f"the choice {value!r} is blank; give each a text")
    if len(values) < 2:
        raise ValueError(f"{len(values)} choices in {list(values)}; give two or more to choose from")
    twice = next((value for value in values if list(values).count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"the choice {twice!r} stands there twice; a model could not tell them apart: remove one")
    return tuple(values)


def _gold_index(value: object, choices: Sequence[str]) -> int:
    """Index of the choice that a target names by its text or by its number from 0.

    A text that equals a choice names it, even where it is a number; other digits are an index.
    """
    if isinstance(value, str):
        texts = [choice.strip() for choice in choices]
        if value.strip() in texts:
            return texts.index(value.strip())
        if not (value.strip().isascii() and value.strip().isdecimal()):
            near = difflib.get_close_matches(value.strip(), texts, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{value!r} is none of the choices {', '.join(map(repr, texts))}{hint}; give one, or its index")
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is neither a choice's text nor its index; give one of these")
    if not 0 <= value < len(choices):
        raise ValueError(f"index {int(value)} is out of range: the {len(choices)} choices count from 0 to {len(choices) - 1}")
    return int(value)


def _value(cell: Cell, row: Row) -> Any:
    if isinstance(cell, CompiledTemplate):
        return cell.render(row)
    if cell not in row:
        raise ValueError(f"no column {cell!r}; the row has {', '.join(row)}")
    value = row[cell]
    if value is None:
        raise ValueError(f"column {cell!r} is null in this row; fill it or drop the row")
    return value


def _targets(target: Cell | int, row: Row, what: str) -> Sequence[Any]:
    """The values of the target: one, or those of a column that holds a list or of a template that prints one."""
    value: Any = target if isinstance(target, int) else _value(target, row)
    if isinstance(target, CompiledTemplate) and value.startswith("[") and value.endswith("]"):
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError(f"there is no {what} in this row; give one or drop the row")
    return values


def _text(value: object, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the {what} must be a text, not {value!r}")
    if not str(value).strip():
        raise ValueError(f"the {what} is blank in this row; fill it or drop the row")
    return str(value)


def _listed(cell: Cell, row: Row) -> Sequence[Any]:
    """The list that a column holds, or that a template prints, such as ``{{ [first, second] }}``."""
    value = text = _value(cell, row)
    if isinstance(cell, CompiledTemplate):
        value = None
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text.strip())
    if isinstance(value, list | tuple):
        return value
    if isinstance(cell, str):
        raise ValueError(f"column {cell!r} must hold a list of choices, not {value!r}")
    raise ValueError(f"the template must print a list, such as {{{{ [first, second] }}}}; got {text!r}")
