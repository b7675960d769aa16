"""What is told of a run whose model is loaded and whose batches are known."""

from __future__ import annotations

import pytest

import l2l.costs as loaded
from l2l.costs import Expectation, Load, expect, loads_of, mean_load
from l2l.methods.mezo import MeZO
from l2l.models.batching import Grouping
from l2l.models.shapes import tiny_random
from l2l.params import Blocks
from l2l.report.memory import current_bytes
from l2l.tasks.encode import Batch, Encoded, EncodedOption, collate


def batch_of(*lengths: int, groups: int = 1) -> Batch:
    """A batch of rows that feed so many tokens each; one token is read per row."""
    rows = [Encoded((EncodedOption((number, *range(length)), 1),), (0,)) for number, length in enumerate(lengths, 3)]
    batch = collate(rows, "lm", 0)
    return Batch(**{**vars(batch), "parts": Grouping(groups).split(batch)})


def test_a_batch_is_one_call_or_as_many_as_it_has_parts():
    assert loads_of(batch_of(4, 4, 10)) == [Load(3, 10, 3)]
    assert loads_of(batch_of(4, 4, 10, groups=2)) == [Load(2, 4, 0), Load(1, 10, 3)]  # the last reads for both


def test_the_mean_batch_keeps_tokens_rows_and_calls():
    split, whole = [Load(2, 4, 2), Load(1, 10, 1)], [Load(3, 10, 3)]
    assert mean_load([whole, whole]) == Load(3, 10, 3)
    assert mean_load([split]) == Load(3, 6, 3, calls=2)
    assert mean_load([split, whole]) == Load(3, 8, 3, calls=2)


def test_the_largest_batch_decides_the_memory_and_measuring_is_optional():
    model = tiny_random("opt")
    blocks = Blocks.of(model)

    def peak(*batches: Batch) -> int:
        before = current_bytes()
        found = expect(model, blocks, "in_place", False, MeZO(), batches[:1], batches[1:], measure=False)
        assert found.seconds_per_step is None
        assert found.missing == 0
        return found.peak_bytes - before

    small, large = batch_of(4), batch_of(*[200] * 8)
    assert peak(small, large) - peak(small, small) > 10**6
    assert expect(model, blocks, "in_place", False, MeZO(), [small], [small], True).seconds_per_step


def test_what_is_missing_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loaded, "available_bytes", lambda device: 10)
    model = tiny_random("opt")
    batch = batch_of(8, 8)
    found = expect(model, Blocks.of(model), "in_place", False, MeZO(), [batch], [batch], False)
    assert found.missing > 0
    assert "more than there is: lower batch_size or max_length" in found.line(10)


def test_the_line_tells_memory_and_time():
    line = Expectation(2**31, 0.5, 0).line(7200)
    assert line == "expected: 2.00 GiB at most, 0.5 s per step, 1 h for 7200 steps"
    assert Expectation(2**30, None, 0).line(5) == "expected: 1.00 GiB at most"
