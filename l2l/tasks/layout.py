"""Which rows hold the inputs of a batch, and where in them each input's tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l2l.models.batching import Grouping
from l2l.models.prompt_trees import Ids, Tree, chain, grow


@dataclass(frozen=True)
class Layout:
    """R rows for N inputs."""

    rows: tuple[Tree, ...]
    """[R] what to feed."""
    row_of: tuple[int, ...]
    """[N] the row that holds an input."""
    columns: tuple[Sequence[int], ...]
    """[N] the columns of its tokens."""
    branching: bool
    """Whether some row is more than one input: else the rows are plain."""
    decoders: tuple[Ids, ...] = ()
    """[R] what a decoder is fed beside each row; none for models of one stack."""


def lay_out(groups: Sequence[Sequence[Ids]], grouping: Grouping | None = None) -> Layout:
    """Place the inputs of each example, in as few tokens as ``grouping`` allows.

    Inputs that equal another or are its beginning never cost anything. Where trees are allowed, an example's inputs
    share what they begin with if that pays for the example, and if it does for the whole batch, padding included: one
    long tree among short plain rows may not. A batch in which none does is laid out as without trees, and so is one
    with a plain row longer than a tree may be: next to a tree it would be read with the tree's mask.
    """
    plain = _place(groups, [None] * len(groups))
    if grouping is None or not grouping.tree:
        return plain
    shared = _place(groups, [_worthy_tree(inputs, grouping.tree) for inputs in groups])
    lengths = [len(row.ids) for row in shared.rows]
    if not shared.branching or max(lengths) > grouping.tree:
        return plain
    pair = grouping.cost([len(row.ids) for row in plain.rows]), grouping.cost(lengths)
    return shared if pays(*pair) else plain


def lay_out_whole(inputs: Sequence[tuple[Ids, Ids]]) -> Layout:
    """Place inputs of models that see a row as a whole, each with its decoder's row: only equal ones share a row.

    Columns are those of the decoder, where it is fed anything.
    """
    index = {pair: row for row, pair in enumerate(dict.fromkeys(inputs))}
    return Layout(
        rows=tuple(chain(ids) for ids, _ in index),
        row_of=tuple(index[pair] for pair in inputs),
        columns=tuple(range(len(decoder or ids)) for ids, decoder in inputs),
        branching=False,
        decoders=tuple(decoder for _, decoder in index),
    )


def pays(plain: int, shared: int) -> bool:
    """Whether feeding ``shared`` tokens instead of ``plain`` is worth a mask of its own: a fifth less at least."""
    return 5 * shared <= 4 * plain


def _worthy_tree(inputs: Sequence[Ids], longest: int) -> Tree | None:
    """The tree of an example's inputs, where it pays and is not too long."""
    _, kept = merge_rows(inputs)
    if len(kept) == 1:
        return None
    tree = grow(inputs)
    return tree if len(tree.ids) <= longest and pays(sum(map(len, kept)), len(tree.ids)) else None


def _place(groups: Sequence[Sequence[Ids]], trees: Sequence[Tree | None]) -> Layout:
    """Examples with a tree in its row; what is left merged into plain rows, across examples too."""
    left = [ids for inputs, tree in zip(groups, trees, strict=True) if tree is None for ids in inputs]
    served, kept = merge_rows(left)
    plain = iter(served)
    rows = [chain(ids) for ids in kept]
    row_of: list[int] = []
    columns: list[Sequence[int]] = []
    for inputs, tree in zip(groups, trees, strict=True):
        if tree is not None:
            rows.append(tree)
        row_of += [next(plain) if tree is None else len(rows) - 1 for _ in inputs]
        columns += [range(len(ids)) if tree is None else tree.columns[ids] for ids in inputs]
    return Layout(tuple(rows), tuple(row_of), tuple(columns), any(tree is not None for tree in trees))


def merge_rows(inputs: Sequence[Ids]) -> tuple[list[int], list[Ids]]:
    """Drop inputs that equal another or are its beginning; say for each input which kept row serves it.

    A causal model's output at a position depends on nothing to its right, so the longer row answers for both.
    """
    keeper: dict[Ids, Ids] = {}
    longest: Ids = ()
    # In sorted order whatever an input is a beginning of follows it directly.
    for ids in sorted(set(inputs), reverse=True):
        longest = longest if longest[: len(ids)] == ids else ids
        keeper[ids] = longest
    kept = list(dict.fromkeys(keeper[ids] for ids in inputs))
    index = {ids: row for row, ids in enumerate(kept)}
    return [index[keeper[ids]] for ids in inputs], kept
