"""Which blocks belong together: by where they lie in the tree of modules, never by what a module is called."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from l2l.blocks import Blocks
from l2l.perturb.direction import Direction

Group: TypeAlias = frozenset[int]
"""Indices of blocks."""


def layers(blocks: Blocks) -> tuple[list[list[int]], list[int]]:
    """(indices of the blocks of each layer, in their order; indices of those outside all layers).

    A layer is a member of the outermost numbered container (``model.layers.3``) that holds blocks in more than one member.
    Where there is no such container, each module that owns blocks is a layer, and none lies outside.
    """
    members = _members(blocks)
    names = [_layer(name, members) for name in blocks.names]
    if not any(names):
        names = [name.rpartition(".")[0] or "." for name in blocks.names]
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name:
            found.setdefault(name, []).append(index)
    return list(found.values()), [index for index, name in enumerate(names) if not name]


def _members(blocks: Blocks) -> dict[str, set[str]]:
    """The numbered members that hold blocks, of each container."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for name in blocks.names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isdigit():
                found[".".join(parts[:at])].add(part)
    return found


def _layer(name: str, members: dict[str, set[str]]) -> str:
    """Path of the layer that a block of that name belongs to; empty where it belongs to none."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit() and len(members[".".join(parts[:at])]) > 1:
            return ".".join(parts[: at + 1])
    return ""


def group_blocks(units: Sequence[Sequence[int]], count: int) -> list[Group]:
    """At most ``count`` groups of neighbouring units, as many units in each; no group is empty."""
    count = min(count, len(units))
    at = [k * count // len(units) for k in range(len(units))]
    return [frozenset(i for unit, a in zip(units, at, strict=True) if a == g for i in unit) for g in range(count)]


def matched(blocks: Blocks, patterns: Sequence[str]) -> list[Group]:
    """A group for each regular expression over names: the blocks for which it is the first that matches.

    Raises:
        ValueError: none matches some block, or one is left without a block.
    """
    found = [next((k for k, p in enumerate(patterns) if re.search(p, name)), None) for name in blocks.names]
    if None in found:
        name = blocks.names[found.index(None)]
        raise ValueError(f"patterns: none matches block {name!r}; a last pattern '' takes whatever is left")
    empty = next((p for k, p in enumerate(patterns) if k not in found), None)
    if empty is not None:
        raise ValueError(f"patterns: {empty!r} is left without a block; names look like {blocks.names[0]!r}")
    return [frozenset(i for i, k in enumerate(found) if k == group) for group in range(len(patterns))]


def layer_groups_of(direction: Direction, group: Group) -> Direction:
    """The direction in the blocks of a group; the others stay where they are."""
    return replace(
        direction,
        sigma=tuple(scale if i in group else 0.0 for i, scale in enumerate(direction.sigma)),
        basis_sigma=tuple(scale if i in group else 0.0 for i, scale in enumerate(direction.basis_sigma)),
    )
