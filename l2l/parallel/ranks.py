"""The ranks of a run, and their messages: small values under keys in a store of ``torch.distributed``.

A key-value store, and no collectives: a collective breaks for all when one rank dies, while a key waits for whoever comes back
under the same rank, and a rank may come late, since everything it needs to know is under a key. Under ``torchrun`` the store is
the launcher's; else rank 0 has it, or the process group that the program has made. See docs/decisions/0025-many-machines.md.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, final

import torch.distributed
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LONGEST = 0.02
"""Seconds between two looks at a key that has been awaited for long."""
SHARE = 0.2
"""Of the time that a key has been awaited, until the next look: what waiting costs is a few looks per doubling of it."""
CONNECT = 300.0
"""Seconds to wait for the store to be there, as torch's own start of a process group does."""
END, FAILED, BYE = "end", "failed", "bye"
"""Keys: the run has ended, and why; a rank has failed, and why; a rank has read that the run has ended."""
FAREWELL = 10.0
"""Seconds that rank 0 waits, at the end of a run, for the others to have read of it."""


class RankError(ConnectionError):
    """Another rank is gone, has failed, or does not answer."""


class RunFinished(Exception):
    """Rank 0 has finished the run."""


@final
class Ranks:
    """One of several processes that run the same program, and its mailbox.

    Args:
        rank: of this process; 0 writes files.
        size: how many there are; of a population, how many there were in the beginning.
        store: a ``torch.distributed`` store.
        timeout: seconds that a message is waited for.
        attempt: how often the launcher has begun anew: keys of earlier attempts are not seen.

    Raises:
        ValueError: ``rank`` is not below ``size``.
    """

    def __init__(self, rank: int, size: int, store: Any, timeout: float = 1800.0, attempt: str = "0") -> None:
        if not 0 <= rank < size:
            raise ValueError(f"RANK={rank} must be at least 0 and below WORLD_SIZE={size}: set both as torchrun does")
        self.rank, self.size, self.timeout = rank, size, timeout
        self._store, self._prefix = store, f"l2l{attempt}/"
        self.sent: Counter[str] = Counter()
        """Bytes of values that were posted, by what they are: ``step``, ``log``, ``checksum``."""
        self.overhead = 0
        """Bytes of the keys beside them, of those that were asked for, too."""

    def post(self, key: str, value: bytes, kind: str = "step") -> None:
        """Put a value under a key, for all to read."""
        self.sent[kind] += len(value)
        self.overhead += len(key)
        self._call("set", self._prefix + key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to the number under a key; gives the sum."""
        return self._call("add", self._prefix + key, amount)

    def there(self, key: str) -> bool:
        """Whether there is a value under a key."""
        self.overhead += len(key)
        return self._call("check", [self._prefix + key])

    def read(self, key: str) -> bytes:
        """The value under a key that is there."""
        self.overhead += len(key)
        return self._call("get", self._prefix + key)

    def delete(self, keys: Sequence[str]) -> None:
        """Forget values that everybody has read."""
        for key in keys:
            self._call("delete_key", self._prefix + key)

    def collect(self, key: str, source: int | None = None, timeout: float | None = None) -> bytes:
        """The value under a key, once it is there.

        Args:
            source: the rank it is awaited from, which an error then names.

        Raises:
                RankError: it has not come in time, its source has failed, or rank 0 has ended the run with an error.
            RunFinished: rank 0 has finished the run.
        """
        self.first_of([key], source, timeout)
        return self.read(key)

    def first_of(self, keys: Sequence[str], source: int | None = None, timeout: float | None = None) -> str:
        """The first of some keys under which there is a value, once there is; arguments and errors as of :meth:`collect`."""
        limit, began, looks = self.timeout if timeout is None else timeout, time.monotonic(), 0
        while True:
            for key in keys:
                if self.there(key):
                    return key
            waited = time.monotonic() - began
            if waited > limit:
                who = "another rank" if source is None else f"rank {source}"
                raise RankError(
                    f"{who} has not sent {keys[0]!r} for {waited:.0f} s: start it again, or end all ranks and run the same "
                    "command again; a slow one gets more time with --rank_timeout"
                )
            if looks % 8 == 7:
                self.check(source)
            looks += 1
            time.sleep(min(LONGEST, SHARE * waited))

    def check(self, source: int | None = None) -> None:
        """Raise what :meth:`collect` raises where rank ``source`` has failed, or rank 0 has ended the run."""
        if source is not None and self.there(f"{FAILED}.{source}"):
            raise RankError(f"rank {source} has failed: {self.read(f'{FAILED}.{source}').decode()}")
        if self.rank and self.there(END):
            text = self.read(END).decode()
            raise RankError(f"rank 0 has ended the run: {text}") if text else RunFinished

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        line = " ".join(str(error).split()) or type(error).__name__
        with suppress(RankError):  # where the store is gone, so are those who could read it
            self.post(END if self.rank == 0 else f"{FAILED}.{self.rank}", line.encode(), END)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Around what this rank does: the others are told of an error."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def end(self, others: Sequence[int]) -> dict[int, bytes]:
        """Rank 0: the run is finished. Waits a while until the others have read it, as the store may go with this process; what
        they said, :meth:`leave`."""
        self.post(END, b"", END)
        deadline, found = time.monotonic() + FAREWELL, {}
        for other in others:
            while not self.there(f"{BYE}.{other}") and time.monotonic() < deadline:
                time.sleep(LONGEST)
            if self.there(f"{BYE}.{other}"):
                found[other] = self.read(f"{BYE}.{other}")
        return found

    def leave(self, word: bytes) -> None:
        """Another rank: it has read that the run is finished."""
        with suppress(RankError):
            self.post(f"{BYE}.{self.rank}", word, END)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, name)(*arguments)
        except (torch.distributed.DistError, RuntimeError) as error:
            line = str(error).splitlines()[0]
            raise RankError(
                f"the store of the run is gone, with rank 0 or the launcher: run the same command again on all ranks ({line})"
            ) from error


def ranks_of_environment(timeout: float = 1800.0) -> Ranks | None:
    """The ranks that ``torchrun`` and the like have started, by ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``;
    None where there is one process only. The store is the launcher's, that of the process group where the program has made
    one, or rank 0's own.

    Raises:
        ValueError: one of these variables is missing, or no number.
    """
    names = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    given = {name: os.environ.get(name) for name in names}
    if given["RANK"] is None or given["WORLD_SIZE"] in (None, "1"):
        return None
    if missing := [name for name, value in given.items() if not value]:
        raise ValueError(f"RANK is set, and {missing[0]} is not: set {', '.join(names)}, or use torchrun, which does")
    try:
        rank, size, port = (int(given[name] or "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE and MASTER_PORT must be whole numbers: {error}") from error
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own = rank == 0 and not launchers and not torch.distributed.is_initialized()
    limit = timedelta(seconds=CONNECT)
    options: dict[str, Any] = {"is_master": own, "timeout": limit, "wait_for_workers": False, "multi_tenant": True}
    try:
        store = TCPStore(given["MASTER_ADDR"] or "", port, **options)
    except torch.distributed.DistError as error:
        line = str(error).splitlines()[0]
        raise RankError(f"no store of the run at {given['MASTER_ADDR']}:{port}: start rank 0 first ({line})") from error
    return Ranks(rank, size, store, timeout, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
