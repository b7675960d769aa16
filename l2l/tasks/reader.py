"""How the examples of a task are asked of each kind of model: one reader per kind, behind one small interface.

What all readers give is the same: rows to feed, and for every option the tokens to read from them. Loss, scores and
predictions follow from the log-probabilities read, whatever the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from l2l.models.load import kind_of
from l2l.models.prompt_trees import Ids
from l2l.tasks.base import Row, Task
from l2l.tasks.encode import AskedOption, Encoded, encode, padding_id
from l2l.tasks.texts import Tokenized, option_starts, special_ids, surplus_of, tokenize, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reader(ABC):
    """Abstract reader."""

    @abstractmethod
    def encode(
        self, task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Encoded]:
        """Tokenise every option of every row. A text of more than ``max_length`` tokens loses prompt on its left.

        Raises:
            ValueError: a row cannot be rendered, an option has no token of its own, it does not fit into
                ``max_length``, or the task is none for this kind of model. The message names the task.
        """

    @abstractmethod
    def pad_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The id to pad batches with."""


def reader_for(model: Any) -> Reader:
    """The reader for a model, by its kind (:func:`l2l.models.kinds.kind_of`).

    Raises:
        ValueError: an encoder-decoder that does not say which token its decoder starts with.
    """
    readers = {
        "causal": lambda: Causal(),
        "masked": lambda: Masked(),
        "seq2seq": lambda: Seq2Seq(decoder_start(model)),
        "classifier": lambda: Classifier(model.config.num_labels, getattr(model.config, "pad_token_id", None)),
    }
    return readers[kind_of(model)]()


@final
@dataclass(frozen=True)
class Causal(Reader):
    """An option continues its prompt, and each of its tokens is read from the column before it."""

    def encode(
        self, task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Encoded]:
        return encode(task, rows, tokenizer, max_length)

    def pad_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return padding_id(tokenizer)


@final
@dataclass(frozen=True)
class Masked(Reader):
    """An option is a verbaliser: as many mask tokens as it has tokens stand after the prompt, and it is read there.

    All of an option's tokens are masked at once, and each is read given the others masked. What the tokenizer puts
    around a text stands around prompt and masks. Options of equally many tokens share a row.
    """

    def encode(
        self, task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Encoded]:
        mask = tokenizer.mask_token_id
        if not isinstance(mask, int):
            raise ValueError(
                f"task {task.name!r}: a masked language model is asked through mask tokens, but the tokenizer "
                f"{type(tokenizer).__name__} has none; give the tokenizer that belongs to the model"
            )
        around = special_ids(tokenizer)
        found = []
        for row in tokenized(task, rows, tokenizer):
            _refuse_generation(task, row, "a masked language model")
            found.append(Encoded(_masked(around, row, mask, max_length), row.example.gold, whole=True))
        return found

    def pad_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return padding_id(tokenizer)


def _masked(around: tuple[Ids, Ids], row: Tokenized, mask: int, max_length: int) -> tuple[AskedOption, ...]:
    before, after = around
    starts = option_starts(row.prompt, row.texts, row.name)
    lengths = [len(text) - start for text, start in zip(row.texts, starts, strict=True)]
    total = len(before) + max(map(len, row.texts)) + len(after)
    cut = surplus_of(total, min(starts), max(lengths), max_length, row.name)
    return tuple(
        AskedOption(
            ids=before + text[cut:start] + (mask,) * length + after,
            first=len(before) + start - cut,
            targets=text[start:],
        )
        for text, start, length in zip(row.texts, starts, lengths, strict=True)
    )


