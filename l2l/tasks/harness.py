"""Tasks of lm-evaluation-harness: its YAML files give the tasks of the package, with prompts, scores and metrics as there.

A file is known by fields that only the harness has, or by ``output_type`` beside ``dataset_path``; one with ``data_files`` or
``form`` is of the package's own kind (:mod:`l2l.tasks.yaml_task`). It is data: templates are rendered in a sandbox, and
whatever would run Python is refused. :data:`FIELDS` says of every field what becomes of it.
"""

import ast
import difflib
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from l2l.tasks import yaml_task
from l2l.tasks.base import Example, FileData, HubData, Row, Scoring, Task
from l2l.tasks.sources import check_suffix, column_names, hub_rows, read_file
from l2l.tasks.yaml_task import Cell, CompiledTemplate, compile_template, field_errors, read_yaml, sandbox

Status: TypeAlias = Literal["supported", "ignored", "refused"]
Kind: TypeAlias = Literal["multiple_choice", "loglikelihood", "generate_until"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Field:
    """What becomes of a field of the harness."""

    status: Status
    """``refused``: a file that gives it a value is an error."""
    what: str
    """How it is read; why it has no effect; or why it is refused, and the way out."""


_NO_CODE = "it names Python, and no code of a task file is run"
_IN_ROWS = "write what it makes into a file of JSON lines and name that in dataset_kwargs.data_files"

FIELDS: Mapping[str, Field] = {
    "include": Field("supported", "path of a file, or a list, whose fields hold where this one has none"),
    "task": Field(
        "supported", "the name; that of a task of the package gets `harness_` before it. A list is refused: it is a group"
    ),
    "task_alias": Field("ignored", "tables show the name"),
    "tag": Field("ignored", "tasks are named one by one"),
    "group": Field(
        "refused", "a group names several tasks, and figures are of one; give the file of one of them, or call it tag"
    ),
    "group_alias": Field("refused", "a group names several tasks; give the file of one of them"),
    "aggregate_metric_list": Field("refused", "a group names several tasks; give the file of one of them"),
    "class": Field("refused", f"{_NO_CODE}; describe the task by doc_to_text, doc_to_choice and doc_to_target"),
    "custom_dataset": Field("refused", f"{_NO_CODE}; {_IN_ROWS}"),
    "dataset_path": Field("supported", "a data set of the hub; or `json`, `csv` or `parquet` with files in `dataset_kwargs`"),
    "dataset_name": Field("supported", "config of the hub's data set"),
    "dataset_kwargs.data_files": Field(
        "supported", "a path, a list, or these by split; looked for in the working directory, then beside the file"
    ),
    "dataset_kwargs.revision": Field("supported", "commit, tag or branch of the hub's data set"),
    "dataset_kwargs.trust_remote_code": Field("ignored", "code of a data set is never run"),
    "training_split": Field(
        "supported",
        "rows to train on; without it a fixed 1 in 5 of the rows to report on is kept for that, the rest are trained on",
    ),
    "validation_split": Field("supported", "rows to report on, where there is no `test_split`"),
    "test_split": Field("supported", "rows to report on"),
    "output_type": Field("supported", "`multiple_choice`, `loglikelihood` or `generate_until` (the default)"),
    "doc_to_text": Field(
        "supported", "the prompt: a column or a template. A number, for inputs that differ by choice, is refused"
    ),
    "doc_to_choice": Field(
        "supported", "the choices: a list of texts, a mapping, a column of lists, or a template that prints a list"
    ),
    "doc_to_target": Field(
        "supported",
        "index or text of the right choice, or the text to write: a number, a column or a template; a list: several are right",
    ),
    "doc_to_image": Field("refused", "models here read text; describe the image in a column of the rows"),
    "doc_to_audio": Field("refused", "models here read text; put what is said into a column of the rows"),
    "target_delimiter": Field(
        "supported", "between prompt and choice, and before a written answer that is trained on; a space"
    ),
    "description": Field("supported", "text, template or column that opens the prompt"),
    "gen_prefix": Field("refused", "the answer's beginning is part of the prompt; write it at the end of doc_to_text"),
    "num_fewshot": Field("supported", "solved rows before each prompt; 0"),
    "fewshot_split": Field("supported", "where they come from; without it the `training_split`"),
    "fewshot_delimiter": Field(
        "supported", "after each of them, and after a written answer where there is no `until`; an empty line"
    ),
    "fewshot_config.sampler": Field("supported", "`first_n`; others draw at random, and are refused where rows are asked for"),
    "fewshot_config.split": Field("supported", "as `fewshot_split`, before it"),
    "fewshot_config.samples": Field("supported", "a list of rows, where there is no split"),
    "fewshot_config.doc_to_text": Field("supported", "as above, of the solved rows"),
    "fewshot_config.doc_to_choice": Field("supported", "as above, of the solved rows"),
    "fewshot_config.doc_to_target": Field("supported", "as above, of the solved rows"),
    "fewshot_config.target_delimiter": Field("supported", "as above, of the solved rows"),
    "fewshot_config.fewshot_delimiter": Field("supported", "as above, of the solved rows"),
    "fewshot_config.fewshot_indices": Field(
        "refused", "the harness does not read it either; list the rows in fewshot_config.samples"
    ),
    "fewshot_config.process_docs": Field("refused", f"{_NO_CODE}; {_IN_ROWS}"),
    "fewshot_config.gen_prefix": Field(
        "refused", "it is part of the question; write it at the end of fewshot_config.doc_to_text"
    ),
    "generation_kwargs.until": Field("supported", "a text or a list: the answer ends before the first of them"),
    "generation_kwargs.max_gen_toks": Field(
        "supported", "most tokens of an answer; 256. Holds before a run's `max_new_tokens`"
    ),
    "generation_kwargs.max_new_tokens": Field("supported", "as `max_gen_toks`"),
    "generation_kwargs.max_tokens": Field("supported", "as `max_gen_toks`"),
    "generation_kwargs.max_completion_tokens": Field("supported", "as `max_gen_toks`"),
    "generation_kwargs.do_sample": Field("supported", "`false`; answers are the likeliest, and `true` is refused"),
    "generation_kwargs.temperature": Field("supported", "0; above that with sampling it is refused"),
    "metric_list.metric": Field(
        "supported", "`acc`, `acc_norm`, `acc_bytes`; of `loglikelihood` `acc`, `perplexity`; of `generate_until` `exact_match`"
    ),
    "metric_list.aggregation": Field("supported", "`mean`, and `perplexity` of `perplexity`: what they are without it"),
    "metric_list.higher_is_better": Field("supported", "`true`, and `false` of `perplexity`: what it is without it"),
    "metric_list.hf_evaluate": Field("refused", "it loads code of the hub; name a metric without it"),
    "metric_list.ignore_case": Field("supported", "of `exact_match`"),
    "metric_list.ignore_punctuation": Field("supported", "of `exact_match`"),
    "metric_list.ignore_numbers": Field("supported", "of `exact_match`"),
    "metric_list.regexes_to_ignore": Field("supported", "of `exact_match`; removed before texts are compared"),
    "filter_list": Field(
        "refused",
        "answers are compared as they are written; end them by generation_kwargs.until, or ignore by regexes_to_ignore",
    ),
    "repeats": Field("supported", "1; an answer that is the likeliest is the same each time, and more are refused"),
    "process_docs": Field("refused", f"{_NO_CODE}; {_IN_ROWS}"),
    "process_results": Field("refused", f"{_NO_CODE}; name a metric in metric_list"),
    "use_prompt": Field(
        "refused", "prompts of promptsource are in a package of their own; write the template into doc_to_text"
    ),
    "unsafe_code": Field(
        "refused", "it lets code that a model writes run, and none is; leave it out with the metric that needs it"
    ),
    "should_decontaminate": Field("ignored", "nothing is decontaminated"),
    "doc_to_decontamination_query": Field("ignored", "nothing is decontaminated"),
    "metadata": Field(
        "supported", "`version`, a number, of which the whole part shows in names of tasks; the rest has no effect"
    ),
}
"""Every field of the harness's ``TaskConfig``, and what stands in a file beside these; a dot leads into a field."""

METRICS: Mapping[Kind, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "loglikelihood": ("perplexity", "acc"),
    "generate_until": ("exact_match",),
}
"""Metrics of each output type."""
_DEFAULT_METRICS: Mapping[Kind, tuple[str, ...]] = {**METRICS, "multiple_choice": ("acc", "acc_norm")}
"""What a file has that lists none."""

_OWN = frozenset(("data_files", "form"))
"""Fields that the harness does not have."""
_PARTS = ("dataset_kwargs", "fewshot_config", "generation_kwargs", "metric_list")
"""Fields whose own fields stand in the table."""
_TOP = frozenset(name.partition(".")[0] for name in FIELDS)
_FORMATS = ("json", "csv", "parquet")
_IGNORABLE = ("ignore_case", "ignore_punctuation", "ignore_numbers")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""In the harness's order: the first that is there holds."""
_MAX_GEN_TOKS = 256
_BARE_NAME = re.compile(r"[A-Za-z_]\w*")


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    return re.sub(pattern, repl, string, count=count)


_ENVIRONMENT = sandbox()
_ENVIRONMENT.filters["regex_replace"] = _regex_replace  # the one filter that the harness adds


def is_harness(fields: Mapping[str, Any]) -> bool:
    """Whether a task file is one of the harness, by its fields."""
    names = set(map(str, fields))
    if names & _OWN:
        return False
    return bool(names & (_TOP - set(yaml_task.FIELDS))) or {"output_type", "dataset_path"} <= names


def read_task_file(file: Path, reserved: Collection[str] = ()) -> Task:
    """Read a task file of either kind.

    Args:
        file: the YAML file.
        reserved: names of tasks of the package. A file of the package's own kind may not have one of them.

    Raises:
        FileNotFoundError, ValueError: as :func:`l2l.tasks.yaml_task.read_task` and :func:`read_harness_task`.
    """
    fields = read_yaml(file)
    return read_harness_task(file, reserved) if is_harness(fields) else yaml_task.read_task(file, reserved)


def read_harness_task(file: Path, reserved: Collection[str] = ()) -> Task:
    """Read a task file of the harness and check it against the columns of its data files.

    Fields that have no effect here are named in one line, the first time that the file is read.

    Raises:
        FileNotFoundError: there is no such file, or one that it names is absent.
        ValueError: a field is refused, unknown, missing or wrong. Names file, field and the way out.
    """
    fields = _checked(file, _with_included(file, ()))
    kind, data = _kind(file, fields), _data(file, fields)
    metrics, ignored = _metrics(file, fields, kind)
    until, most = _generation(file, fields) if kind == "generate_until" else ((), 0)
    renderer = HarnessRenderer(
        file,
        kind,
        _turn(file, fields, fields, kind, data),
        _cell(file, fields, "description", data) if fields.get("description") else None,
        _demonstrations(file, fields, kind, data),
        next(iter(until), ""),
    )
    return Task(
        name=_name(file, fields, reserved),
        source=data.source,
        fields=(),  # a template may do without a column: what is missing is found where a row is rendered
        example=renderer.example,
        form="classification" if kind == "multiple_choice" else "lm",
        metric="exact_match" if kind == "generate_until" else "accuracy",
        version=_version(file, fields),
        scoring=Scoring(metrics, until, most, **ignored),
    )


# The file.


def _with_included(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The fields of a file, and of those it includes where it does not have them."""
    fields, found = read_yaml(file), {}
    included = fields.pop("include", None) or []
    with field_errors(file, "include"):
        for name in included if isinstance(included, list) else [included]:
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is no path; give that of a YAML file, relative to this one")
            path = file.parent / name
            if path.resolve() in (*above, file.resolve()):
                raise ValueError(f"{name!r} includes this file again; take one of the two lines out")
            if not path.is_file():
                raise ValueError(f"there is no file {str(path)!r}; paths are relative to this file: mend it")
            found |= _with_included(path, (*above, file.resolve()))
    return found | fields


def _checked(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that have a value, once none is unknown or refused. Says once which have no effect."""
    given = {str(name): value for name, value in fields.items() if value is not None}
    names = [name for name in map(str, fields) if name not in _PARTS or name not in given]
    for part in _PARTS:
        values = given.get(part)
        with field_errors(file, part):
            many = part == "metric_list"
            if values is not None and not isinstance(values, list if many else dict):
                shown = (
                    "[{metric: acc}]" if many else f"{{{next(n for n in FIELDS if n.startswith(part)).partition('.')[2]}: …}}"
                )
                raise ValueError(f"{values!r} has another form; write it as {part}: {shown}")
        for one in (values or []) if many else [values or {}]:
            with field_errors(file, part):
                if not isinstance(one, dict):
                    raise ValueError(f"{one!r} has another form; write it as {part}: [{{metric: {one}}}]")
            names += [f"{part}.{name}" for name, value in one.items() if value is not None]
    idle = []
    for name in dict.fromkeys(names):
        field = FIELDS.get(name)
        if field is None and name not in _TOP:
            near = difflib.get_close_matches(name, [*FIELDS, *_PARTS], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "docs/harness.md lists those there are"
            raise ValueError(f"{file}: field {name!r} is unknown; {hint}")
        if field is not None and _has_value(name, given):
            if field.status == "refused":
                raise ValueError(f"{file}: field {name!r} is refused: {field.what}")
            idle += [f"{name} ({field.what})"] if field.status == "ignored" else []
    if idle:
        _say_once(f"{file}: without effect here: {', '.join(idle)}")
    return given


def _has_value(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a field says more than what is so without it: false, an empty text or list."""
    part, _, inner = name.partition(".")
    value = given.get(part)
    if not inner:
        return bool(value)
    return any(one.get(inner) not in (False, "", [], None) for one in (value if isinstance(value, list) else [value or {}]))


@cache
def _say_once(line: str) -> None:
    logger.warning("%s", line)


def _kind(file: Path, fields: Mapping[str, Any]) -> Kind:
    kind = fields.get("output_type", "generate_until")
    with field_errors(file, "output_type"):
        if kind not in METRICS:
            raise ValueError(f"{kind!r} is not supported here; the output types are {', '.join(METRICS)}")
    for name, shown in (("task", "reviews"), ("doc_to_text", "'{{ text }} It was'"), ("doc_to_target", "label")):
        if fields.get(name) is None:
            raise ValueError(f"{file}: field {name!r} is missing; write it as in {name}: {shown}")
    if kind == "multiple_choice" and "doc_to_choice" not in fields:
        raise ValueError(f"{file}: field 'doc_to_choice' is missing; list the choices, as in doc_to_choice: [bad, good]")
    if kind == "loglikelihood" and "doc_to_choice" in fields:
        raise ValueError(
            f"{file}: field 'doc_to_choice' has no effect on a loglikelihood; take it out, or make it multiple_choice"
        )
    with field_errors(file, "repeats"):
        if fields.get("repeats", 1) != 1:
            raise ValueError(f"{fields['repeats']!r}: the likeliest answer is the same each time; take the field out")
    return kind


def _name(file: Path, fields: Mapping[str, Any], reserved: Collection[str]) -> str:
    name = fields["task"]
    with field_errors(file, "task"):
        if isinstance(name, list):
            raise ValueError("a list of tasks is a group, and figures are of one; give the file of one of them")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(f"{name!r} is no name; it may have letters, digits, '_', '-' and '.'")
    # Another prompt and another score than the package's own, so that figures stay apart.
    return f"harness_{name}" if name in reserved else name


def _version(file: Path, fields: Mapping[str, Any]) -> int:
    metadata = fields.get("metadata", {})
    version = metadata.get("version", 1) if isinstance(metadata, dict) else metadata
    with field_errors(file, "metadata"):
        if isinstance(version, bool) or not isinstance(version, int | float) or not 0 <= version < 1e9:
            raise ValueError(f"the version is {version!r}; write a number, as in metadata: {{version: 1}}")
    return int(version)


def _metrics(file: Path, fields: Mapping[str, Any], kind: Kind) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of metrics, and what exact_match ignores."""
    entries, ignored = fields.get("metric_list") or [{"metric": name} for name in _DEFAULT_METRICS[kind]], {}
    for entry in entries:
        metric = entry.get("metric")
        with field_errors(file, "metric_list"):
            if metric not in METRICS[kind]:
                raise ValueError(
                    f"metric {metric!r} is not computed of output_type {kind}; list one of {', '.join(METRICS[kind])}"
                )
            mean = "perplexity" if metric == "perplexity" else "mean"
            if entry.get("aggregation", mean) != mean:
                raise ValueError(f"aggregation {entry['aggregation']!r} of {metric} is not computed; write {mean}")
            if entry.get("higher_is_better", mean == "mean") != (mean == "mean"):
                raise ValueError(f"higher_is_better: {entry['higher_is_better']} is not so of {metric}; take it out")
            asked = {name: entry[name] for name in (*_IGNORABLE, "regexes_to_ignore") if name in entry}
            if asked and metric != "exact_match":
                raise ValueError(f"{next(iter(asked))} belongs to exact_match, not to {metric}; take it out")
            for name in _IGNORABLE:
                if not isinstance(asked.get(name, False), bool):
                    raise ValueError(f"{name}: {asked[name]!r} is neither true nor false; write one of these")
            patterns = asked.get("regexes_to_ignore") or []
            for pattern in patterns if isinstance(patterns, list) else [patterns]:
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise ValueError(f"regexes_to_ignore: {pattern!r} is no regular expression: {error}; mend it") from error
            ignored |= asked
    if "regexes_to_ignore" in ignored:
        patterns = ignored["regexes_to_ignore"] or []
        ignored["regexes_to_ignore"] = tuple(patterns) if isinstance(patterns, list) else (patterns,)
    names = tuple(dict.fromkeys(entry["metric"] for entry in entries))
    return (names if names != ("perplexity",) else (*names, "acc")), ignored  # a perplexity alone is no share of rows


def _generation(file: Path, fields: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Texts that end an answer, and its most tokens."""
    given = fields.get("generation_kwargs", {})
    with field_errors(file, "generation_kwargs"):
        sampled, temperature = given.get("do_sample"), given.get("temperature", 0)
        if sampled or (sampled is None and temperature):
            raise ValueError(
                f"do_sample: {sampled}, temperature: {temperature} draws answers at random, and here they are the likeliest; "
                "write do_sample: false"
            )
        until = given.get("until", [fields.get("fewshot_delimiter", "\n\n")])
        until = until if isinstance(until, list) else [until]
        if not all(isinstance(one, str) for one in until):
            raise ValueError(f"until: {until!r} holds what is no text; put it in quotes")
        most = next((given[name] for name in _LENGTHS if given.get(name) is not None), _MAX_GEN_TOKS)
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"max_gen_toks: {most!r} is no number of tokens; write a whole number from 1")
    return tuple(filter(None, until)), most


# Where rows come from.


@dataclass(frozen=True)
class _Data:
    """The rows that a file names."""

    source: FileData | HubData
    files: Mapping[str, tuple[Path, ...]]
    """Of each split; empty where the hub has the rows."""
    columns: tuple[str, ...] | None
    """Of all files; None of a data set of the hub, whose columns are known when it is read."""
    texts: bool
    """Whether cells are texts, as those of CSV are; the harness reads numbers in them."""

    def rows(self, split: str) -> Iterable[Row]:
        """The first rows of a split, in order."""
        if isinstance(self.source, HubData):
            one = HubData(self.source.path, self.source.name, (split, split), self.source.revision)
            return hub_rows(one, "train", lambda total: list(range(min(total, _POOL))))
        return (row for path in self.files[split] for _, row in read_file(path))


_POOL = 1000
"""Most rows of a hub's split among which the first that differ from a row are looked for."""


def _data(file: Path, fields: Mapping[str, Any]) -> _Data:
    path, kwargs = fields.get("dataset_path"), fields.get("dataset_kwargs", {})
    with field_errors(file, "dataset_path"):
        if not isinstance(path, str) or not path.strip():
            raise ValueError(f"{path!r} names no data; write a name of the hub, or json with dataset_kwargs: {{data_files: …}}")
    names = {name: _text(file, fields, name) for name in ("training_split", "validation_split", "test_split")}
    reported = names["test_split"] or names["validation_split"] or names["training_split"]
    if reported is None:
        raise ValueError(
            f"{file}: field 'validation_split' is missing; name the split to report on, as in validation_split: test"
        )
    trained = names["training_split"] or reported
    if trained == reported:
        _say_once(f"{file}: trained on and reported on is split {reported!r}: a fixed share of it is kept to report on")
    files = kwargs.get("data_files")
    if path not in _FORMATS:
        if files is not None:
            raise ValueError(
                f"{file}: field 'dataset_kwargs.data_files' stands beside dataset_path {path!r}; keep one of the two"
            )
        source = HubData(path, _text(file, fields, "dataset_name"), (trained, reported), _text(file, kwargs, "revision"))
        return _Data(source, {}, None, texts=False)
    with field_errors(file, "dataset_kwargs.data_files"):
        if not files:
            raise ValueError(
                f"is missing; dataset_path {path} needs it, as in data_files: {{train: train.jsonl, test: test.jsonl}}"
            )
        named = {name: _paths(file, value) for name, value in (files if isinstance(files, dict) else {"train": files}).items()}
        wanted = dict.fromkeys(filter(None, (trained, reported, _shot_split(file, fields))))
        absent = next((name for name in wanted if name not in named), None)
        if absent is not None:
            raise ValueError(f"has no split {absent!r} but {', '.join(map(str, named))}; add it, or name another one")
    paths = [one for split in wanted for one in named[split]]
    columns = tuple(dict.fromkeys(column for one in paths for column in column_names(one)))
    source = FileData(named[trained], () if trained == reported else named[reported])
    return _Data(source, named, columns, texts=path == "csv")


def _text(file: Path, fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{file}: field {name!r}: {value!r} is no text; put it in quotes")
    return value or None


def _paths(file: Path, value: object) -> tuple[Path, ...]:
    """Files of a split: of the working directory, as ``datasets`` has it, else beside the task file."""
    found = []
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} names no file; give a path, or a list of paths")
        if "://" in name:
            raise ValueError(f"{name!r} is an address; download the file, and give its path")
        path = next((one for one in (Path(name), file.parent / name) if one.is_file()), None)
        if path is None:
            raise ValueError(f"no file {name!r}, neither in {Path.cwd()} nor in {file.parent}; mend the path or put it there")
        check_suffix(path)
        found.append(path)
    return tuple(found)


# How a row is rendered.


@dataclass(frozen=True)
class _Turn:
    """A row as question and answer."""

    text: Cell
    choices: tuple[str, ...] | Cell | None
    target: Cell | int | tuple[Any, ...]
    delimiter: str
    after: str
    """Stands after the answer of a solved row."""
    texts: bool
    """Whether digits in a column are numbers: cells of CSV."""

    def question(self, row: Row) -> str:
        """Raises ValueError where there is none."""
        value = _value(self.text, row)
        if not isinstance(value, str):
            raise ValueError(
                f"the prompt must be a text, not {value!r}; the harness takes a number for inputs that differ by choice"
            )
        if self.choices is not None and value.isdigit():
            raise ValueError(
                f"the prompt {value!r} is a number, which the harness takes for inputs that differ by choice: add words"
            )
        return value

    def options(self, row: Row) -> tuple[str, ...]:
        """The choices of a row; none where there are none to choose from."""
        if self.choices is None or isinstance(self.choices, tuple):
            return self.choices or ()
        value = _value(self.choices, row)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise ValueError(f"the template must print a list, such as {{{{ [first, second] }}}}; got {value!r}") from None
        return _texts_of(value)

    def answer(self, row: Row) -> Any:
        """The target of a row as the harness has it: an index, a text, or a list of one of these."""
        if not isinstance(self.target, CompiledTemplate | str):
            return list(self.target) if isinstance(self.target, tuple) else self.target
        value = _value(self.target, row)
        rendered = isinstance(self.target, CompiledTemplate) and self.target.text not in row
        if isinstance(value, str) and (rendered or self.texts):
            if self.choices is not None and value.isdigit():
                return int(value)
            if rendered and value.startswith("[") and value.endswith("]"):
                try:
                    return ast.literal_eval(value)
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    return value
        return value

    def solved(self, row: Row) -> str:
        """Question and answer."""
        value, choices = self.answer(row), self.options(row)
        value = value[0] if isinstance(value, list) and value else value
        if choices and isinstance(value, int):
            value = choices[_index(value, choices)]
        return f"{self.question(row)}{self.delimiter}{value}{self.after}"


@dataclass(frozen=True)
class _Demonstrations:
    """Solved rows before the prompt: the first of a split that differ from the row."""

    count: int
    turn: _Turn
    split: str | None
    samples: tuple[Row, ...]
    data: _Data

    @cached_property
    def pool(self) -> tuple[Row, ...]:
        """Enough of the first rows that, without those equal to any one row, ``count`` are left; or all there are."""
        found: list[Row] = []
        equal: Counter[str] = Counter()
        for row in self.samples if self.split is None else self.data.rows(self.split):
            found.append(row)
            equal[_same(row)] += 1
            if len(found) - max(equal.values()) >= self.count:
                break
        return tuple(found)

    def before(self, row: Row) -> str:
        """The text of the solved rows. ValueError where there are too few."""
        own = _same(row)
        shown = list(islice((one for one in self.pool if _same(one) != own), self.count))
        if len(shown) < self.count:
            raise ValueError(f"{self.count} solved rows were asked for, and {len(shown)} others are there; lower num_fewshot")
        return "".join(map(self.turn.solved, shown))


@dataclass(frozen=True)
class HarnessRenderer:
    """Prompt, options and references of a row, as the fields of a file define them."""

    file: Path
    """The task file, for messages."""
    kind: Kind
    turn: _Turn
    description: Cell | None
    """Opens the prompt."""
    demonstrations: _Demonstrations | None
    end: str
    """Ends a written answer that is trained on."""

    def example(self, row: Row) -> Example:
        """Render a row. A field that fails on it is a ValueError that names file and field."""
        opening = ""
        if self.description is not None:
            with field_errors(self.file, "description"):
                opening = str(_value(self.description, row))
        if self.demonstrations is not None:
            with field_errors(self.file, "num_fewshot"):
                opening += self.demonstrations.before(row)
        with field_errors(self.file, "doc_to_text"):
            prompt = opening + self.turn.question(row)
            if not prompt.strip():
                raise ValueError(
                    "the prompt is blank in this row; a model needs something to go on from: fill it or drop the row"
                )
        with field_errors(self.file, "doc_to_choice"):
            choices = self.turn.options(row)
        with field_errors(self.file, "doc_to_target"):
            target = self.turn.answer(row)
            if self.kind == "multiple_choice":
                gold = tuple(_index(one, choices) for one in (target if isinstance(target, list) else [target]))
                return Example(prompt, tuple(self.turn.delimiter + choice for choice in choices), gold, choices=choices)
            if self.kind == "loglikelihood":
                if not isinstance(target, str) or not target:
                    raise ValueError(f"the text to predict is {target!r}; give one, or drop the row")
                return Example(prompt, (target,), choices=(target,))
            if choices:
                target = choices[_index(target, choices)]
            answers = tuple(map(str, target)) if isinstance(target, list) else (str(target),)
            if not answers or not answers[0].strip():
                raise ValueError("the answer is blank in this row; fill it or drop the row")
            return Example(prompt, (f"{self.turn.delimiter}{answers[0]}{self.end}",), answers=answers)


def _turn(file: Path, fields: Mapping[str, Any], over: Mapping[str, Any], kind: Kind, data: _Data) -> _Turn:
    """Question and answer by the fields of ``over``, where they are there, else of ``fields``."""
    both = {**fields, **{name: value for name, value in over.items() if value is not None}}
    given, choices, target = both.get("doc_to_choice"), None, both["doc_to_target"]
    with field_errors(file, "doc_to_choice"):
        if isinstance(given, list | dict):
            choices = _texts_of(list(given.values()) if isinstance(given, dict) else given)
        elif given is not None:
            choices = _cell(file, both, "doc_to_choice", data)
    with field_errors(file, "doc_to_target"):
        if isinstance(target, list):
            target = tuple(target)
        elif not isinstance(target, int) or kind != "multiple_choice":
            target = _cell(
                file, both | {"doc_to_target": str(target) if isinstance(target, int) else target}, "doc_to_target", data
            )
        elif isinstance(choices, tuple):
            target = _index(target, choices)
    delimiters = both.get("target_delimiter", " "), both.get("fewshot_delimiter", "\n\n")
    for name, value in zip(("target_delimiter", "fewshot_delimiter"), delimiters, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"{file}: field {name!r}: {value!r} is no text; put it in quotes")
    return _Turn(_cell(file, both, "doc_to_text", data), choices, target, *delimiters, data.texts)


def _shot_split(file: Path, fields: Mapping[str, Any]) -> str | None:
    """The split of solved rows; None where none are asked for, or a list gives them."""
    given = fields.get("fewshot_config", {})
    if not fields.get("num_fewshot"):
        return None
    split = _text(file, given, "split") or _text(file, fields, "fewshot_split")
    return split or (None if given.get("samples") else _text(file, fields, "training_split"))


def _demonstrations(file: Path, fields: Mapping[str, Any], kind: Kind, data: _Data) -> _Demonstrations | None:
    count, given = fields.get("num_fewshot", 0), fields.get("fewshot_config", {})
    with field_errors(file, "num_fewshot"):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{count!r} is no number of rows; write a whole number from 0")
    if not count:
        return None
    with field_errors(file, "fewshot_config.sampler"):
        sampler = given.get("sampler", "default")
        if sampler != "first_n":
            raise ValueError(
                f"{sampler!r} draws other solved rows for each row, by the order in which they are scored; write "
                "fewshot_config: {sampler: first_n}, or num_fewshot: 0"
            )
    split, samples = _shot_split(file, fields), given.get("samples") or []
    with field_errors(file, "fewshot_config.samples"):
        if not isinstance(samples, list) or not all(isinstance(one, dict) for one in samples):
            raise ValueError("is no list of rows; write it as samples: [{text: …, label: 0}]")
    if split is None and not samples:
        raise ValueError(
            f"{file}: field 'fewshot_split' is missing; name the split of the solved rows, as in fewshot_split: train"
        )
    return _Demonstrations(count, _turn(file, fields, given, kind, data), split, tuple(samples), data)


def _cell(file: Path, fields: Mapping[str, Any], name: str, data: _Data) -> Cell:
    """A column, or a template. ValueError where it asks for a column that the files do not have."""
    value, columns = fields[name], data.columns
    with field_errors(file, name):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{value!r} is neither a column's name nor a template such as '{{{{ text }}}}'; write one of these"
            )
        if value in (columns or ()) or (columns is None and _BARE_NAME.fullmatch(value)):
            return value
        if not _BARE_NAME.fullmatch(value):
            cell = compile_template(value, _ENVIRONMENT)
        else:
            cell = CompiledTemplate(value, frozenset({value}), _ENVIRONMENT.from_string(value))
        known = cell.columns if columns is None else frozenset(columns)
        for column in sorted(cell.columns - known):
            near = difflib.get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name one of these"
            raise ValueError(f"there is no column {column!r}; the rows have {', '.join(columns or ())}; {hint}")
        return cell


def _value(cell: Cell, row: Row) -> Any:
    """The value of a cell: that of a column, where its text names one, else the template's."""
    name = cell if isinstance(cell, str) else cell.text
    if isinstance(cell, CompiledTemplate) and name not in row:
        return cell.render(row)
    if name not in row:
        raise ValueError(f"there is no column {name!r}; the row has {', '.join(map(str, row))}")
    if row[name] is None:
        raise ValueError(f"column {name!r} is null in this row; fill it or drop the row")
    return row[name]


def _texts_of(values: object) -> tuple[str, ...]:
    """Choices, once each is a text with something in it."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{values!r} is no list of choices; give two or more texts")
    for value in values:
        if isinstance(value, bool):
            raise ValueError(f"the choice {value} is no text; YAML reads yes, no, true and on so: put it in quotes")
        if not isinstance(value, str) or not value:
            raise ValueError(f"the choice {value!r} is no text; put it in quotes")
    return tuple(values)


def _index(value: object, choices: Sequence[str]) -> int:
    """The index that a target is, or that of the choice that it equals."""
    if isinstance(value, str):
        if value in choices:
            return choices.index(value)
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "give one of them, or its index"
        raise ValueError(f"{value!r} is none of the choices {', '.join(map(repr, choices))}; {hint}")
    if not isinstance(value, int) or not 0 <= value < len(choices):
        raise ValueError(f"{value!r} is the index of no choice; the {len(choices)} choices count from 0 to {len(choices) - 1}")
    return int(value)


def _same(row: Row) -> str:
    return json.dumps(dict(row), sort_keys=True, default=str)
