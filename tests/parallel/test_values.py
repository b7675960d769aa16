"""Losses as bytes: every kind of value comes back with its bits."""

from __future__ import annotations

import pytest
import torch

from l2l.parallel.values import pack, share, unpack

NAN = float("nan")
VALUES = [
    1.5,
    torch.tensor(0.1),
    torch.tensor(0.1, dtype=torch.bfloat16),
    torch.tensor([NAN, -float("inf"), 1e-45]),
    torch.tensor([0.1, 0.2], dtype=torch.float64),
    (torch.tensor([[0.5, -float("inf")], [1.0, 2.0]]), torch.tensor([0, 1])),
    torch.tensor(-0.0),
]


def bits(value: object) -> list[tuple[torch.dtype, tuple[int, ...], bytes]]:
    tensors = (
        value
        if isinstance(value, tuple)
        else (torch.as_tensor(value, dtype=torch.float64) if isinstance(value, float) else value,)
    )
    return [(t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for t in tensors]  # type: ignore[union-attr]


def test_values_of_every_kind_come_back_bit_for_bit():
    found = unpack(pack(VALUES))
    assert [bits(value) for value in found] == [bits(value) for value in VALUES]


def test_a_float32_loss_takes_five_bytes():
    assert len(pack([torch.tensor(0.1)])) == 5


@pytest.mark.parametrize("content", [pack(VALUES)[:-1], b"\xff" + pack(VALUES), b"\x01\x00"])
def test_a_message_that_is_cut_or_of_another_program_is_refused(content: bytes):
    with pytest.raises(ValueError, match="the same version of l2l"):
        unpack(content)


def test_whole_numbers_are_no_losses_of_any_dtype():
    with pytest.raises(TypeError, match="float32, or wider"):
        pack([torch.tensor(1, dtype=torch.int32)])


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_cover_everything_once_and_differ_by_at_most_one(count: int, size: int):
    parts = [share(count, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
