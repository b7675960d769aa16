"""``l2l tasks list``, ``show`` and ``check``: a task's source, prompt and options, and its tokens for a model."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l2l.arguments import Arguments
from l2l.models.kinds import kind_of as kind_of_model
from l2l.models.load import load_tokenizer
from l2l.models.prompt_trees import Ids
from l2l.report.console import print_table
from l2l.tasks.base import Example, FileData, GeneratedData, GivenData, HubData, Row, Task, sample_row
from l2l.tasks.encode import option_starts, special_ids, tokenized
from l2l.tasks.registry import get_task, task_names
from l2l.tasks.rows import HELD_OUT, TEST_SEED, Splits, held_out_note, held_out_of, load_rows
from l2l.tasks.sources import read_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CELL = 60
"""Most characters of a cell of the list."""
_LISTED = 20
"""Most options that are listed one by one."""
_TAIL = 60
"""Most tokens of a prompt that are shown: its last ones."""
_FEW = 6
"""Most options of an example that are shown, the right one among them."""
_LONGEST_DEFAULT = 2048
MAJORITY = 0.9
"""Share of the train rows with one right option from which on a model that always chooses it looks trained."""
WARNED = 200
"""Rows of each split that a run looks at for problems: a few hundredths of a second, where the tokens of a run take minutes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShowConfig(Arguments):
    """Show a task: where its rows come from, its prompt, its options, its variants."""

    task: str
    """Name of a task, or the path of a task file."""


def list_tasks() -> None:
    """Print a row per task of the package."""
    print_table("tasks", [table_row(get_task(name)) for name in task_names()])


def show_task(config: ShowConfig) -> None:
    """Print source, prompt, options and variants of a task."""
    print(card(get_task(config.task)))


def table_row(task: Task) -> dict[str, str]:
    """A line of ``l2l tasks list``: name and version, kind, options, metric, source, variants."""
    example = _sample_example(task, task.example)
    options = "/".join(option.strip() for option in example.options) if example else "?"
    options = options if len(options) <= _CELL else options[: _CELL - 1] + "…"
    return {
        "task": task.label,
        "kind": kind(task),
        "options": "text" if kind(task) == "generate" else options,
        "loss": task.form,
        "metric": task.metric,
        "source": source(task),
        "variants": ", ".join(task.variants) or "-",
    }


def card(task: Task) -> str:
    """The text of ``l2l tasks show``: source of the rows, prompt and options, variants."""
    lines, found = [f"{task.label}: {kind(task)}, loss {task.form}, metric {task.metric}"], task.source
    lines.append(f"rows      {source(task)}")
    if held_out_of(task):
        lines.append(f"          of these, a fixed 1 in {HELD_OUT} is held out to report on")
    elif isinstance(found, HubData):
        lines.append(f"          train: {found.splits[0]}; reported on: {found.splits[1]}")
    elif isinstance(found, FileData):
        for name, paths in (("train", found.train), ("reported on", found.validation)):
            lines.append(f"          {name}: {', '.join(map(str, paths))}")
    if task.fields:
        lines.append(f"columns   {', '.join(task.fields)}")
    for title, render in (("prompt", task.example), *((f":{name}", example) for name, example in task.variants.items())):
        example = _sample_example(task, render)
        if example is None:
            lines.append(f"{title:<9} needs a real row: see l2l tasks check")
            continue
        prompt = example.prompt.replace("\n", "\n          ")
        lines += [f"{title:<9} {prompt}", f"options   {' | '.join(map(repr, example.options))}"]
    return "\n".join(lines)


def kind(task: Task) -> str:
    """``choose`` where options are scored, ``generate`` where an answer is written."""
    return "generate" if task.generates else "choose"


def source(task: Task) -> str:
    """Where the rows come from."""
    found = task.source
    if isinstance(found, GeneratedData):
        return "generated"
    if isinstance(found, GivenData):
        return f"{len(found.rows)} rows"
    if isinstance(found, FileData):
        return ", ".join(path.name for path in (*found.train, *found.validation))
    at = f"@{found.revision}" if found.revision else ""
    return f"{found.path}{at}" + (f" ({found.name})" if found.name else "")


