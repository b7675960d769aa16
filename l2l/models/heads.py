"""Log-probabilities of chosen tokens, with logits computed only where they are needed.

A vocabulary has tens of thousands of entries and a prompt hundreds of tokens, but an option has one or two: full logits would
be most of the memory of a forward pass and a good part of its time. Tokens that are predicted at one place, a row and a column,
share its logits, and a batch that is fed in parts goes through the head once: a product reads the whole output embedding, be it
for one place or for twenty. Options that are told apart by one token each need no normaliser over the vocabulary either: of a
pass over a few top layers, that is a good part.

Under prefix and prompt tuning the model is fed virtual tokens too. Prompt tuning puts learned embeddings before a row, so that
every column lies further right; prefix tuning puts learned keys and values into the cache of every layer, and columns stay
where they are. Both take up positions.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, TypeGuard, final

import torch

from l2l.models.last_layer import computed_at
from l2l.models.prompt_trees import computing_dtype, tree_inputs


class TokenQuery(Protocol):
    """Rows to feed and K tokens to read at P places.

    ``input_ids``: [R, T] right-padded. ``attention_mask``: [R, T] 1 on tokens, 0 on padding; of rows that branch, the mask
    [R, T, T] of :mod:`l2l.models.prompt_trees`. ``rows``, ``positions``: [P] the places whose logits are read, each once.
    ``places``: [K] the place whose logits predict a token. ``targets``: [K] its id, or the label where rows are classified.
    ``decoder_ids``: [R, D] right-padded rows of the decoder, which positions count in; None for models with one stack.
    ``pooled``: whether the model gives one vector of logits per row. ``at_places``: names of modules that are computed at the
    places alone (:mod:`l2l.models.last_layer`).
    """

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def attention_mask(self) -> torch.Tensor: ...
    @property
    def rows(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def places(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...
    @property
    def decoder_ids(self) -> torch.Tensor | None: ...
    @property
    def pooled(self) -> bool: ...
    @property
    def at_places(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, padded to the longest of them, and the tokens to read from them: a :class:`TokenQuery` of its own.

    Only batches of models with one stack whose tokens are read are split up.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    """[K of this part] among the places of this part."""
    targets: torch.Tensor
    tokens: torch.Tensor
    """[K of this part] which of the whole batch's K tokens these are."""
    decoder_ids: torch.Tensor | None = None
    pooled: bool = False
    at_places: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> "Part":
        """The same part with its tensors on ``device``."""
        return replace(self, **{name: v.to(device) for name, v in vars(self).items() if isinstance(v, torch.Tensor)})


JOINED = 256
"""Most places of several parts whose logits are computed in one product. A product costs what some twenty places cost beside
its own, so that more would save little, and their logits take memory."""


@dataclass(frozen=True)
class JoinedParts:
    """Parts that are fed one by one, and whose P places go through the head together. K tokens are read there."""

    parts: tuple[TokenQuery, ...]

    @staticmethod
    def of(parts: Iterable[TokenQuery]) -> "list[JoinedParts]":
        """Neighbours, as long as they have at most :data:`JOINED` places; a part that has more stays alone."""
        found: list[list[TokenQuery]] = []
        for part in parts:
            if found and sum(len(one.rows) for one in (*found[-1], part)) <= JOINED:
                found[-1].append(part)
            else:
                found.append([part])
        return [JoinedParts(tuple(some)) for some in found]

    @property
    def places(self) -> torch.Tensor:
        """[K] the place of each token among those of all parts."""
        starts = accumulate((len(part.rows) for part in self.parts), initial=0)
        return torch.cat([part.places + start for part, start in zip(self.parts, starts, strict=False)])

    @property
    def targets(self) -> torch.Tensor:
        """[K] as in :class:`TokenQuery`."""
        return torch.cat([part.targets for part in self.parts])


