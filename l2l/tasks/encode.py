"""From rows to token ids, and from token ids to one padded batch.

An option is scored by the log-probabilities of its tokens given the prompt. The last token of a row is only ever
predicted, never fed, so the one-token options of an example ask for the very same input: they share a row. Longer ones
may share a row that branches (see :mod:`l2l.tasks.layout`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from l2l.models.buckets import Grouping
from l2l.models.heads import Part
from l2l.models.trees import Ids, common_prefix, sight
from l2l.tasks.base import Row, Task
from l2l.tasks.layout import lay_out
from l2l.tasks.render import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form: TypeAlias = Literal["classification", "lm"]


@dataclass(frozen=True)
class EncodedOption:
    """Prompt and one option as token ids."""

    ids: Ids
    """Prompt, then option."""
    length: int
    """How many of the last ids belong to the option; at least one, and at least one id comes before them."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids."""

    options: tuple[EncodedOption, ...]
    gold: tuple[int, ...]
    """Indices of the correct options; the first is the one trained on."""


@dataclass(frozen=True)
class Batch:
    """Rows to feed and the list of tokens to read from them. R rows, T columns, K tokens, O options, E examples."""

    input_ids: Tensor
    """[R, T] right-padded."""
    attention_mask: Tensor
    """[R, T] 1 on tokens, 0 on padding; where rows branch, [R, T, T] bool: which token sees which."""
    rows: Tensor
    """[K] the row in which a token is predicted."""
    positions: Tensor
    """[K] the column whose logits predict it."""
    targets: Tensor
    """[K] its id."""
    options: Tensor
    """[K] the option it belongs to, among all options of the batch."""
    token_slot: Tensor
    """[K] its index within the option."""
    option_example: Tensor
    """[O] the example an option belongs to."""
    option_slot: Tensor
    """[O] its index within the example."""
    gold: Tensor
    """[E] index of the option to train on, within the example."""
    longest: int
    """Tokens of the longest option."""
    width: int
    """Options of the example that has most."""
    parts: tuple[Part, ...] = ()
    """The same rows and tokens split up by length, to be fed one part after the other; empty: fed as one."""

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self.gold)

    def to(self, device: torch.device | str | None) -> Batch:
        """The same batch with its tensors on ``device``; ``None`` leaves them where they are."""
        if device is None:
            return self
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        moved = {name: value.to(device) for name, value in fields if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved, parts=tuple(part.to(device) for part in self.parts))


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Ids that the tokenizer puts before every text (BOS, mostly). What it appends, such as EOS, is never used."""
    bare = tokenize(tokenizer, ["a"])[0]
    whole = tuple(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    found = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
    if found is None:
        raise ValueError(f"the tokenizer turns 'a' into {whole}, which does not contain its bare ids {bare}")
    return whole[:found]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad batches with: the tokenizer's, else 0. Padding is masked, so any id gives the same numbers."""
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else 0


def encode(task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Tokenise every option of every row.

    The option begins where the ids of the prompt and of prompt + option first differ, so a token that spans the
    boundary belongs to the option. A text of more than ``max_length`` tokens loses prompt tokens on its left, the
    same for all options of the example; the leading BOS stays where the tokenizer adds one, the option always does.

    Raises:
        ValueError: a row cannot be rendered, an option has no token of its own or nothing before it, or it does
            not fit into ``max_length``. The message names task and row.
    """
    if not rows:
        return []
    names = [f"task {task.name!r}, row {number}" for number in range(len(rows))]
    examples = [render(task, row, name) for row, name in zip(rows, names, strict=True)]
    prefix = special_prefix(tokenizer)
    prompts = tokenize(tokenizer, [example.prompt for example in examples])
    texts = iter(tokenize(tokenizer, [example.prompt + option for example in examples for option in example.options]))
    encoded = []
    for example, prompt, name in zip(examples, prompts, names, strict=True):
        texts_of_example = [next(texts) for _ in example.options]
        encoded.append(Encoded(_cut(prefix, prompt, texts_of_example, max_length, name), example.gold))
    return encoded


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """Ids of each text, without special tokens. One call for all, because fast tokenizers work in parallel."""
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _cut(prefix: Ids, prompt: Ids, texts: list[Ids], max_length: int, name: str) -> tuple[EncodedOption, ...]:
    """Find where each option begins and truncate from the left."""
    shared = [common_prefix(prompt, text) for text in texts]
    lengths = [len(text) - start for text, start in zip(texts, shared, strict=True)]
    if min(lengths) == 0:
        raise ValueError(f"{name}: option {lengths.index(0)} has no token of its own after the prompt")
    spare = min(shared) - (0 if prefix else 1)
    if spare < 0:
        raise ValueError(f"{name}: nothing comes before the option; the prompt must give at least one token")
    surplus = max(0, len(prefix) + max(map(len, texts)) - max_length)
    if surplus > spare:
        raise ValueError(
            f"{name}: an option of {max(lengths)} tokens does not fit into max_length {max_length}; raise max_length"
        )
    return tuple(EncodedOption(prefix + text[surplus:], length) for text, length in zip(texts, lengths, strict=True))


def collate(
    examples: Sequence[Encoded],
    form: Form,
    pad_id: int,
    device: torch.device | str | None = None,
    grouping: Grouping | None = None,
) -> Batch:
    """Put examples into one batch, not yet split into parts.

    ``form="classification"`` takes every option; ``form="lm"`` only the gold one, which is all its loss needs.
    To score the options of an ``lm`` task, collate with ``"classification"``. Options share their prompt's row where
    ``grouping`` lets them and it feeds clearly fewer tokens; by default each has a row of its own.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    picked = [(e.options[e.gold[0]],) if form == "lm" else e.options for e in examples]
    options = [option for chosen in picked for option in chosen]
    layout = lay_out([[option.ids[:-1] for option in chosen] for chosen in picked], grouping)
    lengths = [len(row.ids) for row in layout.rows]
    columns = max(lengths)
    starts = [len(option.ids) - option.length for option in options]
    per_token = [
        (row, where[start - 1 + slot], option.ids[start + slot], number, slot)
        for number, (option, row, where, start) in enumerate(
            zip(options, layout.row_of, layout.columns, starts, strict=True)
        )
        for slot in range(option.length)
    ]
    per_option = [(example, slot) for example, chosen in enumerate(picked) for slot in range(len(chosen))]
    rows, positions, targets, option_of, token_slot = torch.tensor(per_token).T.contiguous()
    option_example, option_slot = torch.tensor(per_option).T.contiguous()
    return Batch(
        input_ids=torch.tensor([row.ids + (pad_id,) * (columns - len(row.ids)) for row in layout.rows]),
        attention_mask=sight(layout.rows) if layout.branching else _tokens(lengths),
        rows=rows,
        positions=positions,
        targets=targets,
        options=option_of,
        token_slot=token_slot,
        option_example=option_example,
        option_slot=option_slot,
        gold=torch.tensor([0 if form == "lm" else e.gold[0] for e in examples]),
        longest=max(option.length for option in options),
        width=max(map(len, picked)),
    ).to(device)


def _tokens(lengths: Sequence[int]) -> Tensor:
    """[R, T] 1 on tokens, 0 on padding."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
