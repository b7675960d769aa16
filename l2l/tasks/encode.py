"""From rows to token ids of a causal model, and from token ids of any kind of model to one padded batch.

An option is scored by the log-probabilities of its tokens given the prompt. The last token of a row is only ever
predicted, never fed, so the one-token options of an example ask for the very same input: they share a row. Longer ones
may share a row that branches (see :mod:`l2l.tasks.layout`). How other kinds of models are asked says
:mod:`l2l.tasks.reader`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from l2l.models.batching import Grouping
from l2l.models.heads import Part
from l2l.models.prompt_trees import Ids, tree_attention_mask
from l2l.tasks.base import Row, Task
from l2l.tasks.layout import lay_out, lay_out_whole
from l2l.tasks.texts import option_starts, special_ids, surplus_of, tokenized

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

    @property
    def fed(self) -> Ids:
        """What the model is fed: the last id is only predicted."""
        return self.ids[:-1]

    @property
    def first(self) -> int:
        """The column whose logits predict the option's first token."""
        return len(self.ids) - self.length - 1

    @property
    def targets(self) -> Ids:
        """The option's ids."""
        return self.ids[-self.length :]

    @property
    def decoder(self) -> Ids:
        """What a decoder of its own is fed: there is none."""
        return ()


@dataclass(frozen=True)
class AskedOption:
    """One option as it is asked of a model that is not causal."""

    ids: Ids
    """What the model, or its encoder, is fed."""
    first: int
    """The column, of the decoder where there is one, whose logits say how likely the first target is."""
    targets: Ids
    """Ids to read there and in the columns after it; or the label, where rows are classified."""
    decoder: Ids = ()
    """What the decoder is fed."""

    @property
    def fed(self) -> Ids:
        """What the model, or its encoder, is fed."""
        return self.ids

    @property
    def length(self) -> int:
        """How many ids are read."""
        return len(self.targets)


@dataclass(frozen=True)
class Encoded:
    """One example as token ids."""

    options: tuple[EncodedOption, ...] | tuple[AskedOption, ...]
    gold: tuple[int, ...]
    """Indices of the correct options; the first is the one trained on."""
    whole: bool = False
    """Whether rows are seen as wholes, as by an encoder: a longer one does not answer for one that it begins with."""
    pooled: bool = False
    """Whether the model gives one vector of logits per row."""


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
    decoder_ids: Tensor | None = None
    """[R, D] right-padded rows of the decoder of an encoder-decoder, in which ``positions`` count."""
    pooled: bool = False
    """Whether the model gives one vector of logits per row; ``targets`` then are labels."""

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
    """Ids that the tokenizer puts before every text (BOS, mostly)."""
    return special_ids(tokenizer)[0]


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
    prefix = special_prefix(tokenizer)
    return [
        Encoded(_cut(prefix, row.prompt, row.texts, max_length, row.name), row.example.gold)
        for row in tokenized(task, rows, tokenizer)
    ]


def _cut(prefix: Ids, prompt: Ids, texts: list[Ids], max_length: int, name: str) -> tuple[EncodedOption, ...]:
    """Find where each option begins and truncate from the left."""
    shared = option_starts(prompt, texts, name)
    lengths = [len(text) - start for text, start in zip(texts, shared, strict=True)]
    spare = min(shared) - (0 if prefix else 1)
    if spare < 0:
        raise ValueError(f"{name}: nothing comes before the option; the prompt must give at least one token")
    surplus = surplus_of(len(prefix) + max(map(len, texts)), spare, max(lengths), max_length, name)
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
    if examples[0].whole:
        layout = lay_out_whole([(option.fed, option.decoder) for option in options])
    else:
        layout = lay_out([[option.fed for option in chosen] for chosen in picked], grouping)
    lengths = [len(row.ids) for row in layout.rows]
    per_token = [
        (row, where[option.first + slot], target, number, slot)
        for number, (option, row, where) in enumerate(zip(options, layout.row_of, layout.columns, strict=True))
        for slot, target in enumerate(option.targets)
    ]
    per_option = [(example, slot) for example, chosen in enumerate(picked) for slot in range(len(chosen))]
    rows, positions, targets, option_of, token_slot = torch.tensor(per_token).T.contiguous()
    option_example, option_slot = torch.tensor(per_option).T.contiguous()
    return Batch(
        input_ids=_padded([row.ids for row in layout.rows], pad_id),
        attention_mask=tree_attention_mask(layout.rows) if layout.branching else _tokens(lengths),
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
        decoder_ids=_padded(layout.decoders, pad_id) if any(layout.decoders) else None,
        pooled=examples[0].pooled,
    ).to(device)


def _padded(rows: Sequence[Ids], pad_id: int) -> Tensor:
    """[R, T] ids, padded on the right."""
    columns = max(map(len, rows))
    return torch.tensor([ids + (pad_id,) * (columns - len(ids)) for ids in rows])


def _tokens(lengths: Sequence[int]) -> Tensor:
    """[R, T] 1 on tokens, 0 on padding."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
