"""Ranks as threads of this process, with a store in its memory: no process is spawned, and a rank can be ended at any line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from torch.distributed import HashStore

from l2l.parallel import Ranks

PATIENCE = 60.0
"""Seconds until ranks that wait for each other count as stuck."""


def ranks_of(size: int, timeout: float = PATIENCE) -> list[Ranks]:
    store = HashStore()
    return [Ranks(rank, size, store, timeout) for rank in range(size)]


def started(call: Callable[[], Any]) -> Future[Any]:
    """The call in a thread of its own, which does not keep the tests alive."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def together(size: int, call: Callable[[Ranks], Any], timeout: float = PATIENCE) -> list[Any]:
    """What the call gives on each rank."""
    waiting = [started(lambda ranks=ranks: call(ranks)) for ranks in ranks_of(size, timeout)]
    return [one.result(PATIENCE) for one in waiting]
