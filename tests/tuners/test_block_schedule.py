"""Turns: one group of blocks moves at a time, as the key says, and keeps the step's curvature."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import TiedLM

from l2l.methods.learned import Learned
from l2l.noise import Key
from l2l.params import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.diagnostics import schedule_line
from l2l.tuners.normalize import CurvatureNormalizer
from l2l.tuners.schedule import VECTORS, BlockSchedule, build_schedule, role_of, schedule_config

MODEL = TiedLM()
BLOCKS = Blocks.of(MODEL)
NAMES = BLOCKS.names
PAIR = BlockSchedule((NAMES[:1], NAMES[1:]), (1.0, 3.0))


def tuner(turns: BlockSchedule | None = PAIR) -> Tuner:
    traces = {name: 2.0 + number for number, name in enumerate(NAMES)}
    values = [1.0 + number for number in range(len(NAMES))]
    return Tuner.for_model(MODEL, "table", normalizer=CurvatureNormalizer(traces), block_schedule=turns, values=values)


def direction(found: Tuner, step: int, blocks: Blocks = BLOCKS):
    method = Learned(found)
    return method.direction(blocks, method.init(blocks), Key(0, step))


def test_the_same_key_gives_the_same_turn_and_the_groups_have_their_shares():
    drawn = Counter(PAIR.moving(Key(5, step), NAMES) for step in range(4000))
    assert all(PAIR.moving(Key(5, step), NAMES) == PAIR.moving(Key(5, step), NAMES) for step in range(50))
    assert set(drawn) == {frozenset(NAMES[:1]), frozenset(NAMES[1:])}
    assert drawn[frozenset(NAMES[1:])] / 4000 == pytest.approx(0.75, abs=0.03)


def test_draws_of_one_step_have_turns_of_their_own():
    turns = [PAIR.moving(Key(0, 0).with_draw(draw), NAMES) for draw in range(40)]
    assert len(set(turns)) == 2


def test_only_the_blocks_whose_turn_it_is_move():
    found = tuner()
    for step in range(20):
        moving = PAIR.moving(Key(0, step), NAMES)
        sigma = direction(found, step).sigma
        assert [name for name, value in zip(NAMES, sigma, strict=True) if value] == [n for n in NAMES if n in moving]


def test_every_turn_spends_the_curvature_of_mezo():
    found = tuner()
    traces = torch.tensor([2.0 + number for number in range(len(NAMES))], dtype=torch.float64)
    for step in range(20):
        seen = direction(found, step)
        spent = torch.sum(traces * (seen.factor * torch.tensor(seen.sigma, dtype=torch.float64)) ** 2)
        assert spent.item() == pytest.approx(traces.sum().item())


def test_one_group_of_all_blocks_is_the_tuner_without_turns():
    whole, none = tuner(BlockSchedule((NAMES,))), tuner(None)
    assert direction(whole, 3) == direction(none, 3)


def test_a_group_that_is_frozen_has_no_turn():
    some = BLOCKS[1:]
    assert all(PAIR.moving(Key(0, step), some.names) == frozenset(some.names) for step in range(30))
    assert all(sum(map(bool, direction(tuner(), step, some).sigma)) == len(some) for step in range(10))


def test_roles_are_names_without_numbers_and_vectors_are_one():
    assert role_of("layers.3.q.weight", 2) == role_of("layers.11.q.weight", 2) == "layers.#.q.weight"
    assert role_of("layers.3.q.weight", 2) != role_of("layers.3.k.weight", 2)
    assert role_of("norm.weight", 1) == role_of("layers.0.q.bias", 1) == VECTORS
    by_role = BlockSchedule.by_role(BLOCKS)
    assert sorted(name for group in by_role.groups for name in group) == sorted(NAMES)
    vectors = tuple(block.name for block in BLOCKS if block.tensor.ndim == 1)
    assert vectors in by_role.groups and by_role.shares == (1.0,) * len(by_role.groups)


def test_dealing_keeps_sizes_and_shares_and_moves_blocks():
    turns = BlockSchedule(tuple((f"a{i}", f"b{i}") for i in range(8)), tuple(range(1, 9)))
    one, same, other = turns.shuffled(1), turns.shuffled(1), turns.shuffled(2)
    assert one == same != other and one.shares == turns.shares and one.groups != turns.groups
    assert sorted(name for group in one.groups for name in group) == sorted(n for g in turns.groups for n in g)


@pytest.mark.parametrize(
    ("groups", "shares", "said"),
    [
        ((), (), "or none"),
        ((("a",), ()), (), "one that is empty"),
        ((("a", "b"), ("b",)), (), "'b' in more than one"),
        ((("a",), ("b",)), (1.0,), "must be 2 positive numbers"),
        ((("a",), ("b",)), (1.0, 0.0), "must be 2 positive numbers"),
        ((("a",), ("b",)), (1.0, float("nan")), "must be 2 positive numbers"),
    ],
)
def test_groups_that_cannot_take_turns_are_refused(groups, shares, said):
    with pytest.raises(ValueError, match=said):
        BlockSchedule(groups, shares)


def test_turns_and_blocks_must_agree():
    with pytest.raises(ValueError, match="do not agree on"):
        tuner(BlockSchedule((NAMES[1:],)))
    with pytest.raises(ValueError, match="in no group"):
        BlockSchedule((("a",),)).moving(Key(0), NAMES)
    with pytest.raises(ValueError, match="a size-free tuner belongs to no blocks"):
        Tuner.for_model(MODEL, "shared_mlp", block_schedule=PAIR)


def test_turns_are_kept_on_disk_and_a_tuner_without_them_is_written_as_before(tmp_path: Path):
    with_turns, without = tuner(), tuner(None)
    with_turns.save_pretrained(tmp_path / "with")
    without.save_pretrained(tmp_path / "without")
    kept = json.loads((tmp_path / "with" / "config.json").read_text())
    plain = json.loads((tmp_path / "without" / "config.json").read_text())
    assert kept["format_version"] == 3 and kept["turns"] == schedule_config(PAIR)
    assert plain["format_version"] == 2 and "turns" not in plain
    loaded = Tuner.from_pretrained(tmp_path / "with")
    assert loaded.block_schedule == PAIR and Tuner.from_pretrained(tmp_path / "without").block_schedule is None
    assert all(direction(loaded, step) == direction(with_turns, step) for step in range(5))
    assert "2 groups" in (tmp_path / "with" / "README.md").read_text()


@pytest.mark.parametrize("broken", [{"groups": [["a"]]}, {"groups": 3, "shares": [1]}, {"groups": [[1]], "shares": [1]}])
def test_turns_that_are_broken_on_disk_give_one_error(tmp_path: Path, broken):
    tuner().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"turns": broken}))
    with pytest.raises(ValueError, match=r"get (it|the tuner) again"):
        Tuner.from_pretrained(tmp_path)
    assert build_schedule({}) is None


def test_with_turns_changes_nothing_but_the_turns():
    found = tuner()
    dealt = found.with_block_schedule(PAIR.shuffled(0))
    assert dealt.network is found.network and dealt.block_schedule == PAIR.shuffled(0) and found.block_schedule == PAIR
    assert schedule_line(found).startswith("2 groups of 1, ") and schedule_line(tuner(None)).startswith("none")
