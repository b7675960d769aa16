"""Turns: the blocks move in groups, one group per direction, as the direction's key decides.

With the step size tuned, a step along directions of block energies lambda gains (sum lambda G)^2 over
(sum lambda G' * sum lambda T): no mixture of groups gains more than the best of them alone, and which is best differs from
task to task. Taking turns, a run gains the mean of what the groups gain, whatever that task is; mixing them, it gains what
the mixture does. So that a turn of any group is a step of the same length, turns go with a normaliser whose factor is
taken over the blocks that move: under that of curvature u^T H u has the same expectation for every group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import numpy as np

from l2l.noise import Key
from l2l.params.blocks import Blocks
from l2l.tuners.fingerprint import format_names

VECTORS = "vectors"
"""The role of all blocks of one dimension: norms and biases, of which few are large enough for a turn of their own."""
WORD = "turn"
"""Sets the draw of the turn apart from the noise of every block."""


@final
@dataclass(frozen=True)
class BlockSchedule:
    """Groups of blocks, by name, and how often each has its turn.

    Raises:
        ValueError: a group is empty, a block is in two, or the shares are not one positive number per group.
    """

    groups: tuple[tuple[str, ...], ...]
    shares: tuple[float, ...] = ()
    """In any unit; empty: all alike."""

    def __post_init__(self) -> None:
        names = [name for group in self.groups for name in group]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if not all(self.groups) or not self.groups or repeated:
            what = f"block {format_names(repeated)} in more than one" if repeated else "one that is empty, or none"
            raise ValueError(f"turns: the groups hold {what}; every group needs blocks of its own")
        if not self.shares:
            object.__setattr__(self, "shares", (1.0,) * len(self.groups))
        if len(self.shares) != len(self.groups) or not all(0 < share < float("inf") for share in self.shares):
            raise ValueError(f"turns: shares {self.shares} must be {len(self.groups)} positive numbers, one per group")

    @staticmethod
    def by_role(blocks: Blocks, shares: Mapping[str, float] | None = None) -> BlockSchedule:
        """A group per :func:`role_of`; shares by role, 1 where nothing is said.

        Raises:
            ValueError: a share for a role that no block has.
        """
        groups: dict[str, list[str]] = {}
        for block in blocks:
            groups.setdefault(role_of(block.name, block.tensor.ndim), []).append(block.name)
        unknown = sorted(set(shares or {}) - set(groups))
        if unknown:
            raise ValueError(f"turns: no block has the role {unknown[0]!r}; there are {', '.join(sorted(groups))}")
        weights = tuple(float((shares or {}).get(role, 1.0)) for role in groups)
        return BlockSchedule(tuple(map(tuple, groups.values())), weights)

    def dealt(self, seed: int) -> BlockSchedule:
        """As many groups of the same sizes and shares, the blocks dealt at random: the control for what the groups are."""
        names = [name for group in self.groups for name in group]
        dealt = iter(np.random.default_rng(seed).permutation(len(names)).tolist())
        return BlockSchedule(tuple(tuple(names[next(dealt)] for _ in group) for group in self.groups), self.shares)

    def moving(self, key: Key, names: Sequence[str]) -> frozenset[str]:
        """The blocks of ``names`` that move along the direction of ``key``. Groups of which none is there have no turn.

        Raises:
            ValueError: none of the names is in any group.
        """
        present = frozenset(names)
        there = [(present.intersection(group), share) for group, share in zip(self.groups, self.shares, strict=True)]
        there = [(group, share) for group, share in there if group]
        if not there:
            raise ValueError(f"turns: block {format_names(list(names))} is in no group of the tuner")
        point = key.words(WORD)[0] / 2**32 * sum(share for _, share in there)
        ends = accumulate(share for _, share in there)
        return next((group for (group, _), end in zip(there, ends, strict=True) if point < end), there[-1][0])


def role_of(name: str, dimensions: int) -> str:
    """What the same matrices of all layers have in common: the name but for numbers. Vectors share one role."""
    return re.sub(r"\d+", "#", name) if dimensions > 1 else VECTORS


def schedule_config(turns: BlockSchedule | None) -> dict[str, Any]:
    """JSON values; empty for none."""
    return {} if turns is None else {"groups": [list(group) for group in turns.groups], "shares": list(turns.shares)}


def build_schedule(config: Mapping[str, Any]) -> BlockSchedule | None:
    """What :func:`turns_config` described.

    Raises:
        ValueError: it does not describe turns.
    """
    if not config:
        return None
    groups, shares = config["groups"], config["shares"]
    if not all(isinstance(name, str) for group in groups for name in group):
        raise ValueError("turns: a group holds something that is not a block's name: get the tuner again")
    return BlockSchedule(tuple(map(tuple, groups)), tuple(map(float, shares)))
