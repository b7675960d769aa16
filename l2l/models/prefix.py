"""Training the top of a model: which parameters that is, and the hidden states below it, computed once per row.

Below the lowest trained layer nothing changes during a run, so what a row's tokens are turned into there is computed once and
kept. While a :class:`PrefixCache` is attached, a forward pass over rows that it knows leaves the layers below out: the last of
them returns what is kept; rows that are planned are computed when they are first met. Everything else of the model runs as it
is, so the numbers are those of a whole pass.

The structure is found by running the model on a few tokens and watching: its layers are the modules of one class in its
longest ModuleList, each called once, in order; a parameter belongs to the layer in which it is first read. No names are used.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, TypeAlias, TypeVar, final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from l2l.models.heads import TokenQuery, decoder_of, forward_inputs, virtual_tokens
from l2l.models.kinds import kind_of
from l2l.models.last_layer import computed_at, replaced_forwards

TrainLayers: TypeAlias = str | int | Sequence[int]
"""``all``; ``top:5``, the last five layers; ``top:1/3``, the last third, rounded up; or layers by number from 0, ``25,26``."""

_Value = TypeVar("_Value")
_TOP = re.compile(r"top:(\d+)(?:/(\d+))?")
_PROBED = 4
"""Tokens of the row on which a model is watched."""


class NoPrefixError(ValueError):
    """The layers of a model cannot be told apart, or not be left out; the message says why."""


def _parsed(spec: TrainLayers) -> int | Fraction | tuple[int, ...] | None:
    """Number or share of the last layers, or the layers by number; None for all. ValueError where it is none of these."""
    wrong = f"train_layers={spec!r} must be all, top:5, top:1/3, or numbers of layers such as 25,26,29"
    if spec == "all":
        return None
    if isinstance(spec, str) and (found := _TOP.fullmatch(spec)):
        top, parts = int(found[1]), int(found[2] or 1)
        if top < 1 or not parts or (found[2] and top > parts):
            raise ValueError(f"{wrong}; top:{found[0][4:]} is no part of a model")
        return Fraction(top, parts) if found[2] else top
    try:
        values = re.split(r"\s*,\s*", spec.strip("[] ")) if isinstance(spec, str) else [spec] if isinstance(spec, int) else spec
        numbers = tuple(sorted({int(value) for value in values}))
    except (TypeError, ValueError):
        raise ValueError(wrong) from None
    if not numbers or numbers[0] < 0:
        raise ValueError(wrong)
    return numbers


def check_train_layers(spec: TrainLayers) -> None:
    """Raise ValueError where the value can be seen to be wrong before a model is loaded."""
    _parsed(spec)


def same_layers(one: TrainLayers, other: TrainLayers) -> bool:
    """Whether two values mean the same layers in every model; ValueError where one of them means none."""
    first, second = _parsed(one), _parsed(other)
    return type(first) is type(second) and first == second


def chosen_layers(spec: TrainLayers, count: int) -> range | tuple[int, ...]:
    """The layers, by number from 0, that ``spec`` chooses of ``count``. ValueError where the model has no such layer."""
    found = _parsed(spec)
    if found is None:
        return range(count)
    if isinstance(found, tuple):
        if found[-1] >= count:
            raise ValueError(f"train_layers={spec!r} names layer {found[-1]}, but the model's are 0 to {count - 1}")
        return found
    top = found if isinstance(found, int) else math.ceil(found * count)
    if top > count:
        raise ValueError(f"train_layers={spec!r} asks for {top} layers, but the model has {count}: use all, or fewer")
    return range(count - top, count)


# Structure, by watching a forward pass.


def layer_list(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The longest list of modules of one class in the decoder, lists inside of others apart; None where there is none."""
    for owner in (decoder_of(model), model):
        lists = [module for module in (owner or model).modules() if isinstance(module, torch.nn.ModuleList)]
        alike = [one for one in lists if len({type(layer) for layer in one}) == 1]
        inside = {id(module) for one in alike for module in one.modules() if module is not one}
        outer = [one for one in alike if id(one) not in inside]
        if outer:
            return max(outer, key=len)
    return None