def _sample_example(task: Task, example: Callable[[Row], Example]) -> Example | None:
    """The first row of the task's own files, else its sample row, rendered; None where that takes a real row."""
    row = sample_row(task)
    if isinstance(task.source, FileData):
        row = next((row for _, row in read_file(task.source.train[0])), {})
    try:
        return example(row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


@dataclass(frozen=True)
class CheckConfig(Arguments):
    """Show rendered examples, tokens, truncation and label balance of a task."""

    task: str = "world_topic"
    """Name of a task, or path of a task file."""
    model: str = "l2l/tiny"
    """Whose tokenizer and context: ``l2l/tiny``, a directory, or a hub id."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub, or from the task's own files."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    rows: int = 1000
    """Most rows of each split to look at."""
    examples: int = 3
    """How many examples to print."""
    revision: str | None = None
    """Revision of a hub model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("rows", self.rows), ("examples", self.examples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Checked:
    """Result of a check."""

    facts: dict[str, Any]
    """Name -> figure, for a table."""
    options: list[dict[str, Any]]
    """One line per option: its tokens, their ids, and how often it is right."""
    examples: list[str]
    """Rendered examples. Tokens are separated by ``·``; prompt and option by ``‖``."""
    warnings: list[str]
    """Likely problems, one sentence each."""


def check(config: CheckConfig) -> Checked:
    """Tokenise rows of both splits for a model and report lengths, balance, leaks and likely problems.

    Raises:
        ValueError, FileNotFoundError: task, rows or tokenizer are wrong or absent, as in a run.
    """
    task = get_task(config.task)
    train = load_rows(task, "train", config.data_dir, config.rows, TEST_SEED)
    test = load_rows(task, "validation", config.data_dir, config.rows, TEST_SEED)
    if not train or not test:
        raise ValueError(f"task {task.name!r}: {len(train)} train and {len(test)} validation rows; both need some")
    tokenizer = load_tokenizer(config.model, config.revision)
    from transformers import AutoConfig

    # Tokens that fit, by the model's config: its weights are not loaded.
    loaded = AutoConfig.from_pretrained(tokenizer.name_or_path, revision=config.revision, trust_remote_code=False)
    positions = getattr(loaded.get_text_config(), "max_position_embeddings", None)
    longest = positions if isinstance(positions, int) else None
    limit = min(longest or _LONGEST_DEFAULT, _LONGEST_DEFAULT) if config.max_length is None else config.max_length
    if config.max_length is not None and not 2 <= limit <= (longest or limit):
        raise ValueError(f"max_length {limit} must lie in 2..{longest or 'any'}, the positions of {config.model!r}")
    found = findings(task, train, test, tokenizer, limit, config.model)
    note = held_out_note(task) if config.data_dir is None or isinstance(task.source, FileData) else ""
    facts = found.facts | ({"held out": note} if note else {})
    examples = _texts(task, [*train, *test][: config.examples], tokenizer)
    shown = [token_display(tokenizer, one, number) for number, one in enumerate(examples)]
    return replace(found, facts=facts, examples=shown)


def _texts(task: Task, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> "list[TokenizedExample]":
    prefix, examples = special_ids(tokenizer)[0], list[TokenizedExample]()
    for one in tokenized(task, rows, tokenizer):
        starts = option_starts(one)
        own = tuple(text[start:] for text, start in zip(one.texts, starts, strict=True))
        merged = min(starts) < len(one.prompt)
        examples.append(TokenizedExample(one.example, prefix, one.prompt[: min(starts)], own, merged))
    return examples


def findings(
    task: Task, train: Sequence[Row], test: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", limit: int, model: str
) -> Checked:
    """Figures, options and likely problems of rows for a tokenizer, without examples.

    Args:
        limit: most tokens per row.
        model: name of the tokenizer's model, for messages.
    """
    parts = _texts(task, train, tokenizer), _texts(task, test, tokenizer)
    examples = [*parts[0], *parts[1]]
    lengths = sorted(len(one.prefix) + len(one.prompt) + max(map(len, one.options)) for one in examples)
    known = {one.example.prompt for one in parts[0]}
    facts: dict[str, Any] = {
        "task": task.label,
        "kind": kind(task),
        "source": source(task),
        "train rows": len(train),
        "validation rows": len(test),
        "tokens, median": lengths[len(lengths) // 2],
        "tokens, most": lengths[-1],
        "tokens that fit": limit,
        "rows cut": sum(length > limit for length in lengths),
        "prompts twice in train": len(train) - len(known),
        "validation prompts in train": sum(one.example.prompt in known for one in parts[1]),
    }
    options: list[dict[str, Any]] = []
    majority = 0.0, ""
    if kind(task) == "choose":
        # Accuracy of the majority class: by the option's text, or by its index where options differ between rows.
        golds = [[(one.example.options[one.example.gold[0]], one.example.gold[0]) for one in part] for part in parts]
        common = [[Counter(column).most_common(1)[0] for column in zip(*part, strict=True)] for part in golds]
        facts["always the commonest"] = max(count for _, count in common[1]) / len(test)
        majority = common[0][0][1] / len(train), str(common[0][0][0])
        # The options of all rows, in order of first occurrence; none where each row has others.
        ids = {text: own for one in examples for text, own in zip(one.example.options, one.options, strict=True)}
        right = [Counter(one.example.options[one.example.gold[0]] for one in part) for part in parts]
        options = [
            {
                "option": visible(text),
                "tokens": "·".join(map(visible, tokenizer.convert_ids_to_tokens(list(own)))),
                "ids": " ".join(map(str, own)),
                "right in train": right[0][text],
                "right in validation": right[1][text],
            }
            for text, own in (ids.items() if len(ids) <= _LISTED else ())
        ]
    else:
        facts["different answers in train"] = len({one.example.options[0] for one in parts[0]})
    return Checked(facts, options, [], _warnings(model, facts, options, examples, tokenizer, majority))


def warn_of_problems(
    task: Task, splits: Splits, tokenizer: "PreTrainedTokenizerBase", limit: int, model: "PreTrainedModel"
) -> None:
    """Log a line for each likely problem that ``l2l tasks check`` would show, by the first :data:`WARNED` rows of each split.

    A sequence classifier and an encoder-decoder are not given options behind prompts, as the check assumes: nothing is said.
    """
    lines = [splits.note] if splits.note else []
    held = splits.test or splits.dev
    if splits.train and held and kind_of_model(model) in ("causal", "masked"):
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        lines += findings(task, splits.train[:WARNED], held[:WARNED], tokenizer, limit, name).warnings
    for line in lines:
        logger.warning("%s", line if line.startswith("task ") else f"task {task.name!r}: {line}")


def check_task(config: CheckConfig) -> None:
    """Print what :func:`check` finds: examples, options, figures, and a line per warning."""
    found = check(config)
    print("\n".join(found.examples))
    if found.options:
        print_table("options", found.options)
    print_table(f"check: {config.task}", [found.facts])
    for warning in found.warnings:
        print(f"warning: {warning}")


def _warnings(
    model: str,
    facts: dict[str, Any],
    options: list[dict[str, Any]],
    examples: "Sequence[TokenizedExample]",
    tokenizer: "PreTrainedTokenizerBase",
    majority: tuple[float, str],
) -> list[str]:
    unk, same = tokenizer.unk_token_id, dict[str, list[str]]()
    for line in options:
        same.setdefault(line["ids"], []).append(line["option"])
    long = ", ".join(line["option"] for line in options if " " in line["ids"])
    never = ", ".join(line["option"] for line in options if not line["right in train"])
    cut, leaked, merged = facts["rows cut"], facts["validation prompts in train"], sum(one.merged for one in examples)
    unknown = 0 if unk is None else sum(unk in one.prompt for one in examples)
    double = sum(
        one.example.prompt[-1:].isspace() and any(option[:1] == " " for option in one.example.options) for one in examples
    )
    bos = sum(bool(one.prefix) and one.prompt[: len(one.prefix)] == one.prefix for one in examples)
    twice = "".join(tokenizer.convert_ids_to_tokens(list(examples[0].prefix)))
    share, commonest = majority
    likely = [
        (
            cut,
            f"{cut} rows have more than {facts['tokens that fit']} tokens, up to {facts['tokens, most']}, and lose their "
            "beginning",
        ),
        (
            bos,
            f"{bos} prompts begin with {twice}, which the tokenizer of {model} puts there as well: remove it from the prompt",
        ),
        (share >= MAJORITY, f"{commonest!r} is right in {share:.0%} of the train rows: always to choose it scores as much"),
        (leaked, f"{leaked} validation prompts also stand in train: figures flatter"),
        *(
            (
                len(texts) > 1,
                f"the options {' and '.join(texts)} have the same tokens for {model}: they cannot be told apart; reword one",
            )
            for _, texts in sorted(same.items())
        ),
        (long, f"options of several tokens for {model}: {long}; each counts by its mean per token"),
        (never, f"never right in train: {never}"),
        (unknown, f"{unknown} prompts hold characters or words that the tokenizer of {model} does not know"),
        (merged, f"in {merged} rows a token spans the boundary of prompt and option; it counts as the option's"),
        (double, f"{double} prompts end in white space before an option's own space; strip one: target_delimiter: ''"),
    ]
    return [text for wrong, text in likely if wrong]


@dataclass(frozen=True)
class TokenizedExample:
    """One example as token ids, not truncated."""

    example: Example
    prefix: Ids
    """Special tokens before every text."""
    prompt: Ids
    """The ids that all options have before them."""
    options: tuple[Ids, ...]
    """Each option's own ids."""
    merged: bool
    """Whether a token spans the boundary of the prompt and some option."""


def token_display(tokenizer: "PreTrainedTokenizerBase", one: TokenizedExample, number: int) -> str:
    """An example as text: ``·`` between tokens, ``‖`` between prompt and option, ``*`` before a right option."""

    def tokens(ids: Sequence[int]) -> list[str]:
        return [visible(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]

    prompt = tokens((*one.prefix, *one.prompt))
    cut = f"… {len(prompt) - _TAIL} tokens … " if len(prompt) > _TAIL else ""
    lines = [f"example {number + 1}", f"  {cut}{'·'.join(prompt[-_TAIL:])}"]
    order = sorted(range(len(one.options)), key=lambda option: option not in one.example.gold)[:_FEW]
    for option in sorted(order):
        ids = one.options[option]
        mark = "*" if option in one.example.gold else " "
        lines.append(f"  ‖ {mark} {'·'.join(tokens(ids))}  {list(ids)}")
    left = len(one.options) - len(order)
    return "\n".join(lines + ([f"  … and {left} more options"] if left else []))


def visible(text: str) -> str:
    """The text with visible white space; byte-pair and sentence-piece vocabularies' own signs for it look the same."""
    return text.translate(str.maketrans({"\n": "⏎", "Ċ": "⏎", "\t": "⇥", " ": "␣", "Ġ": "␣", "▁": "␣"}))
