"""From rows to token ids of a model of any kind, and from token ids to one padded batch.

An option is scored by the log-probabilities of its tokens given the prompt. Every kind of model gets rows to feed and, for
every option, the tokens to read from them; losses, scores and predictions follow from the log-probabilities read.

The last token of a causal model's row is only predicted, never fed, so the one-token options of an example need the very
same input: they share a row. Longer ones may share a row that branches, a tree (:mod:`l2l.models.prompt_trees`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from l2l.models import Grouping, Part
from l2l.models.load import kind_of
from l2l.models.prompt_trees import Ids, Tree, chain, common_prefix, grow, tree_attention_mask
from l2l.tasks.base import Example, Row, Task, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form: TypeAlias = Literal["classification", "lm"]


@dataclass(frozen=True)
class EncodedOption:
    """Prompt and one option as token ids of a causal model."""

    ids: Ids
    """Prompt, then option."""
    length: int
    """How many of the last ids belong to the option; at least one, and at least one id comes before them."""
    decoder: Ids = ()
    """A causal model has no decoder of its own."""

    @property
    def fed(self) -> Ids:
        """Ids that the model is fed: the last one is only predicted."""
        return self.ids[:-1]

    @property
    def first(self) -> int:
        """The column whose logits predict the option's first token."""
        return len(self.ids) - self.length - 1

    @property
    def targets(self) -> Ids:
        """The option's ids."""
        return self.ids[-self.length :]


@dataclass(frozen=True)
class NonCausalOption:
    """One option as token ids of a masked model, an encoder-decoder or a classifier."""

    ids: Ids
    """Ids that the model, or its encoder, is fed."""
    first: int
    """The column, of the decoder where there is one, whose logits score the first target."""
    targets: Ids
    """Ids to read there and in the columns after it; or the label, where rows are classified."""
    decoder: Ids = ()
    """Ids that the decoder is fed."""

    @property
    def fed(self) -> Ids:
        """All ids."""
        return self.ids


@dataclass(frozen=True)
class Encoded:
    """One example as token ids."""

    options: tuple[EncodedOption, ...] | tuple[NonCausalOption, ...]
    gold: tuple[int, ...]
    """Indices of the correct options; the first is the one trained on."""
    whole: bool = False
    """Whether logits depend on the whole row, as an encoder's do: then a row cannot serve inputs that it begins with."""
    pooled: bool = False
    """Whether the model gives one vector of logits per row."""


# Texts and tokenizers.


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, Ids]:
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


def tokenized(task: Task, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Tokenized]:
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


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[Ids]:
    """Ids of each text, without special tokens. One call for all, because fast tokenizers work in parallel."""
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def option_starts(row: Tokenized) -> list[int]:
    """The index at which each option begins: where the ids of prompt and of prompt + option first differ.

    Raises:
        ValueError: an option has no token of its own.
    """
    starts = [common_prefix(row.prompt, text) for text in row.texts]
    empty = [number for number, text in enumerate(row.texts) if len(text) == starts[number]]
    if empty:
        raise ValueError(f"{row.name}: option {empty[0]} has no token of its own after the prompt")
    return starts


def _surplus(total: int, spare: int, longest: int, max_length: int, name: str) -> int:
    """How many of the ``spare`` tokens of a prompt must go for ``total`` ids to fit into ``max_length``."""
    surplus = max(0, total - max_length)
    if surplus > spare:
        raise ValueError(f"{name}: an option of {longest} tokens does not fit into max_length {max_length}; raise max_length")
    return surplus


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad batches with: the tokenizer's, else 0. Padding is masked, so any id gives the same numbers."""
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else 0


# Encoding for each kind of model.


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of a task for one kind of model."""

    encode: "Callable[[Task, Sequence[Row], PreTrainedTokenizerBase, int], list[Encoded]]"
    """Tokenises every option of every row, of at most so many tokens; see :func:`encode` for the errors."""
    padding: int | None = None
    """The id that the model itself takes for padding: some classifiers look for a row's last token by it."""
    vocabulary: int | None = None
    """Ids that the model embeds; None: not known."""

    def pad_id(self, tokenizer: "PreTrainedTokenizerBase") -> int:
        """The id to pad batches with: one that the model embeds, whatever the tokenizer has added."""
        found = padding_id(tokenizer) if self.padding is None else self.padding
        return found if self.vocabulary is None or found < self.vocabulary else 0