@dataclass(frozen=True)
class LayerTrace:
    """What a forward pass showed of a model of L layers."""

    layers: tuple[torch.nn.Module, ...]
    """[L] in the order of their calls."""
    places: Mapping[int, int]
    """By ``id``: the layer in which a parameter is first read; 0 for one that is read before (an embedding, also one that is
    the head too), L for one after all layers (the last norm, a head of its own). Without parameters that are never read."""
    returned: int
    """Length of the tuple that a layer returns; 0: the hidden states themselves."""
    width: int
    """D, of the hidden states [R, T, D]."""
    dtype: torch.dtype
    """Theirs."""

    def lowest_trained(self, model: torch.nn.Module) -> int:
        """The lowest layer with, or above, a parameter that requires a gradient; L where only what follows the layers does."""
        places = [self.places[id(p)] for p in model.parameters() if p.requires_grad and id(p) in self.places]
        return min(places, default=len(self.layers))


@torch.no_grad()
def trace_layers(model: Any) -> LayerTrace:
    """Watch a forward pass over one row of a few tokens; of a model without memory (on the meta device) too, or of one in which
    some layers have none.

    Raises:
        NoPrefixError: a model of two stacks, one without a list of layers, or whose layers are not called once each, in order,
            on hidden states [R, T, D] that they pass on.
    """
    layers, name = layer_list(model), type(model).__name__
    if kind_of(model) == "seq2seq" or layers is None:
        raise NoPrefixError(f"{name} has {'two stacks' if layers else 'no list'} of layers")
    if virtual_tokens(model):
        raise NoPrefixError(f"the virtual tokens of {name} lie before every layer")
    weight = next(model.parameters())
    empty = [] if weight.is_meta else [layer for layer in layers if any(p.is_meta for p in layer.parameters())]
    places = {id(p): i for i, layer in reversed(list(enumerate(layers))) for p in layer.parameters()}
    watch, called, outputs = _FirstReads(model, places), [], []

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        called.append((index, getattr(args[0] if args else kwargs.get("hidden_states"), "ndim", 0)))

    def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any, index: int) -> None:
        watch.place = index + 1
        outputs.append(output)

    handles = [
        handle
        for i, layer in enumerate(layers)
        for handle in (
            layer.register_forward_pre_hook(partial(before, index=i), with_kwargs=True),
            layer.register_forward_hook(partial(after, index=i)),
        )
    ]
    ids = torch.arange(_PROBED, device=weight.device)[None]
    inputs = {"attention_mask": torch.ones_like(ids)}
    if weight.is_meta:  # a mask that says it all is not looked into
        inputs = {"attention_mask": torch.zeros(1, 1, _PROBED, _PROBED, device="meta", dtype=weight.dtype), "position_ids": ids}
    try:
        with watch, replaced_forwards(empty, lambda _, forward: partial(_without_weights, forward)):
            model(input_ids=ids, use_cache=False, **inputs)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise NoPrefixError(f"{name} cannot be run on a few tokens ({reason[0]})") from error
    finally:
        for handle in handles:
            handle.remove()
    states = [output[0] if isinstance(output, tuple) else output for output in outputs]
    if called != [(i, 3) for i in range(len(layers))] or any(
        getattr(state, "shape", ())[:2] != (1, _PROBED) for state in states
    ):
        raise NoPrefixError(f"{name} does not call its layers once each, in order, on hidden states")
    first = outputs[0]
    kind = states[0].shape[2], states[0].dtype
    return LayerTrace(tuple(layers), places, len(first) if isinstance(first, tuple) else 0, *kind)


