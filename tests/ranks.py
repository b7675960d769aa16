"""Functions on several gloo processes of this machine, for tests of what is sharded."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

PATIENCE = 240.0
"""Seconds until a process counts as stuck."""


def _rank(function: Callable[..., Any], rank: int, count: int, folder: str, arguments: Sequence[Any]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        raise


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)``, of a module's top level, gives on each of ``count`` processes."""
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "pytest", "l2l", "cases"])
    with tempfile.TemporaryDirectory() as folder:
        work = [start.Process(target=_rank, args=(function, rank, count, folder, arguments)) for rank in range(count)]
        for process in work:
            process.start()
        for process in work:
            process.join(PATIENCE)
        for process in work:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        assert not errors, errors[0]
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(count)]
