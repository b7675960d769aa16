"""Holding an interrupt back while theta is between two places."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def defer_interrupt(late: list[object] | None = None) -> Iterator[None]:
    """Hold a Ctrl-C back until the traversal is done: half a traversal could not be undone.

    Args:
        late: where one that arrives is noted instead of being raised at the end; see :func:`deliver`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[object] = [] if late is None else late
    previous = signal.signal(signal.SIGINT, lambda _signal, frame: arrived.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
        if arrived and late is None:
            raise_deferred(arrived)


def raise_deferred(arrived: list[object]) -> None:
    """Raise the interrupts that were held back."""
    if arrived:
        arrived.clear()
        signal.raise_signal(signal.SIGINT)
