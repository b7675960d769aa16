"""Whether a model gives the same numbers for a tree as for rows of their own: found out by asking it.

Much can go wrong where a mask [R, 1, T, T] and positions are passed: they are refused, or ignored (ALiBi, recurrent
layers), or a window is counted in columns or dropped. So a model is shown a few random rows both ways, and trees are
never made longer than the longest that it got right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from l2l.models.heads import Part, token_logprobs, uncompiled
from l2l.models.trees import Ids, computing_dtype, grow, tree_attention_mask
from l2l.models.virtual import virtual_tokens

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