def _without_weights(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a layer on the meta device returns, with the hidden states that it is given."""
    there = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
    output = forward(*there[0], **there[1])
    return _returned(args[0] if args else kwargs["hidden_states"], len(output) if isinstance(output, tuple) else 0)


def _returned(states: Any, length: int) -> Any:
    """Hidden states in the form in which a layer returns them; see :class:`LayerTrace`."""
    return (states, *[None] * (length - 1)) if length else states


@final
class _FirstReads(TorchFunctionMode):
    """While it is active, notes at which place each parameter is first read: a function makes a tensor of it."""

    def __init__(self, model: torch.nn.Module, places: dict[int, int]) -> None:
        super().__init__()
        self.place = 0
        self._ids, self._places = {id(parameter) for parameter in model.parameters()}, places

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, torch.Tensor) for value in _flat([result])):
            for value in _flat([*args, *(kwargs or {}).values()]):
                if id(value) in self._ids:
                    self._places[id(value)] = min(self.place, self._places.get(id(value), self.place))
        return result


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, those of lists and tuples one by one."""
    for value in values:
        yield from value if isinstance(value, tuple | list) else (value,)


def train_only(model: torch.nn.Module, spec: TrainLayers) -> list[torch.nn.Parameter]:
    """Freeze what lies outside the chosen layers and does not follow the last one: an embedding, with a head that is tied to
    it, and the other layers. Returns what was trainable of it, for :func:`l2l.models.load.thaw`.

    Raises:
        NoPrefixError: the model's layers cannot be told apart.
        ValueError: the model has no such layer, or nothing would be trained.
    """
    if _parsed(spec) is None:
        return []
    try:
        trace = trace_layers(model)
    except NoPrefixError as error:
        raise NoPrefixError(f"train_layers={spec!r}, but {error}: use all, and freeze parameters by their names") from error
    count = len(trace.layers)
    kept = {*chosen_layers(spec, count), count}
    below = [parameter for parameter in model.parameters() if trace.places.get(id(parameter)) not in kept]
    changed = [parameter for parameter in below if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"train_layers={spec!r} leaves nothing to train: all that may be trained lies below these layers")
    return changed


# Rows, and what is kept of them.


@dataclass(frozen=True)
class Fill:
    """Rows to compute in one forward pass, each one new."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    """As in :class:`l2l.models.heads.TokenQuery`; both on the CPU."""
    keys: tuple[bytes, ...]
    lengths: tuple[int, ...]
    """Columns of each row, without the padding on its right."""
    rows: torch.Tensor
    positions: torch.Tensor
    at_places: tuple[str, ...]
    """What is read of these rows, as in :class:`l2l.models.heads.TokenQuery`: the last layer may be computed there alone."""


KEY_BYTES = 16
_ROW_ARGUMENTS = {"input_ids", "attention_mask", "position_ids"}
_NEUTRAL_ARGUMENTS = {"use_cache", "labels", "logits_to_keep", "return_dict"}
"""They change nothing in the layers."""


def row_keys(inputs: Mapping[str, Any], namespace: bytes = b"") -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """A digest of each row's tokens, mask and positions, and how many columns it has without the padding on its right.

    Args:
        namespace: at most 16 bytes; the same row has another key in another namespace.
        inputs: ``input_ids`` [R, T]; ``attention_mask`` [R, T], or additive [R, 1, T, T], where padding is a column that
            attends to nothing but itself; ``position_ids`` [R, T] where the model is given them.
    """
    ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu()
    columns = ids.shape[1]
    seen = mask != 0 if mask.ndim == 2 else mask[:, 0] == 0
    others = seen if mask.ndim == 2 else seen & ~torch.eye(columns, dtype=torch.bool)
    taken = others if mask.ndim == 2 else others.any(1) | others.any(2)
    lengths = tuple((taken * torch.arange(1, columns + 1)).amax(1).clamp(min=1).tolist())
    positions = None if inputs.get("position_ids") is None else inputs["position_ids"].cpu().expand(len(ids), -1)
    keys = []
    for row, length in enumerate(lengths):
        parts = [ids[row, :length], seen[row, :length] if mask.ndim == 2 else seen[row, :length, :length]]
        parts += [] if positions is None else [positions[row, :length]]
        content = bytes([mask.ndim, len(parts)]) + b"".join(part.numpy().tobytes() for part in parts)
        keys.append(hashlib.blake2b(content, digest_size=KEY_BYTES, person=namespace).digest())
    return tuple(keys), lengths


def plan_fills(model: torch.nn.Module, batches: Iterable[TokenQuery], namespace: bytes = b"") -> list[Fill]:
    """What to compute so that these batches are known in a namespace: each distinct row once, with those of its first batch."""
    known: set[bytes] = set()
    fills = []
    for batch in batches:
        keys, lengths = row_keys(forward_inputs(model, batch.input_ids, batch.attention_mask), namespace)
        new = [row for row, key in enumerate(keys) if key not in known and keys.index(key) == row]
        if new:
            chosen = torch.tensor(new)
            rows = batch.input_ids.cpu()[chosen], batch.attention_mask.cpu()[chosen]
            at, among = torch.nonzero(batch.rows.cpu()[:, None] == chosen, as_tuple=True)
            places = among, batch.positions.cpu()[at], batch.at_places
            fills.append(Fill(*rows, tuple(keys[row] for row in new), tuple(lengths[row] for row in new), *places))
            known.update(keys)
    return fills


@dataclass
class _Call:
    """How layers behave in one forward pass: those below ``start`` are left out, the last of them returning ``states``, and
    after layer ``stop - 1`` the pass ends."""

    start: int
    states: torch.Tensor | None
    stop: int | None = None


class _Reached(Exception):
    """A forward pass has computed what was asked for, the argument; no error."""


@final
class PrefixCache:
    """Hidden states [t, D] behind the layers below ``lowest``, by row.

    Args:
        model: one whose lower layers do not change while the cache is in use.
        lowest: the lowest trained layer, at least 1; L where only what follows the layers is trained.
    """

    def __init__(self, model: torch.nn.Module, trace: LayerTrace, lowest: int) -> None:
        self.model, self.lowest = model, lowest
        self.rows: dict[bytes, torch.Tensor] = {}
        self.planned: dict[bytes, Fill] = {}
        """Rows to compute when they are first met: always in the pass that was planned, so that the states do not depend on
        when that is."""
        self.pinned = False
        """Whether states that are computed when they are met go to page-locked memory of the host."""
        self.namespace = b""
        """Of the rows of passes from now on (:func:`row_keys`)."""
        self.seconds = 0.0
        """Of computing rows when they were first met."""
        self._trace = trace
        self._call: _Call | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it is active, forward passes over rows that are all known, or planned, leave the lower layers out.

        Other passes run as they are: those over rows some of which are neither, and those that are given, or asked for,
        more than rows and logits (key-value caches, the hidden states of all layers).
        """
        lower = self._trace.layers[: self.lowest]
        handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        handles += [self.model.register_forward_hook(self._end, always_call=True)]
        try:
            with replaced_forwards(lower, lambda index, forward: partial(self._layer, index, forward)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {name for name, value in kwargs.items() if value is not None}
        rows = {"input_ids", "attention_mask"} <= given <= _ROW_ARGUMENTS | _NEUTRAL_ARGUMENTS
        if self._call is not None or args or not rows or kwargs.get("use_cache") is not False:
            return
        keys, _ = row_keys(kwargs, self.namespace)
        for key in keys:
            if key not in self.rows and key in self.planned:
                began = time.perf_counter()
                states = self.compute(self.planned[key])
                self.keep(self.planned[key], states.cpu().pin_memory() if self.pinned else states)
                self.seconds += time.perf_counter() - began
        if all(key in self.rows for key in keys):
            self._call = _Call(self.lowest, self._padded(keys, kwargs["input_ids"]))
        elif any(p.is_meta for p in self._trace.layers[0].parameters()):
            raise ValueError(
                "a batch has rows whose hidden states are not kept, and the layers below are not in memory to compute them: "
                "leave stream_layers off"
            )

    def _end(self, *_: Any) -> None:
        self._call = None

    def _padded(self, keys: Sequence[bytes], input_ids: torch.Tensor) -> torch.Tensor:
        """[R, T, D] states of rows; 0 on padding, which no token sees."""
        states = torch.nn.utils.rnn.pad_sequence([self.rows[key] for key in keys], batch_first=True)
        states = states.to(input_ids.device, non_blocking=True)
        return torch.nn.functional.pad(states, (0, 0, 0, input_ids.shape[1] - states.shape[1]))

    def _layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What layer ``index`` does in the present call."""
        call = self._call
        if call is not None and index < call.start:
            states = call.states if index == call.start - 1 else args[0] if args else kwargs["hidden_states"]
            return _returned(states, self._trace.returned)
        output = forward(*args, **kwargs)
        if call is not None and index + 1 == call.stop:
            raise _Reached(output[0] if isinstance(output, tuple) else output)
        return output

    def compute(self, fill: Fill, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """[tokens, D] states of rows behind layer ``stop - 1`` (None: the last below ``lowest``), row after row.

        Args:
            start: the layers below are left out, and what is kept of the rows is what they gave.

        The cache must be attached.
        """
        device = next(self.model.parameters()).device
        inputs = forward_inputs(self.model, fill.input_ids.to(device), fill.attention_mask.to(device))
        states = self._padded(fill.keys, inputs["input_ids"]) if start else None
        self._call = _Call(start, states, self.lowest if stop is None else stop)
        try:
            rows, positions = (index.to(device) for index in (fill.rows, fill.positions))
            with torch.inference_mode(False), torch.no_grad(), computed_at(self.model, fill.at_places, rows, positions):
                self.model(**inputs)
        except _Reached as reached:
            found: torch.Tensor = reached.args[0]
            return torch.cat([row[:length] for row, length in zip(found, fill.lengths, strict=True)])
        finally:
            self._call = None
        raise AssertionError("a cache must be attached to compute rows")

    def plan(self, fills: Iterable[Fill]) -> None:
        """Compute these rows when they are first met."""
        self.planned.update((key, fill) for fill in fills for key in fill.keys)

    def keep(self, fill: Fill, states: torch.Tensor) -> None:
        """Know these rows from now on; ``states`` as :meth:`compute` gives them, on any device."""
        self.rows.update(zip(fill.keys, states.split(fill.lengths), strict=True))


@final
class StepStates:
    """Within a step, hidden states below the top layers, from which a pass begins where nothing below them is displaced.

    Args:
        lowest: the lowest of the top layers, at least 1.
        displaced: whether anything below them is, of the weights that an evaluation sees now.
    """

    def __init__(self, model: torch.nn.Module, trace: LayerTrace, lowest: int, displaced: Callable[[], bool]) -> None:
        self._cache = PrefixCache(model, trace, lowest)
        self._displaced = displaced

    def sharing(self, closure: Callable[[], _Value], fed: Sequence[TokenQuery]) -> Callable[[], _Value]:
        """The closure, of one step alone: the first pass with nothing displaced below keeps the states, for as long as the
        closure is there.

        Args:
            fed: what it feeds the model.
        """
        cache, rows, planned = self._cache, dict[bytes, torch.Tensor](), dict[bytes, Fill]()

        def shared() -> _Value:
            if self._displaced():
                return closure()
            if not planned:
                planned.update((key, fill) for fill in plan_fills(cache.model, fed) for key in fill.keys)
            cache.rows, cache.planned = rows, planned
            try:
                with cache.attached():
                    return closure()
            finally:
                cache.rows, cache.planned = {}, {}

        return shared


_FORMAT = "2"
"""Of rows that are kept on disk."""
_CHUNK = 2**26
"""Bytes that are hashed at a time."""


def prefix_identity(
    model: Any,
    trace: LayerTrace,
    lowest: int,
    fills: Sequence[Fill],
    context: int,
    read: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, str]:
    """What the states of rows follow from, in words of the user's: a cache of another identity is not to be used.

    Args:
        read: gives the weights, by name, of layers that are not in memory.
    """
    weights, rows = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if trace.places.get(id(parameter), lowest) < lowest:
            value = read(name).to(parameter.dtype) if read and parameter.is_meta else parameter.detach()
            plain = value if type(value) in (torch.Tensor, torch.nn.Parameter) else value.dequantize()
            weights.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
            for chunk in plain.reshape(-1).view(torch.uint8).split(_CHUNK):
                weights.update(chunk.cpu().numpy().tobytes())
    for key in sorted(key for fill in fills for key in fill.keys):
        rows.update(key)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in ("_name_or_path", "dtype")}
    text = json.dumps(settings, sort_keys=True, default=str).encode()
    return {
        "format": _FORMAT,
        "lowest trained layer": str(lowest),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "context length": str(context),
        "model config": hashlib.blake2b(text, digest_size=16).hexdigest(),
        "weights below": weights.hexdigest(),
        "rows": rows.hexdigest(),
    }