def token_logprobs(model: torch.nn.Module, batch: TokenQuery, parts: Sequence[Part] = ()) -> torch.Tensor:
    """[K] float32 log-probabilities of ``batch.targets``, differentiable where gradients are enabled; of labels where rows are
    classified.

    While the model runs, its output embedding is given the gathered hidden states of the P places as one row, so whatever the
    model does to its logits (scale, soft cap) still happens. A model without an output embedding, or one that does not call it
    exactly once on [R, T, D], computes full logits instead.

    Args:
        model: a transformers model of the kind that the batch was made for.
        parts: the same rows and tokens split up (see :mod:`l2l.models.batching`): one forward pass for each instead of one for
            the whole batch, all but the last of which end before the head. The numbers are the same up to rounding, in the
            batch's order.
    """
    return read_logits(model, batch, parts, target_logprobs)


def target_logprobs(logits: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
    """[K] log-probabilities of the tokens, from logits [P, vocabulary]."""
    return logits.log_softmax(1)[joined.places, joined.targets]


def read_logits(
    model: torch.nn.Module,
    batch: TokenQuery,
    parts: Sequence[Part],
    read: Callable[[torch.Tensor, JoinedParts], torch.Tensor],
    targets_alone: bool = False,
    note: Callable[[torch.Tensor, JoinedParts], None] | None = None,
) -> torch.Tensor:
    """[K, …] what ``read`` makes, token by token, of the logits of their places: float32 [p, vocabulary] of the batch, or of
    parts that are joined.

    These are freed before those of the next parts are computed. With ``targets_alone`` they may be [k, 1], those of each
    token's own target. ``note`` is given the hidden states [p, D] that the head turns into them, before ``read`` is called,
    unless full logits were computed. Other arguments are those of :func:`token_logprobs`.
    """
    some = JoinedParts.of(parts or (batch,))
    return _in_order([read(_logits_at(model, joined, targets_alone, note).float(), joined) for joined in some], parts)


def _in_order(found: Sequence[torch.Tensor], parts: Sequence[Part]) -> torch.Tensor:
    """[K, …] values of the tokens of joined parts, in the order of the batch's tokens."""
    if not parts:
        return found[0]
    values, order = torch.cat(list(found)), torch.cat([part.tokens for part in parts])
    return torch.zeros_like(values).index_copy(0, order, values)


def token_logits(model: torch.nn.Module, batch: TokenQuery, parts: Sequence[Part] = ()) -> torch.Tensor:
    """[K] float32 logits of ``batch.targets``: their log-probabilities up to a number that all tokens of a place share.

    Where the output embedding is a linear layer, and larger than a layer of the model, it is read at the K targets alone, in
    float32. What the model does to each logit by itself (scale, soft cap) still happens. Elsewhere the logits of the whole
    vocabulary are computed, as by :func:`token_logprobs`, which has the same arguments.
    """

    def read(logits: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
        return logits[:, 0] if logits.shape[1] == 1 else logits[joined.places, joined.targets]

    return read_logits(model, batch, parts, read, targets_alone=True)


def _logits_at(
    model: torch.nn.Module,
    joined: JoinedParts,
    targets_alone: bool,
    note: Callable[[torch.Tensor, JoinedParts], None] | None,
) -> torch.Tensor:
    """[P, vocabulary] logits; [K, 1] of the targets alone, where that can be; [P, labels] where rows are classified."""
    *others, last = joined.parts
    if last.pooled:
        return _forward(model, last)[last.rows]
    head, before = output_embedding(model), columns_before(model)
    logits = None if head is None else _logits_of_all(model, head, before, joined, targets_alone, note)
    if logits is None:
        return torch.cat([_forward(model, part)[part.rows, part.positions + before] for part in (*others, last)])
    return logits


def _logits_of_all(
    model: torch.nn.Module,
    head: torch.nn.Module,
    before: int,
    joined: JoinedParts,
    targets_alone: bool,
    note: Callable[[torch.Tensor, JoinedParts], None] | None,
) -> torch.Tensor | None:
    """What :func:`_logits_at` gives, with one call of the head; None where the model does not call it once on [R, T, D]."""
    *others, last = joined.parts
    states: list[torch.Tensor] = []
    for part in others:
        reached = _states_at_head(model, head, before, part)
        if reached is None:
            return None
        states.append(reached)
    shapes: list[tuple[int, ...]] = []
    gathered: list[torch.Tensor] = []

    def gather(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(tuple(args[0].shape[:2]))
        gathered.append(torch.cat([*states, args[0][last.rows, last.positions + before]]))
        return (gathered[-1][None], *args[1:])

    def shape(_: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        shapes.append(tuple(output.shape))

    reading = _reading(head, joined.places, joined.targets) if targets_alone else nullcontext()
    with reading, head.register_forward_pre_hook(gather), head.register_forward_hook(shape):
        logits = _forward(model, last)
    if shapes[:1] != [_fed_shape(last, before)] or len(shapes) != 2:
        return None
    # Of a single column nothing else may be made; a model may cut a padded vocabulary.
    if logits.shape[:2] != shapes[1][:2] or (shapes[1][-1] == 1 and logits.shape[-1] > 1):
        return None
    if note is not None:
        note(gathered[0], joined)
    return logits.squeeze(0)


class _AtHead(Exception):
    """A forward pass has come to the head with the hidden states of the places, the argument; no error."""


def _states_at_head(model: torch.nn.Module, head: torch.nn.Module, before: int, part: TokenQuery) -> torch.Tensor | None:
    """[P, D] what the head is given at a part's places, by a pass that ends there; None where that is not [R, T, D]."""

    def stop(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if tuple(args[0].shape[:2]) == _fed_shape(part, before):
            raise _AtHead(args[0][part.rows, part.positions + before])

    with head.register_forward_pre_hook(stop):
        try:
            _forward(model, part)
        except _AtHead as reached:
            found: torch.Tensor = reached.args[0]
            return found
    return None


def _fed_shape(batch: TokenQuery, before: int) -> tuple[int, int]:
    """Rows and columns of the hidden states before the head."""
    rows, columns = (batch.input_ids if batch.decoder_ids is None else batch.decoder_ids).shape
    return rows, columns + before


LAYER = 12
"""Times the square of its width, a layer's parameters: four for attention and eight for what follows, as in most models."""


def _large_and_plain(head: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether it is a linear layer, larger than a layer of the model, in the place of whose function nothing was put."""
    return type(head) is torch.nn.Linear and "forward" not in vars(head) and head.out_features > LAYER * head.in_features


@contextmanager
def _reading(head: torch.nn.Module, places: torch.Tensor, targets: torch.Tensor) -> Iterator[None]:
    """Within, a linear head that is larger than a layer computes of each token the logit of its own target alone."""
    if not _large_and_plain(head):
        yield
        return
    vars(head)["forward"] = partial(_logits_of, head, places, targets)
    try:
        yield
    finally:
        del vars(head)["forward"]


def _logits_of(head: torch.nn.Linear, places: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """[1, K, 1] float32: of hidden states [1, P, D] the logit of each target at its place; of a sharded layer, all."""
    if type(head.weight) not in (torch.Tensor, torch.nn.Parameter):
        return torch.nn.functional.linear(hidden, head.weight, head.bias)
    return _products(head, hidden[0, places], targets[:, None])[None]


def _products(head: torch.nn.Linear, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[P, m] float32 logits of tokens [P, m] at hidden states [P, D]."""
    rows = torch.nn.functional.embedding(tokens, head.weight).float()
    logits = (states.float()[:, None] * rows).sum(-1)  # of each row by itself: its bits do not depend on how a batch is split
    return logits if head.bias is None else logits + head.bias[tokens].float()


# Near one point


GATHERED = 2**20
"""Most numbers of the output embedding that :class:`LinearRest` gathers at once: more would not stay in a processor's cache."""


@final
@dataclass(frozen=True)
class LinearRest:
    """At P places, logits of m tokens each, and the log of the summed exponentials of all others, linear in the hidden states.

    For directional derivatives the others matter to first order alone. About hidden states h0, with p their softmax over the
    others: log sum exp(W h) = log sum exp(W h0) + (p^T W)(h - h0). Computed once, this spares every evaluation nearby the
    product with the whole output embedding; the m logits are exact.
    """

    head: torch.nn.Linear
    tokens: torch.Tensor
    """[P, m]; m may be 0."""
    states: torch.Tensor
    """[P, D] h0."""
    value: torch.Tensor
    """[P] float32, at h0."""
    slope: torch.Tensor
    """[P, D] float32 p^T W."""

    @staticmethod
    def about(
        model: torch.nn.Module, states: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor, unperturbed: bool = False
    ) -> "LinearRest | None":
        """From float32 logits [P, vocabulary] at hidden states [P, D]. None where these are not a product with a frozen linear
        head that is larger than a layer and nothing more: a trained head is perturbed itself, and a soft cap is not linear.

        Args:
            unperturbed: whether it serves evaluations alone at which a trained head is not perturbed. In half precision such a
                head is left out nevertheless: these evaluations are compared with others, whose logits are rounded otherwise.
        """
        head = output_embedding(model)
        if head is None or not _large_and_plain(head) or type(head.weight) not in (torch.Tensor, torch.nn.Parameter):
            return None
        weight = head.weight
        fixed = (unperturbed and weight.dtype == torch.float32) or not any(one.requires_grad for one in head.parameters())
        if not fixed or weight.is_meta or logits.shape[1] != len(weight):
            return None
        likeliest = logits.argmax(1, keepdim=True)
        largest, product = logits.gather(1, likeliest), _products(head, states, likeliest)
        tolerance = max(ROUNDING, 8 * torch.finfo(weight.dtype).eps) * largest.abs().max()
        if not (product - largest).abs().max() <= tolerance:
            return None
        others = logits.scatter(1, tokens, -torch.inf)
        value = others.logsumexp(1)
        slope = others.softmax(1).to(weight.dtype) @ weight
        return LinearRest(head, tokens, states, value, slope.float())

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[P, m + 1] float32: the logits of the tokens, then the rest, at hidden states [P, D]."""
        size = max(1, GATHERED // max(1, self.tokens.shape[1] * states.shape[1]))
        pairs = zip(states.split(size), self.tokens.split(size), strict=True)
        logits = torch.cat([_products(self.head, some, tokens) for some, tokens in pairs])
        rest = self.value + ((states.float() - self.states.float()) * self.slope).sum(-1)
        return torch.cat([logits, rest[:, None]], 1)

    def target_logprobs(self, states: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
        """[K] as :func:`target_logprobs`, of a rest without exceptions: the normaliser."""
        logits = _products(self.head, states[joined.places], joined.targets[:, None])[:, 0]
        return logits - self(states)[joined.places, -1]


ROUNDING = 1e-4
"""Relative difference by which sums in float32 may differ in another order, with a margin."""


def read_states(
    model: torch.nn.Module,
    batch: TokenQuery,
    parts: Sequence[Part],
    read: Callable[[torch.Tensor, JoinedParts], torch.Tensor],
) -> torch.Tensor:
    """[K, …] what ``read`` makes of the hidden states [p, D] before the head, by passes that end there. As :func:`read_logits`.

    Raises:
        RuntimeError: the model does not call its head on [R, T, D], or has none.
    """
    head, before = output_embedding(model), columns_before(model)
    found = []
    for joined in JoinedParts.of(parts or (batch,)):
        states = [None if head is None else _states_at_head(model, head, before, part) for part in joined.parts]
        known = [some for some in states if some is not None]
        if len(known) < len(states):
            raise RuntimeError("the model does not call its head on the hidden states of all tokens, as it did before")
        found.append(read(torch.cat(known), joined))
    return _in_order(found, parts)


def output_embedding(model: torch.nn.Module) -> torch.nn.Module | None:
    """The layer that turns hidden states into logits, where the model names one."""
    return _named_by(model, "get_output_embeddings")


def decoder_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The part of a model before its head, where the model names one."""
    return _named_by(model, "get_decoder")


def _named_by(model: object, method: str) -> torch.nn.Module | None:
    find = getattr(model, method, None)
    found = find() if callable(find) else None
    return found if isinstance(found, torch.nn.Module) and found is not model else None


def _forward(model: Any, batch: TokenQuery) -> torch.Tensor:
    if virtual_tokens(model):
        inputs = virtual_inputs(model, batch.input_ids, batch.attention_mask)
        return model.get_base_model()(**inputs, use_cache=False).logits
    inputs = forward_inputs(model, batch.input_ids, batch.attention_mask)
    if batch.decoder_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_ids
    with computed_at(model, batch.at_places, batch.rows, batch.positions):
        return model(**inputs).logits


def forward_inputs(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Any]:
    """Arguments of a forward pass over rows, which are as in :class:`TokenQuery`, of a model without virtual tokens."""
    mask = attention_mask
    inputs = {"attention_mask": mask} if mask.ndim == 2 else tree_inputs(mask, computing_dtype(model))
    return {"input_ids": input_ids, "use_cache": False, **inputs}


def _prompt_config(model: object) -> Any:
    """The configuration of the model's prefix or prompt; None where it has neither."""
    config = getattr(model, "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None


def _in_cache(model: object) -> bool:
    """Whether the virtual tokens are keys and values: peft's configuration of a prefix is the one that may project them."""
    return hasattr(_prompt_config(model), "prefix_projection")


def virtual_tokens(model: object) -> int:
    """How many positions of every row an adapter takes up; 0 where the model has no prefix and no prompt."""
    config = _prompt_config(model)
    return 0 if config is None else config.num_virtual_tokens


def columns_before(model: object) -> int:
    """How many columns further right a row's hidden states lie: those of a prompt; a prefix has none."""
    return 0 if _in_cache(model) else virtual_tokens(model)


def virtual_inputs(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Any]:
    """Arguments of the base model, beside ``use_cache=False``, for rows with their virtual tokens, which every token sees.

    Args:
        model: a model of peft with a prefix or a prompt.
        input_ids, attention_mask: as in :class:`TokenQuery`.
    """
    before, count = model.get_prompt(len(input_ids)), virtual_tokens(model)
    rows, columns = attention_mask.shape[:2]
    if attention_mask.ndim == 2:
        found = {"attention_mask": torch.cat([attention_mask.new_ones(rows, count), attention_mask], 1)}
    else:
        whole = torch.ones(rows, *[count + columns] * 2, dtype=torch.bool, device=attention_mask.device).tril_()
        whole[:, count:, count:] = attention_mask
        found = tree_inputs(whole, computing_dtype(model))
        if _in_cache(model):
            mask, positions = found["attention_mask"], found["position_ids"]
            found = {"attention_mask": mask[:, :, count:], "position_ids": positions[:, count:]}
    if _in_cache(model):
        return {"input_ids": input_ids, "past_key_values": before, **found}
    embedded = model.get_input_embeddings()(input_ids)
    return {"inputs_embeds": torch.cat([before.to(embedded.dtype), embedded], 1), **found}


def generator(model: Any) -> Callable[..., torch.Tensor] | None:
    """The function that continues left-padded rows under a model: its ``generate``, or None where it has none.

    Under prompt tuning the prompt comes before the padding and positions count attended tokens only, where peft's own
    ``generate`` counts the padding as well.
    """
    if not columns_before(model):
        return getattr(model, "generate", None)

    def after_prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        inputs = virtual_inputs(model, input_ids, attention_mask)
        found = model.get_base_model().generate(**inputs, **options)  # given embeddings, it returns new tokens only
        return torch.cat([input_ids, found], 1)

    return after_prompt


def compile_decoder(model: torch.nn.Module) -> None:
    """Compile the layers before the head with torch.compile, for rows of any number and length.

    The head is left as it is, because the positions it reads change with every batch. Compiled code reads the weights
    anew at each call, so it follows changes in place. The first calls take half a minute or more.

    Raises:
        ValueError: the model names no decoder apart from itself, or runs on the CPU and there is no C++ compiler.
    """
    decoder = decoder_of(model)
    if decoder is None:
        raise ValueError(f"{type(model).__name__} names no decoder apart from its head; leave compile off")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if next(model.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"compile needs a C++ compiler and {compiler!r} is not there; install it, set CXX, or leave compile off"
        )
    decoder.compile(dynamic=True)


def uncompiled(model: object) -> AbstractContextManager[Any]:
    """Run a compiled decoder uncompiled inside, for calls whose shapes and caches change every time."""
    compiled = getattr(_named_by(model, "get_decoder"), "_compiled_call_impl", None)
    return nullcontext() if compiled is None else torch.compiler.set_stance("force_eager")
