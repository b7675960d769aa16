"""Texts of examples as token ids, and what a tokenizer puts around a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2l.models.prompt_trees import Ids, common_prefix
from l2l.tasks.base import Example, Row, Task
from l2l.tasks.render import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """Ids that the tokenizer puts before and after every text. A causal model is never given the latter (EOS).

    Raises:
        ValueError: the tokenizer does not leave a text's own ids together.
    """
    bare = tokenize(tokenizer, ["a"])[0]
    whole = tuple(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    found = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
    if found is None:
        raise ValueError(f"the tokenizer turns 'a' into {whole}, which does not contain its bare ids {bare}")
    return whole[:found], whole[found + len(bare) :]


@dataclass(frozen=True)
class Tokenized:
    """One example with the ids of its texts, without special tokens."""

    name: str
    """Opens the messages of errors: task and row."""
    example: Example
    prompt: Ids
    texts: list[Ids]
    """Of prompt and option together, for each option."""


def tokenized(task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenized]:
    """Render rows and tokenise their prompts, alone and with each option.

    Raises:
        ValueError: a row cannot be rendered.
    """
    names = [f"task {task.name!r}, row {number}" for number in range(len(rows))]
    examples = [render(task, row, name) for row, name in zip(rows, names, strict=True)]
    prompts = tokenize(tokenizer, [example.prompt for example in examples])
    texts = iter(tokenize(tokenizer, [example.prompt + option for example in examples for option in example.options]))
    for example, prompt, name in zip(examples, prompts, names, strict=True):
        yield Tokenized(name, example, prompt, [next(texts) for _ in example.options])


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """Ids of each text, without special tokens. One call for all, because fast tokenizers work in parallel."""
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def option_starts(prompt: Ids, texts: Sequence[Ids], name: str) -> list[int]:
    """Where each option begins: where the ids of prompt and of prompt + option first differ.

    Raises:
        ValueError: an option has no token of its own.
    """
    starts = [common_prefix(prompt, text) for text in texts]
    empty = [number for number, text in enumerate(texts) if len(text) == starts[number]]
    if empty:
        raise ValueError(f"{name}: option {empty[0]} has no token of its own after the prompt")
    return starts


def surplus_of(total: int, spare: int, longest: int, max_length: int, name: str) -> int:
    """How many of the ``spare`` tokens of a prompt must go for ``total`` ids to fit into ``max_length``.

    Raises:
        ValueError: more would have to go than there are: an option of ``longest`` tokens does not fit.
    """
    surplus = max(0, total - max_length)
    if surplus > spare:
        raise ValueError(
            f"{name}: an option of {longest} tokens does not fit into max_length {max_length}; raise max_length"
        )
    return surplus