def encoder_for(model: Any) -> Encoder:
    """The encoder for a model, by its kind (:func:`l2l.models.kinds.kind_of`). It raises ValueError at a row with a token that
    the model does not embed, and where a classifier that needs a padding id finds none.

    Raises:
        ValueError: an encoder-decoder that does not say which token its decoder starts with.
    """
    kind, padding = kind_of(model), None
    encoders = {"causal": encode, "masked": encode_masked}
    if kind == "classifier":
        padding = getattr(model.config, "pad_token_id", None)
        encoders[kind] = partial(encode_labels, labels=model.config.num_labels)
    if kind == "seq2seq":
        encoders[kind] = partial(encode_seq2seq, start=decoder_start(model))
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(getattr(embedding, "weight", None), "shape", (None,))[0]

    def encoded(task: Task, rows_: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Encoded]:
        if kind == "classifier":
            _agree_on_padding(model, tokenizer, rows)
        found = encoders[kind](task, rows_, tokenizer, max_length)
        if rows is not None:
            for number, example in enumerate(found):
                _check_embedded(f"task {task.name!r}, row {number}", example, rows, tokenizer)
        return found

    return Encoder(encoded, padding if isinstance(padding, int) else None, rows)


def _agree_on_padding(model: Any, tokenizer: "PreTrainedTokenizerBase", rows: int | None) -> None:
    """Give a classifier without a padding id that of the tokenizer: some find by it the last token of a row, and refuse batches
    of several rows without one. ValueError where the tokenizer has none either, or one that is not embedded."""
    if getattr(model.config, "pad_token_id", None) is not None:
        return
    pad = tokenizer.pad_token_id
    if not isinstance(pad, int) or (rows is not None and pad >= rows):
        what = "neither the model nor the tokenizer has one" if pad is None else f"the tokenizer's, {pad}, is not embedded"
        raise ValueError(
            f"a classifier finds the end of a row by the padding id, and {what}: set tokenizer.pad_token to one of its tokens, "
            "as tokenizer.pad_token = tokenizer.eos_token, or model.config.pad_token_id"
        )
    model.config.pad_token_id = pad


