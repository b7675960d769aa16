"""Whether a model gives the same numbers for a tree as for rows of their own: found out by asking it.

Much can go wrong where a mask [R, 1, T, T] and positions are passed: they are refused, or ignored (ALiBi, recurrent
layers), or a window is counted in columns or dropped. So a model is shown a few random rows both ways, and trees are
never made longer than the longest that it got right.

Rows of like length fed together: a batch then costs about its tokens, and hardly any padding.

Which examples make up a batch is not touched. Its rows are split into a few groups, each runs through the model with
its own padding, and what is read is put back in order: the loss is the same number up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from l2l.models.heads import Part, TokenQuery, output_embedding, token_logprobs, uncompiled, virtual_tokens
from l2l.models.kinds import kind_of
from l2l.models.prompt_trees import Ids, computing_dtype, grow, row_lengths, tree_attention_mask

_POSITIONS = 1024
_BRANCH = 8
_BRANCHES = 8
_SHORT = 5
_PARTIAL = ("window", "window_size", "chunk_size")


def longest_tree(model: nn.Module) -> int:
    """Most tokens of a tree that a causal language model is known to read right; 0 where it is not to be given any.

    Two probes of random ids compare log-probabilities of a tree's tokens with those of plain rows, in the model's own
    dtype: one short, in which most of what a branch must not see is near, and one as long as the model's positions
    allow (at most 1024) and eight branches more, which also crosses windows that the config does not state. They must
    agree within sqrt(eps) of their own spread, eps being the dtype's: half of the digits. A model whose config states
    a window, or layers other than full attention, is not asked, and one on the meta device cannot be.
    The answer depends on the model alone.
    """
    config, vocabulary = _text_config(model), _vocabulary(model)
    positions = getattr(config, "max_position_embeddings", None)
    on_meta = next(model.parameters()).device.type == "meta"
    if on_meta or not vocabulary or not isinstance(positions, int) or _sees_parts(config):
        return 0
    prompt = min(positions - virtual_tokens(model), _POSITIONS) - _BRANCH
    if prompt < _SHORT or not _probe_short(model, vocabulary):
        return 0
    return prompt + _BRANCHES * _BRANCH if _probe_long(model, vocabulary, prompt) else 0


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    return find() if callable(find) else config


def _vocabulary(model: nn.Module) -> int:
    """Rows of the input embedding, 0 where the model names none."""
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 0


def _sees_parts(config: Any) -> bool:
    """Whether the config states layers that are not full attention: their numbers may depend on columns."""
    layers = getattr(config, "layer_types", None) or ()
    stated = (value for name, value in vars(config).items() if name.endswith(_PARTIAL))
    return any(kind != "full_attention" for kind in layers) or any(stated)


def _probe_short(model: nn.Module, vocabulary: int) -> bool:
    """Two trees of unlike length; in the first, branches branch again."""
    draw = _drawing(vocabulary)
    first, second, fork = draw(_SHORT), draw(_SHORT - 2), draw(_BRANCH // 2)
    branches = [fork + draw(_BRANCH // 2), fork + draw(_BRANCH // 4), *(draw(_BRANCH) for _ in range(_BRANCHES))]
    groups = [[first + branch for branch in branches], [second + draw(_BRANCH) for _ in range(2)]]
    return _agrees(model, groups, [(row, one) for row, group in enumerate(groups) for one in group], draw)


def _probe_long(model: nn.Module, vocabulary: int, prompt: int) -> bool:
    """One tree; the branch that stands farthest from the prompt is compared."""
    draw = _drawing(vocabulary)
    start = draw(prompt)
    group = [start + draw(_BRANCH) for _ in range(_BRANCHES)]
    return _agrees(model, [group], [(0, max(group))], draw)


def _drawing(vocabulary: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda count: tuple(torch.randint(0, vocabulary, (count,), generator=generator).tolist())


def _agrees(model: nn.Module, groups: list[list[Ids]], read: list[tuple[int, Ids]], draw: Any) -> bool:
    """Whether the inputs to read give the same numbers in the trees of their groups as in rows of their own."""
    trees = [grow(group) for group in groups]
    ends = [(k, row, ids, slot) for k, (row, ids) in enumerate(read) for slot in range(len(ids) - _SHORT, len(ids))]
    targets = torch.tensor(draw(len(ends)))
    places = [(row, trees[row].columns[ids][slot]) for _, row, ids, slot in ends]
    shared = _query([tree.ids for tree in trees], tree_attention_mask(trees), places, targets)
    rows = [ids for _, ids in read]
    plain = _query(rows, _tokens(rows), [(k, slot) for k, _, _, slot in ends], targets)
    device = next(model.parameters()).device
    with uncompiled(model), _at_rest(model):
        try:
            expected, found = (token_logprobs(model, query.to(device)) for query in (plain, shared))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
            return False  # whatever a forward says to arguments it does not know
    tolerance = torch.finfo(computing_dtype(model)).eps ** 0.5 * expected.std()
    return bool((found - expected).abs().max() <= tolerance)  # NaN is no agreement


def _tokens(rows: Sequence[Ids]) -> Tensor:
    """[R, T] 1 on tokens."""
    return torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in rows], True)


def _query(ids: Sequence[Ids], attention_mask: Tensor, places: Sequence[tuple[int, int]], targets: Tensor) -> Part:
    rows, positions = torch.tensor(places).T.contiguous()
    return Part(
        input_ids=torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], True),
        attention_mask=attention_mask,
        rows=rows,
        positions=positions,
        targets=targets,
        tokens=torch.arange(len(targets)),
    )


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Without gradients and without dropout; each module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


_WEIGHTS_READ = 20
_CALL = 1_000_000
_CALL_WEIGHTS = 5_000


@final
@dataclass(frozen=True)
class Grouping:
    """How rows may be split; the same for every batch of a run, so that a resumed run splits alike."""

    groups: int = 1
    """Most forward passes that one look at a batch is split into; 1 never splits."""
    extra: int = 0
    """What one more forward pass costs, in tokens fed."""
    tree: int = 0
    """Most tokens of a row in which options share their prompt; 0 gives every option a row of its own."""

    @staticmethod
    def of(model: nn.Module, groups: int | None = None, share_prompts: bool | None = None) -> Grouping:
        """The grouping for a model.

        Args:
            model: a language model. Options share rows, or batches are split, only where its kind allows it.
            groups: as asked; ``None`` splits on the CPU and leaves a GPU its one large batch.
            share_prompts: whether options of several tokens share their prompt's row; ``None``: where a probe finds
                the model's numbers the same (see :func:`l2l.models.batching.longest_tree`).

        Raises:
            ValueError: ``share_prompts=True``, and the model's numbers would differ.
        """
        device = next(model.parameters()).device.type
        asked = (6 if device == "cpu" else 1) if groups is None else groups
        tree = 0 if share_prompts is False or kind_of(model) != "causal" else longest_tree(model)
        if share_prompts and not tree:
            raise ValueError(
                f"share_prompts=True, but {type(model).__name__} does not read a row that branches as it reads plain "
                "rows; leave share_prompts out"
            )
        return Grouping(asked, forward_cost(model), tree)

    def cost(self, lengths: Sequence[int]) -> int:
        """Tokens that rows of these lengths cost, split as `split` does it: padding and further passes included."""
        return min(_cheapest_cuts(np.sort(np.asarray(lengths)), min(self.groups, len(lengths)), self.extra)[0])

    def split(self, batch: TokenQuery) -> tuple[Part, ...]:
        """The parts to feed one by one, from short to long; none where the whole batch is best fed as it is."""
        if self.groups == 1 or batch.pooled or batch.decoder_ids is not None:
            return ()
        lengths = row_lengths(batch.attention_mask).tolist()
        found = partition(lengths, self.groups, self.extra)
        return tuple(_part(batch, rows, lengths[rows[-1]]) for rows in found) if len(found) > 1 else ()


def forward_cost(model: nn.Module) -> int:
    """About how many tokens take as long as starting one more forward pass.

    Reading the weights once costs what some twenty tokens cost, whatever the size; calling the modules costs more
    tokens the smaller they are. The constants are fitted to forward passes of four models from 0.2 to 85 million
    weights outside the embeddings, on one CPU thread. The figure depends on the model's shape alone, never on a
    clock: a run that is resumed elsewhere must split its batches alike.
    """
    calls = sum(1 for module in model.modules() if not any(True for _ in module.children()))
    embeddings = set(_embedding_parameters(model))
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter not in embeddings)
    return _WEIGHTS_READ + _CALL * calls // (weights + _CALL_WEIGHTS * calls)


def _embedding_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those that a token does not multiply with: lookups, and the head, which sees only a few positions."""
    head = output_embedding(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is head:
            yield from module.parameters()


def partition(lengths: Sequence[int], groups: int, extra: int = 0) -> list[list[int]]:
    """Split rows of these lengths into at most ``groups`` groups, as cheaply as can be.

    A group of n rows costs n times its longest row, and each group after the first ``extra`` more. Some cheapest
    partition cuts the rows, sorted by length, into runs, so a dynamic programme over the cuts finds it, in
    O(rows^2 * groups). Of equally cheap ones the one with fewest groups is taken.

    Returns:
        Row numbers of each group, from short to long, within a group too.

    Raises:
        ValueError: no rows, or fewer than one group.
    """
    if not lengths or groups < 1:
        raise ValueError(f"cannot split {len(lengths)} rows into {groups} groups; both must be at least 1")
    order = np.argsort(np.asarray(lengths), kind="stable")
    costs, cuts = _cheapest_cuts(np.asarray(lengths)[order], min(groups, len(lengths)), extra)
    end, bounds = len(lengths), [len(lengths)]
    for group in range(int(np.argmin(costs)), -1, -1):
        end = int(cuts[group][end])
        bounds.append(end)
    return [order[start:stop].tolist() for start, stop in pairwise(reversed(bounds))]


def _cheapest_cuts(lengths: np.ndarray, groups: int, extra: int) -> tuple[list[int], list[np.ndarray]]:
    """For 1, 2, … groups: the cost of all rows, and [R + 1] where the last group begins if the first r rows are split."""
    count = len(lengths)
    start, stop = np.arange(count + 1)[:, None], np.arange(count + 1)[None]
    impossible = 2**40
    alone = np.where(start < stop, (stop - start) * np.append(0, lengths)[None], impossible)
    best, cuts = alone[0], [np.zeros(count + 1, dtype=np.int64)]
    costs = [int(best[-1])]
    for _ in range(groups - 1):
        total = best[:, None] + alone + extra
        best = np.minimum(total.min(0), impossible)
        cuts.append(total.argmin(0))
        costs.append(int(best[-1]))
    return costs, cuts


def _part(batch: TokenQuery, rows: list[int], columns: int) -> Part:
    place = torch.full((len(batch.input_ids),), -1)
    place[rows] = torch.arange(len(rows))
    tokens: Tensor = (place[batch.rows] >= 0).nonzero()[:, 0]
    mask = batch.attention_mask[rows, :columns]
    return Part(
        input_ids=batch.input_ids[rows, :columns],
        attention_mask=mask if mask.ndim == 2 else mask[:, :, :columns],
        rows=place[batch.rows[tokens]],
        positions=batch.positions[tokens],
        targets=batch.targets[tokens],
        tokens=tokens,
    )
