"""What arrives while weights are written waits until they are whole: signals, and errors such as a lack of memory.

Half a traversal could not be undone, so it is always completed. A write that fails has written nothing, and is made again; its
error is raised afterwards, where memory and whoever keeps account of it agree. What fails twice in a row is raised at once.
"""

import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

HELD = (signal.SIGTERM, signal.SIGINT)
"""Signals whose handlers raise: KeyboardInterrupt, and what programs make of SIGTERM, often SystemExit."""
Value = TypeVar("Value")


class _Thread(threading.local):
    waiting: list[object] | None = None
    """Of the outermost deferral: numbers of signals, and errors."""


_here = _Thread()


@contextmanager
def defer_interrupt(late: list[object] | None = None) -> Iterator[None]:
    """Hold back signals, and errors of :func:`complete`, until the end of the block; of nested ones, of the outermost.

    Args:
        late: receives what arrives, instead of its being raised at the end; see :func:`raise_deferred`.
    """
    if _here.waiting is not None:
        yield
        return
    arrived: list[object] = [] if late is None else late
    known = {}
    if threading.current_thread() is threading.main_thread():  # signals arrive nowhere else
        known = {number: handler for number in HELD if callable(handler := signal.getsignal(number))}
    try:
        for number in known:
            signal.signal(number, lambda number, _: arrived.append(number))
        _here.waiting = arrived
        yield
    finally:
        _here.waiting = None
        _restore(list(known.items()))
        if arrived and late is None:
            raise_deferred(arrived)


def _restore(handlers: list[tuple[signal.Signals, object]]) -> None:
    """Set all of them, though one be called meanwhile and raise."""
    if handlers:
        number, handler = handlers.pop()
        try:
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        finally:
            _restore(handlers)


def raise_deferred(arrived: list[object]) -> None:
    """Raise the first of what was held back; the same signal twice counts once."""
    waiting = list(dict.fromkeys(arrived))
    arrived.clear()
    for one in waiting:
        if isinstance(one, BaseException):
            raise one
        signal.raise_signal(one)  # pyright: ignore[reportArgumentType]


def complete(writes: Iterable[Callable[[], Value]]) -> list[Value]:
    """Make writes that belong together, and give their values. Each must leave everything as it was where it fails.

    Raises:
        Exception: of the first that failed, when all are made and no deferral holds it back; of one that failed twice, at once.
    """
    found: list[Value] = []
    failed: list[Exception] = []
    for write in writes:
        try:
            found.append(write())
            continue
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # what they hold may be the memory that was wanted
            failed.append(error)
        found.append(write())
    if failed and _here.waiting is None:
        raise failed[0]
    if failed and _here.waiting is not None:
        _here.waiting += failed
    return found