def _check_embedded(name: str, example: Encoded, rows: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError where an example has an id for which the embedding has no row."""
    for option in example.options:
        largest = max(*option.ids, *option.decoder, *(() if example.pooled else option.targets), 0)
        if largest >= rows:
            raise ValueError(
                f"{name}: token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, and the model embeds ids below "
                f"{rows}: give the tokenizer that belongs to the model, or, where tokens were added, call "
                f"model.resize_token_embeddings({len(tokenizer)}) and give that model, or the directory that it was saved to"
            )


def encode(task: Task, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Encoded]:
    """Tokenise every option of every row for a causal model.

    The option begins where the ids of the prompt and of prompt + option first differ, so a token that spans the
    boundary belongs to the option. A text of more than ``max_length`` tokens loses prompt tokens on its left, the
    same for all options of the example; the leading BOS stays where the tokenizer adds one, the option always does.

    Raises:
        ValueError: a row cannot be rendered, an option has no token of its own or nothing before it, it does not fit
            into ``max_length``, or the task is none for this kind of model. The message names task and row.
    """
    prefix, found = special_ids(tokenizer)[0], []
    for row in tokenized(task, rows, tokenizer) if rows else ():
        starts = option_starts(row)
        lengths = [len(text) - start for text, start in zip(row.texts, starts, strict=True)]
        spare = min(starts) - (0 if prefix else 1)
        if spare < 0:
            raise ValueError(f"{row.name}: nothing comes before the option; the prompt must give at least one token")
        surplus = _surplus(len(prefix) + max(map(len, row.texts)), spare, max(lengths), max_length, row.name)
        options = (EncodedOption(prefix + text[surplus:], length) for text, length in zip(row.texts, lengths, strict=True))
        found.append(Encoded(tuple(options), row.example.gold))
    return found


def encode_masked(task: Task, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Encoded]:
    """Tokenise options as verbalizers of a masked model: after the prompt there is a mask token per token of the option.

    All of an option's tokens are masked at once, and each is read given the others masked. The tokenizer's special
    tokens surround prompt and masks. Options of equally many tokens share a row.

    Raises:
        ValueError: as :func:`encode`.
    """
    mask = tokenizer.mask_token_id
    if not isinstance(mask, int):
        raise ValueError(
            f"task {task.name!r}: a masked language model is asked through mask tokens, but the tokenizer "
            f"{type(tokenizer).__name__} has none; give the tokenizer that belongs to the model"
        )
    before, after = special_ids(tokenizer)
    found = []
    for row in tokenized(task, rows, tokenizer):
        _refuse_generation(task, row, "a masked language model")
        starts = option_starts(row)
        lengths = [len(text) - start for text, start in zip(row.texts, starts, strict=True)]
        total = len(before) + max(map(len, row.texts)) + len(after)
        cut = _surplus(total, min(starts), max(lengths), max_length, row.name)
        options = tuple(
            NonCausalOption(before + text[cut:start] + (mask,) * length + after, len(before) + start - cut, text[start:])
            for text, start, length in zip(row.texts, starts, lengths, strict=True)
        )
        found.append(Encoded(options, row.example.gold, whole=True))
    return found


def encode_seq2seq(
    task: Task, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, start: int
) -> list[Encoded]:
    """Tokenise prompts for the encoder and options, without the spaces around them, for the decoder.

    The end-of-text token is no part of an option that is scored, so that options of one token share one row, as they do
    in a causal model. It does follow the answer of a generation task: an answer ends by it where the tokenizer does not
    keep newlines.

    Args:
        start: the id that the decoder's rows start with.

    Raises:
        ValueError: as :func:`encode`.
    """
    around, end = special_ids(tokenizer), tokenizer.eos_token_id
    texts = list(tokenized(task, rows, tokenizer))
    options = [option.strip(" ") for row in texts for option in row.example.options]
    ids = iter(tokenize(tokenizer, options) if options else [])
    opening = (start, *around[0])
    found = []
    for row in texts:
        ending = (end,) if row.example.answers and isinstance(end, int) else ()
        own = [next(ids) for _ in row.example.options]
        if () in own:
            raise ValueError(f"{row.name}: option {own.index(())} has no token of its own")
        source, targets = _framed(around, row, max_length), [option + ending for option in own]
        longest = max(map(len, targets))
        _surplus(len(opening) + longest - 1, 0, longest, max_length, row.name)  # the decoder has positions of its own
        asked = (NonCausalOption(source, len(opening) - 1, target, opening + target[:-1]) for target in targets)
        found.append(Encoded(tuple(asked), row.example.gold, whole=True))
    return found


def encode_labels(
    task: Task, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, labels: int
) -> list[Encoded]:
    """Tokenise prompts for a sequence classifier of so many labels: option i is label i, and its text is never fed.

    Raises:
        ValueError: as :func:`encode`; the options differ between rows, or are not as many as the labels.
    """
    around = special_ids(tokenizer)
    found, first = [], None
    for row in tokenized(task, rows, tokenizer):
        first = row.example.options if first is None else first
        _refuse_generation(task, row, "a sequence classifier")
        if row.example.options != first:
            raise ValueError(
                f"{row.name}: its options differ from those of row 0, so they are no labels; a sequence classifier "
                "needs a task whose options are the same in every row: use a model with a language modelling head"
            )
        if len(first) != labels:
            raise ValueError(
                f"task {task.name!r} has {len(first)} options, but the model's head has {labels} labels; load the "
                f"model with head=classifier from a checkpoint without one, or with num_labels={len(first)}"
            )
        ids = _framed(around, row, max_length)
        options = tuple(NonCausalOption(ids, 0, (label,)) for label in range(labels))
        found.append(Encoded(options, row.example.gold, whole=True, pooled=True))
    return found


def _framed(around: tuple[Ids, Ids], row: Tokenized, max_length: int) -> Ids:
    """The prompt between the tokenizer's special tokens, cut on the prompt's left."""
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
    """The id that an encoder-decoder's own rows start with: that of its config, else its padding id.

    Raises:
        ValueError: the config has neither.
    """
    configs = (getattr(model, "generation_config", None), model.config)
    names = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
    given = (getattr(config, name, None) for name in names for config in configs)
    found = next((index for index in given if isinstance(index, int)), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} does not say which token its decoder starts with; set model.config.decoder_start_token_id"
        )
    return found


# Batches.


@dataclass(frozen=True)
class Layout:
    """R rows for N inputs."""

    rows: tuple[Tree, ...]
    """[R] the row's tokens."""
    row_of: tuple[int, ...]
    """[N] the row that holds an input."""
    columns: tuple[Sequence[int], ...]
    """[N] the columns of its tokens."""
    branching: bool
    """Whether some row is more than one input: else the rows are plain."""
    decoders: tuple[Ids, ...] = ()
    """[R] ids that the decoder is fed beside each row; empty where there is no decoder."""


def lay_out(groups: Sequence[Sequence[Ids]], grouping: Grouping | None = None) -> Layout:
    """Place the inputs of each example, in as few tokens as ``grouping`` allows.

    Inputs that equal another or are its prefix never cost anything. Where trees are allowed, an example's inputs share
    their common prefix if that pays for the example, and for the whole batch, padding included: one long tree among
    short plain rows may not. A batch in which none pays is laid out without trees, and so is one with a plain row longer
    than a tree may be: next to a tree it would be read with the tree's mask.
    """
    plain = _place(groups, [None] * len(groups))
    if grouping is None or not grouping.tree:
        return plain
    trees: list[Tree | None] = []
    for inputs in groups:
        _, merged = merge_rows(inputs)
        tree = grow(inputs) if len(merged) > 1 else None
        worthy = tree is not None and len(tree.ids) <= grouping.tree and pays(sum(map(len, merged)), len(tree.ids))
        trees.append(tree if worthy else None)
    shared = _place(groups, trees)
    lengths = [len(row.ids) for row in shared.rows]
    if not shared.branching or max(lengths) > grouping.tree:
        return plain
    return shared if pays(grouping.cost([len(row.ids) for row in plain.rows]), grouping.cost(lengths)) else plain


def pays(plain: int, shared: int) -> bool:
    """Whether feeding ``shared`` tokens instead of ``plain`` is worth a mask of its own: a fifth less at least."""
    return 5 * shared <= 4 * plain


def _place(groups: Sequence[Sequence[Ids]], trees: Sequence[Tree | None]) -> Layout:
    """Examples with a tree get its row; all other inputs are merged into plain rows, across examples too."""
    left = [ids for inputs, tree in zip(groups, trees, strict=True) if tree is None for ids in inputs]
    served, merged = merge_rows(left)
    plain = iter(served)
    rows = [chain(ids) for ids in merged]
    row_of: list[int] = []
    columns: list[Sequence[int]] = []
    for inputs, tree in zip(groups, trees, strict=True):
        if tree is not None:
            rows.append(tree)
        row_of += [next(plain) if tree is None else len(rows) - 1 for _ in inputs]
        columns += [range(len(ids)) if tree is None else tree.columns[ids] for ids in inputs]
    return Layout(tuple(rows), tuple(row_of), tuple(columns), any(tree is not None for tree in trees))


def merge_rows(inputs: Sequence[Ids]) -> tuple[list[int], list[Ids]]:
    """Drop inputs that equal another or are its prefix. Returns for each input the index of its row, and the rows.

    A causal model's output at a position depends on nothing to its right, so the longer row serves both.
    """
    keeper: dict[Ids, Ids] = {}
    longest: Ids = ()
    # In sorted order the inputs that an input is a prefix of follow it directly.
    for ids in sorted(set(inputs), reverse=True):
        longest = longest if longest[: len(ids)] == ids else ids
        keeper[ids] = longest
    merged = list(dict.fromkeys(keeper[ids] for ids in inputs))
    index = {ids: row for row, ids in enumerate(merged)}
    return [index[keeper[ids]] for ids in inputs], merged


@dataclass(frozen=True)
class Batch:
    """Rows to feed and the list of tokens to read from them. R rows, T columns, P places, K tokens, O options, E
    examples."""

    input_ids: torch.Tensor
    """[R, T] right-padded."""
    attention_mask: torch.Tensor
    """[R, T] 1 on tokens, 0 on padding; where rows branch, [R, T, T] bool: which token sees which."""
    rows: torch.Tensor
    """[P] the rows of the places whose logits are read, each place once."""
    positions: torch.Tensor
    """[P] their columns."""
    places: torch.Tensor
    """[K] the place whose logits predict a token."""
    targets: torch.Tensor
    """[K] its id."""
    options: torch.Tensor
    """[K] the option it belongs to, among all options of the batch."""
    token_slot: torch.Tensor
    """[K] its index within the option."""
    option_example: torch.Tensor
    """[O] the example an option belongs to."""
    option_slot: torch.Tensor
    """[O] its index within the example."""
    gold: torch.Tensor
    """[E] index of the option to train on, within the example."""
    longest: int
    """Tokens of the longest option."""
    width: int
    """Options of the example that has most."""
    parts: tuple[Part, ...] = ()
    """The same rows and tokens split up by length, to be fed one part after the other; empty: fed as one."""
    decoder_ids: torch.Tensor | None = None
    """[R, D] right-padded rows of the decoder of an encoder-decoder, in which ``positions`` count."""
    pooled: bool = False
    """Whether the model gives one vector of logits per row; ``targets`` then are labels."""
    one_place: bool = False
    """Whether the options of every example are one token each, all predicted at one place."""
    at_places: tuple[str, ...] = ()
    """Names of modules that are computed at the places alone (:mod:`l2l.models.last_layer`)."""

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self.gold)

    def to(self, device: torch.device | str | None) -> "Batch":
        """The same batch with its tensors on ``device``; ``None`` leaves them where they are."""
        if device is None:
            return self
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        moved = {name: value.to(device) for name, value in fields if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **moved, parts=tuple(part.to(device) for part in self.parts))


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
    if examples[0].whole:  # only equal rows, with equal decoder rows, are one; columns are the decoder's, where it is fed
        inputs = [(option.fed, option.decoder) for option in options]
        index = {pair: row for row, pair in enumerate(dict.fromkeys(inputs))}
        columns = tuple(range(len(decoder or ids)) for ids, decoder in inputs)
        rows_of = tuple(index[pair] for pair in inputs)
        layout = Layout(tuple(chain(fed) for fed, _ in index), rows_of, columns, False, tuple(end for _, end in index))
    else:
        layout = lay_out([[option.fed for option in chosen] for chosen in picked], grouping)
    ids, mask = pad_rows([row.ids for row in layout.rows], pad_id)
    places: dict[tuple[int, int], int] = {}  # row and column of each, in the order in which they are first read
    per_token = [
        (places.setdefault((row, where[option.first + slot]), len(places)), target, number, slot)
        for number, (option, row, where) in enumerate(zip(options, layout.row_of, layout.columns, strict=True))
        for slot, target in enumerate(option.targets)
    ]
    per_option = [(example, slot) for example, chosen in enumerate(picked) for slot in range(len(chosen))]
    return Batch(
        ids,
        tree_attention_mask(layout.rows) if layout.branching else mask,
        *torch.tensor(list(places)).T.contiguous(),
        *torch.tensor(per_token).T.contiguous(),
        *torch.tensor(per_option).T.contiguous(),
        gold=torch.tensor([0 if form == "lm" else e.gold[0] for e in examples]),
        longest=max(len(option.targets) for option in options),
        width=max(map(len, picked)),
        decoder_ids=pad_rows(layout.decoders, pad_id)[0] if any(layout.decoders) else None,
        pooled=examples[0].pooled,
        one_place=_one_place(picked, per_token),
        at_places=() if grouping is None or examples[0].whole else grouping.at_places,
    ).to(device)


def _one_place(picked: Sequence[Sequence[object]], per_token: Sequence[tuple[int, ...]]) -> bool:
    """Whether every option is one token, and those of an example are predicted at one place."""
    if len(per_token) != sum(map(len, picked)):
        return False
    places = iter(place for place, *_ in per_token)
    return all(len({next(places) for _ in chosen}) == 1 for chosen in picked)


def pad_rows(rows: Sequence[Ids], pad_id: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, T] ids, padded on the right or on the left, and [R, T] int64 mask: 1 on tokens, 0 on padding."""
    columns = max(map(len, rows))
    empty = [(pad_id,) * (columns - len(row)) for row in rows]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, empty, strict=True)])
    lengths, index = torch.tensor([[len(row)] for row in rows]), torch.arange(columns)
    return ids, ((index >= columns - lengths) if left else (index < lengths)).long()
