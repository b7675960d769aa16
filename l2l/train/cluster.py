"""A Ray cluster: joined at an address, or started on this machine; what a run asks of it, and how its faults are told.

Ray is imported here alone, when it is asked for. A task is a function in a process of some machine, an actor an object in one
(docs.ray.io). Both see this machine's relative paths: their working directory is the caller's, which all machines must have.
"""

import os
import socket
from importlib import import_module
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Within which an address must answer: Ray itself tries for minutes, and then ends the process."""
ADDRESS = "RAY_ADDRESS"
"""Environment variable that names a cluster, as Ray reads it."""
ON_THIS_MACHINE = "local"
"""In place of an address: a cluster of this machine alone, for as long as the process lives."""


def connect(address: str | None = None, cpus: int | None = None) -> Any:
    """The module ``ray``, connected: to ``address``, else to that of ``RAY_ADDRESS``, else to a cluster that is started here. A
    process that is connected already stays so.

    Args:
        address: ``host:port`` of a cluster that this machine is part of, ``auto`` for the one that runs on it,
            ``ray://host:port`` from outside of it (which needs ``ray[client]``), or ``local``.
        cpus: of a cluster that is started here; None: this machine's.

    Raises:
        ValueError: Ray is not installed, or nobody answers at the address.
    """
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise ValueError(
            "executor: ray needs Ray, which is not installed: pip install 'l2l[ray]', or use executor: local"
        ) from error
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here would report to Ray's makers
    address = address or os.environ.get(ADDRESS) or ON_THIS_MACHINE
    try:
        if address == ON_THIS_MACHINE:
            ray.init(address=address, num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        else:
            _check_answers(address)
            ray.init(address=address, log_to_driver=False)
    except Exception as error:  # Ray raises plain ones too, of a machine that is too busy
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"ray_address={address!r}: no Ray cluster can be joined there ({line}): start one (ray start --head), give "
            "host:port, auto or ray://host:port, or use ray_address: local for one on this machine"
        ) from error
    return ray


def _check_answers(address: str) -> None:
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    elif address != "auto":
        raise ValueError("it is not host:port")


def resources(device: str | None, threads: int = 1) -> dict[str, float]:
    """What a process on the cluster reserves: a processor for each thread, and a GPU where its device is one."""
    return {"num_cpus": threads, "num_gpus": 1 if (device or "").startswith("cuda") else 0}


def enter(folder: str) -> None:
    """In a process of the cluster: make ``folder`` the working directory.

    Raises:
        FileNotFoundError: this machine does not have it.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"machine {socket.gethostname()} of the cluster has no directory {folder!r}: all machines need the same files "
            "under the same paths"
        )
    os.chdir(folder)


class Lost(RuntimeError):
    """The process or machine that was at work is gone."""


def result(ray: Any, task: Any) -> Any:
    """What a task gave, which is waited for. What the code in it raised is raised here.

    Raises:
        Lost: its process or machine is gone, and Ray has not begun it again.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise Lost(str(error).strip().splitlines()[0]) from error
