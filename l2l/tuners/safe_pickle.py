"""Reads what a module pickle describes without doing it: classes stay names, nothing is imported, called or built.

The standard library's disassembler gives the instructions; a stack machine here gives each a meaning of its own, in plain
values. An instruction or a name that a module of linear layers does not need is refused, by name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

MOST_PICKLE_BYTES = 4 << 20
"""Of a pickle that is read: about four times what a tuner of 772 blocks has."""
MOST_DEPTH = 20_000
"""Of the stack; a mapping is written in groups of 1000 entries."""

SEQUENTIAL, LINEAR, TANH = (
    "torch.nn.modules.container Sequential",
    "torch.nn.modules.linear Linear",
    "torch.nn.modules.activation Tanh",
)
MODULES = (SEQUENTIAL, LINEAR, TANH)
"""Classes that a module may be of. Their code is never run."""
STORAGES = {"torch FloatStorage": "float32", "torch HalfStorage": "float16"}
"""Names of storages, and the dtype of each."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Where numbers lie in the file."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorPlace:
    """A tensor as the file describes it: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Module:
    """A module as the file describes it."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


def read(code: bytes) -> Any:
    """What a pickle that torch wrote describes: mappings, plain values, and the classes of this file.

    Raises:
        ValueError: it is no such pickle, too large, or names something that is not allowed.
    """
    if len(code) > MOST_PICKLE_BYTES:
        raise ValueError(f"its pickle has {len(code)} bytes, more than the {MOST_PICKLE_BYTES} that are read")
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(code):
            if operation.name == "STOP":
                return machine.result()
            machine.step(operation.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its pickle is broken ({type(error).__name__}: {error})") from error
    raise ValueError("its pickle has no end")


@final
class _Machine:
    """The stack, the marks on it, and what was kept by number."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError(f"its pickle ends with {len(self._stack)} values, not 1")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._push(_CONSTANTS[name]())
        elif name in _LITERALS:
            self._push(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._push(self._memo[argument])
        elif name == "GLOBAL":
            self._push(_allowed(argument))
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name != "PROTO":
            raise ValueError(f"its pickle uses {name}, which no module of linear layers needs")

    def _push(self, value: Any) -> None:
        if len(self._stack) >= MOST_DEPTH:
            raise ValueError(f"its pickle puts more than {MOST_DEPTH} values on the stack")
        self._stack.append(value)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def tuple_of(self, count: int | None) -> None:
        values = self._since_mark() if count is None else [self._stack.pop() for _ in range(count)][::-1]
        self._push(tuple(values))

    def set_items(self, one: bool) -> None:
        values = [self._stack.pop(), self._stack.pop()][::-1] if one else self._since_mark()
        target = self._stack[-1]
        keys = values[::2]
        if not isinstance(target, dict) or len(values) % 2 or not all(isinstance(key, str) for key in keys):
            raise ValueError("its pickle fills something that is no mapping from names")
        if len(set(keys)) < len(keys) or target.keys() & set(keys):
            raise ValueError("its pickle gives a name twice")
        target.update(zip(keys, values[1::2], strict=True))

    def storage(self) -> None:
        kind, dtype, key, _, numel = self._stack.pop()
        known = isinstance(dtype, Name) and dtype.text in STORAGES
        if kind != "storage" or not known or not isinstance(key, str) or not _whole(numel):
            raise ValueError("its pickle refers to something beside it that is no storage of numbers")
        self._push(Storage(key, STORAGES[dtype.text], numel))

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Name) or function.text not in _CALLS or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle calls {getattr(function, 'text', 'something that is no function')!r}")
        self._push(_CALLS[function.text](arguments))

    def new(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, Name) or kind.text not in MODULES or arguments != ():
            raise ValueError(f"its pickle makes a new {getattr(kind, 'text', 'something that is no class')!r}")
        self._push(Module(kind.text))

    def build(self) -> None:
        state, module = self._stack.pop(), self._stack[-1]
        if not isinstance(module, Module) or module.state or not isinstance(state, dict):
            raise ValueError("its pickle gives a state to something that is no new module")
        module.state = state


def _allowed(text: str) -> Name:
    if text not in MODULES and text not in STORAGES and text not in _CALLS:
        raise ValueError(f"its pickle names {text.replace(' ', '.')!r}, which no tuner needs")
    return Name(text)


def _tensor_place(arguments: tuple[Any, ...]) -> TensorPlace:
    """Of storage, offset, shape, stride, whether it wants a gradient, hooks: the last two mean nothing here."""
    storage, offset, shape, stride = arguments[:4]
    sizes = isinstance(shape, tuple) and isinstance(stride, tuple) and all(map(_whole, (offset, *shape, *stride)))
    if not isinstance(storage, Storage) or not sizes:
        raise ValueError("its pickle holds a tensor without a storage, or with sizes that are no whole numbers")
    return TensorPlace(storage, offset, shape, stride)


def _parameter(arguments: tuple[Any, ...]) -> TensorPlace:
    if not arguments or not isinstance(arguments[0], TensorPlace):
        raise ValueError("its pickle holds a parameter that is no tensor")
    return arguments[0]


def _empty(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments not in ((), ([],)):
        raise ValueError("its pickle fills a mapping or a set in a way that torch does not")
    return {}


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections OrderedDict": _empty,
    "__builtin__ set": _empty,
    "torch._utils _rebuild_tensor_v2": _tensor_place,
    "torch._utils _rebuild_parameter": _parameter,
}
"""What the file may ask to be called, and the function of this file that stands for it."""
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = ("BININT", "BININT1", "BININT2", "BINUNICODE")
_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": lambda machine: machine.tuple_of(None),
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "SETITEM": lambda machine: machine.set_items(True),
    "SETITEMS": lambda machine: machine.set_items(False),
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
}
