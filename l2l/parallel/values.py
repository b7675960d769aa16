"""What closures return, as bytes and back, bit for bit; and who evaluates which of several things."""

import struct
from collections.abc import Sequence

import numpy as np
import torch

from l2l.estimators import ClosureValue

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
"""In one digit of a header. Targets are int64."""
_SCALAR, _VECTOR, _LOGITS = range(3)
_KINDS = 8
"""More than there are kinds: a header's byte is dtype * _KINDS + kind."""


def share(count: int, rank: int, size: int) -> range:
    """Which of ``count`` things are rank ``rank``'s: contiguous parts in the order of ranks, the later ones the larger."""
    return range(count * rank // size, count * (rank + 1) // size)


def pack(values: Sequence[ClosureValue]) -> bytes:
    """The values one after the other: 5 bytes for a float32 scalar, 9 for a Python float."""
    return b"".join(map(_packed, values))


def _packed(value: ClosureValue) -> bytes:
    if isinstance(value, tuple):
        logits, targets = value
        head = struct.pack("<BII", _code(logits, _LOGITS), *logits.shape)
        return head + _bits(logits) + _bits(targets.to(torch.int64))
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value), dtype=torch.float64)
    if tensor.ndim:
        return struct.pack("<BI", _code(tensor, _VECTOR), len(tensor)) + _bits(tensor)
    return struct.pack("<B", _code(tensor, _SCALAR)) + _bits(tensor)


def _code(tensor: torch.Tensor, kind: int) -> int:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"the closure returned values of {tensor.dtype}: return float32, or wider")
    return _DTYPES.index(tensor.dtype) * _KINDS + kind


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def unpack(content: bytes, device: torch.device | str = "cpu") -> list[ClosureValue]:
    """The values of :func:`pack`, as tensors on ``device``.

    Raises:
        ValueError: these are not such bytes.
    """
    found: list[ClosureValue] = []
    at = 0

    def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nonlocal at
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if at + size > len(content):
            raise ValueError("a message of losses is cut short: all ranks must run the same version of l2l")
        bits = torch.frombuffer(bytearray(content[at : at + size]), dtype=torch.uint8) if size else torch.empty(0).byte()
        at += size
        return bits.view(dtype).reshape(shape).to(device)

    while at < len(content):
        code, kind = divmod(content[at], _KINDS)
        dims = _LENGTHS.get(kind)
        if dims is None or code >= len(_DTYPES) or at + 1 + 4 * dims > len(content):
            raise ValueError("a message of losses is damaged: all ranks must run the same version of l2l")
        shape = struct.unpack_from(f"<{dims}I", content, at + 1)
        at += 1 + 4 * dims
        first = take(shape, _DTYPES[code])
        found.append((first, take(shape[:1], torch.int64)) if kind == _LOGITS else first)
    return found


_LENGTHS = {_SCALAR: 0, _VECTOR: 1, _LOGITS: 2}
"""Kind of a value -> how many lengths its header has."""
