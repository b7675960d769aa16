"""Rows that branch: the common beginning of several inputs is fed once, followed by the rest of each.

A tree is laid out depth first, so the columns that continue a token lie in one run right after it. A token attends to those in
whose run it lies: the beginning of its own input, nothing of another branch. Its position is the number of tokens before it in
its input. A causal model in which tokens interact by attention alone, with the positions given, computes for every token of
a tree what it computes in a row of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Inputs as one row of C columns."""

    ids: Ids
    """[C] token ids, depth first."""
    ends: tuple[int, ...]
    """[C] the column after the last one that continues this token; those from it on do not attend to it."""
    columns: Mapping[Ids, Sequence[int]]
    """For each input, the columns of its tokens."""


def chain(ids: Ids) -> Tree:
    """A row of one input."""
    return Tree(ids, (len(ids),) * len(ids), {ids: range(len(ids))})


def grow(inputs: Sequence[Ids]) -> Tree:
    """The smallest tree that holds all inputs: common beginnings occur once."""
    ids: list[int] = []
    ends: list[int] = []
    columns: dict[Ids, Sequence[int]] = {}
    last: Ids = ()
    path: list[int] = []
    # In sorted order an input shares with the one before it whatever it shares with any before it.
    for one in [*sorted(set(inputs)), ()]:
        common = common_prefix(last, one)
        for column in path[common:]:
            ends[column] = len(ids)
        path = path[:common] + list(range(len(ids), len(ids) + len(one) - common))
        ids += one[common:]
        ends += [0] * (len(one) - common)
        columns[one] = path
        last = one
    if () not in inputs:
        del columns[()]
    return Tree(tuple(ids), tuple(ends), columns)


def common_prefix(left: Ids, right: Ids) -> int:
    """Number of leading ids that are equal. Bisection, because slices compare faster than a loop."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def tree_attention_mask(trees: Sequence[Tree]) -> torch.Tensor:
    """[R, T, T] bool: whether a row's token (second index) attends to another (third). Padding takes no part."""
    columns = max(len(tree.ids) for tree in trees)
    ends = torch.tensor([tree.ends + (0,) * (columns - len(tree.ends)) for tree in trees])
    column = torch.arange(columns)
    return (column <= column[:, None]) & (column[:, None] < ends[:, None])


def row_lengths(attention_mask: torch.Tensor) -> torch.Tensor:
    """[R] tokens of each row, by a mask [R, T] or [R, T, T]: a token attends to itself, padding does not."""
    tokens = attention_mask if attention_mask.ndim == 2 else attention_mask.diagonal(dim1=1, dim2=2)
    return tokens.sum(1)


def tree_inputs(visible: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Additive ``attention_mask`` [R, 1, T, T] and ``position_ids`` [R, T] of a transformers model, from a bool mask [R, T, T].

    Padding attends to itself, because a softmax over nothing is not a number.
    """
    hidden = ~(visible | torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device))
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(hidden, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": (visible.sum(2) - 1).clamp_(min=0)}


def computing_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point weights, mostly the embedding's, so of its hidden states."""
    return next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
