"""Saved tuners, each broken in a way of its own: from the folder of a good one to one that must be refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from l2l.tuners import io as store

Break = Callable[[Path], object]


class Payload:
    """What a hostile pickle holds: unpickled, it would write a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def flip(name: str, at: float, bit: int) -> Break:
    """Turn one bit round, at a share of the file's length."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[min(int(at * len(data)), len(data) - 1)] ^= 1 << bit
        (folder / name).write_bytes(data)

    return change


def cut(name: str, at: float) -> Break:
    """Keep a share of the file."""
    return lambda folder: os.truncate(folder / name, int(at * (folder / name).stat().st_size))


def with_weights(change: Callable[[dict[str, Tensor]], object]) -> Break:
    """Other weights under a checksum that fits them, so that it is not what is refused."""

    def rewrite(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / store.WEIGHTS)
        change(weights)
        safetensors.torch.save_file(weights, folder / store.WEIGHTS)
        signed(folder)

    return rewrite


def signed(folder: Path) -> None:
    """Write the checksum of the weights as they are now."""
    config = json.loads((folder / store.CONFIG).read_text())
    config[store.SHA256] = store.sha256_of(folder / store.WEIGHTS)
    (folder / store.CONFIG).write_text(json.dumps(config))


def with_header(change: Callable[[dict[str, Any]], object]) -> Break:
    """Another header over the same numbers."""

    def rewrite(folder: Path) -> None:
        data = (folder / store.WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        (folder / store.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        signed(folder)

    return rewrite


def with_config(**fields: Any) -> Break:
    """Other values in the config."""

    def rewrite(folder: Path) -> None:
        config = json.loads((folder / store.CONFIG).read_text())
        (folder / store.CONFIG).write_text(json.dumps(config | fields))

    return rewrite


def without(field: str) -> Break:
    """A config that lacks a field."""

    def rewrite(folder: Path) -> None:
        config = json.loads((folder / store.CONFIG).read_text())
        del config[field]
        (folder / store.CONFIG).write_text(json.dumps(config))

    return rewrite


def with_bytes(name: str, data: bytes) -> Break:
    """Something else in place of a file."""
    return lambda folder: (folder / name).write_bytes(data)


def linked(name: str, target: str) -> Break:
    """A symbolic link in place of a file."""

    def relink(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return relink


def pipe(name: str) -> Break:
    """A pipe in place of a file: who opens it waits for ever."""

    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def broken_weights(marker: str) -> Iterator[tuple[str, Break]]:
    """Every way to break ``tuner.safetensors``."""
    file = store.WEIGHTS
    for share in (0, 0.001, 0.03, 0.3, 0.9, 0.999):
        yield f"weights cut at {share}", cut(file, share)
    for i in range(8):
        yield f"weights, header bit {i}", flip(file, i * 0.003, i % 8)
    for i in range(10):
        yield f"weights, data bit {i}", flip(file, 0.4 + i * 0.06, i % 8)
    for dtype in (torch.int8, torch.int32, torch.int64, torch.float64, torch.bool):
        yield f"weights {dtype}", with_weights(lambda w, d=dtype: w.update({name: v.to(d) for name, v in w.items()}))
    for name in ("first_weight", "second_bias"):
        for value in (float("nan"), float("inf"), float("-inf")):
            yield f"{value} in {name}", with_weights(lambda w, n=name, v=value: w[n].view(-1)[0:1].fill_(v))
    for name in ("first_weight", "first_bias", "second_bias"):
        yield f"no {name}", with_weights(lambda w, n=name: w.pop(n))
    for name in ("more", "../../evil", "basis.nowhere", "/etc/evil"):
        yield f"tensor {name}", with_weights(lambda w, n=name: w.update({n: torch.ones(2, 2)}))
    for shape in ([2**40], [2**62, 2**62], [-1], [3.5], [2**20, 2**20, 2**20]):
        yield f"header of shape {shape}", with_header(lambda h, s=shape: h["first_bias"].update(shape=s))
    yield "offsets behind the end", with_header(lambda h: h["first_bias"].update(data_offsets=[0, 2**40]))
    yield "many tensors", with_weights(lambda w: w.update({f"basis.{i}": torch.ones(1) for i in range(50_000)}))
    yield "weights are a pickle", with_bytes(file, pickle.dumps(Payload(marker)))
    yield "header of 2^60 bytes", with_bytes(file, struct.pack("<Q", 2**60) + b"{}")
    for target in ("/dev/zero", "/", "nowhere", file):
        yield f"weights link to {target}", linked(file, target)
    yield "weights are a pipe", pipe(file)


def broken_config() -> Iterator[tuple[str, Break]]:
    """Every way to break ``config.json``."""
    file = store.CONFIG
    args = {"blocks": 6, "hidden": 8, "seed": 3}
    wrong = {
        "format_version": (5, 99, 0, "2", None),
        "architecture": (5, "os.path", "../../evil", "store", "no_such_network"),
        "architecture_args": (
            *([], None, args | {"hidden": 10**9}, args | {"hidden": 10**30}, args | {"blocks": 10**9}),
            *(args | {"inputs": 10**8}, args | {"outputs": 10**9}, args | {"hidden": "8"}, args | {"code": "x"}),
        ),
        "features": (7, "mine"),
        "normaliser": (
            "energy",
            {"name": "mine"},
            {"name": "energy", "batch_size": float("nan")},
            {"name": "none", "x": 1},
        ),
        "base_model": (5, None),
        "recipe": ("by hand", None),
        "results": ([1],),
        "blocks": (
            *({}, [1] * 6, [{"name": "a", "shape": [1]}] * 6, [{"name": 3, "shape": [1]}] * 6),
            *([{"name": str(i), "shape": [2**70]} for i in range(6)], [{"name": str(i), "shape": 5} for i in range(6)]),
        ),
        "basis": (3, {"embed.weight": 2}, {"embed.weight": "2"}),
    }
    for field, values in wrong.items():
        for i, value in enumerate(values):
            yield f"{field} of a wrong value, {i}", with_config(**{field: value})
    for field in ("architecture", "base_model", "blocks", "features"):
        yield f"no {field}", without(field)
    yield "nested without end", with_bytes(file, b"[" * 200_000)
    yield "nine megabytes", with_bytes(file, b'{"format": "l2l-tuner", "x": "' + b"x" * (9 << 20) + b'"}')
    yield "no text", with_bytes(file, b"\xff\xfe{}")
    for target in ("/dev/zero", file):
        yield f"config links to {target}", linked(file, target)
    yield "config is a pipe", pipe(file)
    for share in (0.5, 0.99):
        yield f"config cut at {share}", cut(file, share)