@final
@dataclass(frozen=True)
class Seq2Seq(Reader):
    """The encoder is fed the prompt; the decoder's tokens are the option, without the spaces around it.

    The end-of-text token is no part of an option that is scored, so that options of one token share one row, as they do
    in a causal model. After the answer of a generation task it is: that is how an answer ends where the tokenizer does
    not keep newlines.
    """

    start: int
    """The id that the decoder's rows start with."""

    def encode(
        self, task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Encoded]:
        around, end = special_ids(tokenizer), tokenizer.eos_token_id
        texts = list(tokenized(task, rows, tokenizer))
        options = [option.strip(" ") for row in texts for option in row.example.options]
        ids = iter(tokenize(tokenizer, options) if options else [])
        found = []
        for row in texts:
            ending = (end,) if row.example.answers and isinstance(end, int) else ()
            own = [next(ids) for _ in row.example.options]
            if () in own:
                raise ValueError(f"{row.name}: option {own.index(())} has no token of its own")
            asked = self._asked(around, row, [option + ending for option in own], max_length)
            found.append(Encoded(asked, row.example.gold, whole=True))
        return found

    def _asked(
        self, around: tuple[Ids, Ids], row: Tokenized, options: list[Ids], max_length: int
    ) -> tuple[AskedOption, ...]:
        source = _framed(around, row, max_length)
        opening = (self.start, *around[0])
        # A decoder has as many positions of its own, which a prompt does not share.
        surplus_of(len(opening) + max(map(len, options)) - 1, 0, max(map(len, options)), max_length, row.name)
        return tuple(AskedOption(source, len(opening) - 1, option, opening + option[:-1]) for option in options)

    def pad_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return padding_id(tokenizer)


@final
@dataclass(frozen=True)
class Classifier(Reader):
    """The prompt is classified: option i is label i. What the options say is never fed."""

    labels: int
    """How many labels the model's head has."""
    pad: int | None = None
    """The id that the model itself takes for padding: some look for a row's last token by it."""

    def encode(
        self, task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Encoded]:
        around = special_ids(tokenizer)
        found, first = [], None
        for row in tokenized(task, rows, tokenizer):
            first = row.example.options if first is None else first
            self._check(task, row, first)
            ids = _framed(around, row, max_length)
            options = tuple(AskedOption(ids, 0, (label,)) for label in range(self.labels))
            found.append(Encoded(options, row.example.gold, whole=True, pooled=True))
        return found

    def _check(self, task: Task, row: Tokenized, first: tuple[str, ...]) -> None:
        _refuse_generation(task, row, "a sequence classifier")
        if row.example.options != first:
            raise ValueError(
                f"{row.name}: its options differ from those of row 0, so they are no labels; a sequence classifier "
                "needs a task whose options are the same in every row: use a model with a language modelling head"
            )
        if len(first) != self.labels:
            raise ValueError(
                f"task {task.name!r} has {len(first)} options, but the model's head has {self.labels} labels; load the "
                f"model with head=classifier from a checkpoint without one, or with num_labels={len(first)}"
            )

    def pad_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return self.pad if isinstance(self.pad, int) else padding_id(tokenizer)


def _framed(around: tuple[Ids, Ids], row: Tokenized, max_length: int) -> Ids:
    """The prompt with what the tokenizer puts around it, cut on the prompt's left."""
    before, after = around
    cut = max(0, len(before) + len(row.prompt) + len(after) - max_length)
    ids = before + row.prompt[cut:] + after
    if cut > len(row.prompt) or not ids:
        raise ValueError(f"{row.name}: a prompt of {len(row.prompt)} tokens cannot be fed at max_length {max_length}")
    return ids


def _refuse_generation(task: Task, row: Tokenized, kind: str) -> None:
    if row.example.answers:
        raise ValueError(
            f"task {task.name!r} asks for generated answers, which {kind} cannot give; use a causal or seq2seq model"
        )


def decoder_start(model: Any) -> int:
    """The id that an encoder-decoder's own rows start with: as its config tells, else its padding id.

    Raises:
        ValueError: the model tells neither.
    """
    configs = (getattr(model, "generation_config", None), model.config)
    names = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
    told = (getattr(config, name, None) for name in names for config in configs)
    found = next((index for index in told if isinstance(index, int)), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} does not say which token its decoder starts with; set "
            "model.config.decoder_start_token_id"
        )
    return found
