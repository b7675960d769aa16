"""Block schedule: blocks move in groups, one group per direction, drawn by the direction's key.

With the step size tuned, a step along directions of block energies lambda gains (sum lambda G)^2 over
(sum lambda G' * sum lambda T): no mixture of groups gains more than the best of them alone, and which is best differs from
task to task. Moving one group at a time, a run gains the mean of what the groups gain, whatever that task is; mixing them,
it gains what the mixture does. For steps of equal length the schedule goes with a normalizer whose factor is taken over the
blocks that move: under that of curvature u^T H u has the same expectation for every group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import numpy as np

from l2l.noise import Key
from l2l.params import Blocks
from l2l.tuners.features import role
from l2l.tuners.fingerprint import format_names

VECTORS = "vectors"
"""The role of all blocks of one dimension: norms and biases, of which few are large enough for a group of their own."""
WORD = "turn"
"""Separates the draw of the group from the noise of every block. Part of every recorded run: it stays as it is."""


@final
@dataclass(frozen=True)
class BlockSchedule:
    """Groups of blocks, by name, and how often each moves.

    Raises:
        ValueError: a group is empty, a block is in two, or the shares are not one positive number per group.
    """

    groups: tuple[tuple[str, ...], ...]
    shares: tuple[float, ...] = ()
    """Relative frequencies, in any unit; empty: all equal."""

    def __post_init__(self) -> None:
        names = [name for group in self.groups for name in group]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if not all(self.groups) or not self.groups or repeated:
            what = f"block {format_names(repeated)} in more than one" if repeated else "one that is empty, or none"
            raise ValueError(f"block schedule: the groups hold {what}; every group needs blocks of its own")
        if not self.shares:
            object.__setattr__(self, "shares", (1.0,) * len(self.groups))
        if len(self.shares) != len(self.groups) or not all(0 < share < float("inf") for share in self.shares):
            raise ValueError(f"block schedule: shares {self.shares} must be {len(self.groups)} positive numbers, one per group")

    @staticmethod
    def by_role(blocks: Blocks) -> "BlockSchedule":
        """A group per :func:`role_of`, all of the same share."""
        groups: dict[str, list[str]] = {}
        for block in blocks:
            groups.setdefault(role_of(block.name, block.tensor.ndim), []).append(block.name)
        return BlockSchedule(tuple(map(tuple, groups.values())))

    def shuffled(self, seed: int) -> "BlockSchedule":
        """Groups of the same sizes and shares with randomly permuted blocks: the control for what the groups hold."""
        names = [name for group in self.groups for name in group]
        order = iter(np.random.default_rng(seed).permutation(len(names)).tolist())
        return BlockSchedule(tuple(tuple(names[next(order)] for _ in group) for group in self.groups), self.shares)

    def moving(self, key: Key, names: Sequence[str]) -> frozenset[str]:
        """The blocks among ``names``, else ValueError, that move along the direction of ``key``. Other groups are not drawn."""
        trained = frozenset(names)
        present = [(trained.intersection(group), share) for group, share in zip(self.groups, self.shares, strict=True)]
        present = [(group, share) for group, share in present if group]
        if not present:
            raise ValueError(f"block schedule: block {format_names(list(names))} is in no group of the tuner")
        point = key.words(WORD)[0] / 2**32 * sum(share for _, share in present)
        ends = accumulate(share for _, share in present)
        return next((group for (group, _), end in zip(present, ends, strict=True) if point < end), present[-1][0])


def role_of(name: str, dimensions: int) -> str:
    """:func:`l2l.tuners.features.role` of a matrix; :data:`VECTORS` for every vector."""
    return role(name) if dimensions > 1 else VECTORS


def schedule_config(schedule: BlockSchedule | None) -> dict[str, Any]:
    """JSON values; empty for None."""
    return {"groups": [list(group) for group in schedule.groups], "shares": list(schedule.shares)} if schedule else {}


def build_schedule(config: Mapping[str, Any]) -> BlockSchedule | None:
    """The schedule of the values of :func:`schedule_config`; ValueError where they describe none."""
    if not config:
        return None
    groups, shares = config["groups"], config["shares"]
    if not all(isinstance(name, str) for group in groups for name in group):
        raise ValueError("block schedule: a group holds something that is not a block's name: get the tuner again")
    return BlockSchedule(tuple(map(tuple, groups)), tuple(map(float, shares)))
