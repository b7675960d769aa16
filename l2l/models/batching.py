"""How the rows of a batch are fed: whether options share a row with their prompt, and splitting by length.

A mask [R, 1, T, T] with positions may be refused by a model, or ignored (ALiBi, recurrent layers), or a window may be counted
in columns. So a model is probed with a few random rows in both layouts, and trees are never longer than the longest that it
read right. Rows of like length are fed together, so that a batch costs about its tokens and little padding: its rows are split
into a few groups, each runs through the model with its own padding, and the results are put back in order. Which examples make
up a batch does not change, and the loss is the same number up to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, final

import numpy as np
import torch

from l2l.models.heads import Part, TokenQuery, output_embedding, token_logprobs, uncompiled, virtual_tokens
from l2l.models.kinds import kind_of
from l2l.models.last_layer import modules_at_places
from l2l.models.prefix import layer_list
from l2l.models.prompt_trees import Ids, computing_dtype, grow, row_lengths, tree_attention_mask

_POSITIONS = 1024
_BRANCH = 8
_BRANCHES = 8
_SHORT = 5
_PARTIAL = ("window", "window_size", "chunk_size")
RandomIds: TypeAlias = Callable[[int], Ids]
"""So many random ids."""


def longest_tree(model: torch.nn.Module) -> int:
    """Most tokens of a tree that a causal language model is known to read right; 0 where it must not be given any.

    Two probes of random ids compare log-probabilities of a tree's tokens with those of plain rows, in the model's own dtype:
    one short, in which most tokens hidden from a branch are near, and one as long as the model's positions allow (at most 1024)
    and eight branches more, which also crosses windows that the config does not state. They must agree within sqrt(eps) of
    their own spread, eps being the dtype's: half of the digits. A model whose config states a window, or layers other than full
    attention, is not probed, and one that is partly on the meta device cannot be. The result depends on the model alone.
    """
    config, embedding = getattr(model, "config", None), _call(model, "get_input_embeddings")
    config = _call(config, "get_text_config") or config
    positions = getattr(config, "max_position_embeddings", None)
    vocabulary = embedding.num_embeddings if isinstance(embedding, torch.nn.Embedding) else 0
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if on_meta or not vocabulary or not isinstance(positions, int):
        return 0
    # The numbers of layers that are not full attention may depend on columns.
    stated = (value for name, value in vars(config).items() if name.endswith(_PARTIAL))
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()) or any(stated):
        return 0
    prompt = min(positions - virtual_tokens(model), _POSITIONS) - _BRANCH
    if prompt < _SHORT:
        return 0
    # Two short trees of unlike length; in the first, branches branch again.
    draw = _random_ids(vocabulary)
    first, second, fork = draw(_SHORT), draw(_SHORT - 2), draw(_BRANCH // 2)
    branches = [fork + draw(_BRANCH // 2), fork + draw(_BRANCH // 4), *(draw(_BRANCH) for _ in range(_BRANCHES))]
    groups = [[first + branch for branch in branches], [second + draw(_BRANCH) for _ in range(2)]]
    if not _agrees(model, groups, [(row, one) for row, group in enumerate(groups) for one in group], draw):
        return 0
    # A long one, of which the branch that lies farthest from the prompt is compared.
    draw = _random_ids(vocabulary)
    start = draw(prompt)
    group = [start + draw(_BRANCH) for _ in range(_BRANCHES)]
    return prompt + _BRANCHES * _BRANCH if _agrees(model, [group], [(0, max(group))], draw) else 0


def _call(owner: object, name: str) -> Any:
    method = getattr(owner, name, None)
    return method() if callable(method) else None


def _random_ids(vocabulary: int) -> RandomIds:
    generator = torch.Generator().manual_seed(0)
    return lambda count: tuple(torch.randint(0, vocabulary, (count,), generator=generator).tolist())


def _agrees(model: torch.nn.Module, groups: list[list[Ids]], read: list[tuple[int, Ids]], draw: RandomIds) -> bool:
    """Whether the inputs to read give the same numbers in the trees of their groups as in rows of their own."""
    trees = [grow(group) for group in groups]
    ends = [(k, row, ids, slot) for k, (row, ids) in enumerate(read) for slot in range(len(ids) - _SHORT, len(ids))]
    targets = torch.tensor(draw(len(ends)))
    places = [(row, trees[row].columns[ids][slot]) for _, row, ids, slot in ends]
    shared = _query([tree.ids for tree in trees], tree_attention_mask(trees), places, targets)
    rows = [ids for _, ids in read]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in rows], True)
    plain = _query(rows, tokens, [(k, slot) for k, _, _, slot in ends], targets)
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()  # without dropout
    try:
        with uncompiled(model), torch.no_grad():
            expected, found = (token_logprobs(model, query.to(device)) for query in (plain, shared))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return False  # any of these a forward may raise at arguments it does not know
    finally:
        for module in training:
            module.training = True
    tolerance = torch.finfo(computing_dtype(model)).eps ** 0.5 * expected.std()
    return bool((found - expected).abs().max() <= tolerance)  # False for NaN


def _query(ids: Sequence[Ids], attention_mask: torch.Tensor, places: Sequence[tuple[int, int]], targets: torch.Tensor) -> Part:
    rows, positions = torch.tensor(places).T.contiguous()
    tokens = torch.arange(len(targets))
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], True)
    return Part(padded, attention_mask, rows, positions, tokens, targets, tokens)


_WEIGHTS_READ = 20
_CALL = 1_000_000
_CALL_WEIGHTS = 5_000


@final
@dataclass(frozen=True)
class Grouping:
    """How rows may be split; the same for every batch of a run, so that a resumed run splits alike."""

    groups: int = 1
    """Most forward passes that a batch is split into; 1 never splits."""
    extra: int = 0
    """Cost of one more forward pass, in tokens fed."""
    tree: int = 0
    """Most tokens of a row in which options share their prompt; 0 gives every option a row of its own."""
    at_places: tuple[str, ...] = ()
    """Names of modules of the last layer that are computed at the places that are read alone."""

    @staticmethod
    def of(model: torch.nn.Module, groups: int | None = None, share_prompts: bool | None = None) -> "Grouping":
        """The grouping for a language model. Options share rows, or batches are split, only where its kind allows it.

        Args:
            groups: most forward passes per batch; ``None``: 6 on the CPU, 1 on other devices.
            share_prompts: whether options of several tokens share their prompt's row; ``None``: where :func:`longest_tree`
                finds that the model gives the same numbers. ValueError where True, and they would differ.
        """
        device = next(model.parameters()).device.type
        asked = (6 if device == "cpu" else 1) if groups is None else groups
        causal, layers = kind_of(model) == "causal", layer_list(model)
        tree = longest_tree(model) if causal and share_prompts is not False else 0
        if share_prompts and not tree:
            raise ValueError(
                f"share_prompts=True, but {type(model).__name__} does not read a row that branches as it reads plain "
                "rows; leave share_prompts out"
            )
        at_places = modules_at_places(model, layers[-1]) if causal and layers else ()
        return Grouping(asked, forward_cost(model), tree, at_places)

    def cost(self, lengths: Sequence[int]) -> int:
        """Tokens that rows of these lengths cost as :meth:`split` splits them, padding and further passes included."""
        return min(_cheapest_cuts(np.sort(np.asarray(lengths)), min(self.groups, len(lengths)), self.extra)[0])

    def split(self, batch: TokenQuery) -> tuple[Part, ...]:
        """The parts to feed one by one, from short to long; none where feeding the whole batch is cheapest."""
        if self.groups == 1 or batch.pooled or batch.decoder_ids is not None:
            return ()
        lengths = row_lengths(batch.attention_mask).tolist()
        found = partition(lengths, self.groups, self.extra)
        if len(found) == 1:
            return ()
        parts = []
        for rows in found:
            number = torch.full((len(batch.input_ids),), -1)
            number[rows] = torch.arange(len(rows))
            read = number[batch.rows] >= 0  # of the batch's places
            tokens: torch.Tensor = read[batch.places].nonzero()[:, 0]
            places, targets = (read.cumsum(0) - 1)[batch.places[tokens]], batch.targets[tokens]
            columns = lengths[rows[-1]]
            mask = batch.attention_mask[rows, :columns]
            mask = mask if mask.ndim == 2 else mask[:, :, :columns]
            inside, positions = number[batch.rows[read]], batch.positions[read]
            own = inside, positions, places, targets, tokens
            parts.append(Part(batch.input_ids[rows, :columns], mask, *own, at_places=batch.at_places))
        return tuple(parts)


def forward_cost(model: torch.nn.Module) -> int:
    """About how many tokens take as long as starting one more forward pass.

    Reading the weights once costs what some twenty tokens cost, whatever the size; calling the modules costs more tokens the
    smaller they are. The constants are fitted to forward passes of four models from 0.2 to 85 million weights outside the
    embeddings, on one CPU thread. The figure depends on the model's shape alone, never on a clock: a run that is resumed
    elsewhere must split its batches alike.
    """
    modules, head = list(model.modules()), output_embedding(model)
    calls = sum(1 for module in modules if not any(True for _ in module.children()))
    # Tokens do not multiply with embeddings, and few positions with the head.
    embeddings = {
        p for module in modules if isinstance(module, torch.nn.Embedding) or module is head for p in module.parameters()
    }
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter not in embeddings)
    return _WEIGHTS_READ + _CALL * calls // (weights + _CALL_WEIGHTS * calls)


def partition(lengths: Sequence[int], groups: int, extra: int = 0) -> list[list[int]]:
    """Split rows of these lengths into at most ``groups`` groups at the least cost.

    A group of n rows costs n times its longest row, and each group after the first ``extra`` more. Some cheapest partition
    cuts the rows, sorted by length, into runs, so a dynamic programme over the cuts finds it, in O(rows^2 * groups). Of equally
    cheap ones the one with fewest groups is taken. Gives the row numbers of each group, from short to long, within a group
    too. ValueError where there are no rows, or fewer than one group.
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
