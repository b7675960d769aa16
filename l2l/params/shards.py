"""Shards: parameters of which each process holds a part, as DTensors of ``fully_shard`` and ``parallelize_module`` are.

Noise is keyed by the index within the whole block, so each process moves its own part, with no word to the others. What is
not by element is a sum over a block: each process sums whole chunks of its part, all exchange the chunks' sums (320 bytes per
128 KiB of float32 weights), and add them in the order of the block. So each has the bits that one process with the whole block
would have. Where the parts do not begin at multiples of a chunk, or are columns, the block is gathered for its sums, one block
at a time.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from l2l.noise import CHUNK, MomentRequest, NoiseTerm, Sums, TensorSlice, chunk_sums, shard_pieces, total
from l2l.noise.reference import LANES


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor: other processes hold parts of it, or copies."""
    distributed = sys.modules.get("torch.distributed.tensor")  # who has not imported it has no DTensor
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it, or a shard. It shares memory, and stays out of autograd."""
    detached: Any = tensor.detach()
    return detached.to_local() if is_shard(tensor) else detached


def _extent(tensor: Any, coordinate: Sequence[int]) -> tuple[list[int], list[int]]:
    """(first index, size) along each dimension of the shard of the process at a coordinate of the mesh."""
    from torch.distributed.tensor import Shard

    first, size = [0] * tensor.ndim, list(tensor.shape)
    for placement, parts, at in zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True):
        if type(placement) is Shard:
            step = -(-size[placement.dim] // parts)
            begin = min(at * step, size[placement.dim])
            first[placement.dim] += begin
            size[placement.dim] = min(step, size[placement.dim] - begin)
    return first, size


def _split_dimensions(tensor: Any) -> list[int]:
    return sorted({placement.dim for placement in tensor.placements if placement.is_shard()})


def check_placements(name: str, tensor: Any) -> None:
    """Raise ValueError where the part of a block that a process holds is not known by its rows and columns."""
    from torch.distributed.tensor import Replicate, Shard

    wrong = [p for p in tensor.placements if type(p) not in (Shard, Replicate)]
    split = _split_dimensions(tensor)
    if wrong or len(split) > 2 or (len(split) == 2 and split[0] != 0):
        raise ValueError(
            f"block {name!r} is placed as {tuple(tensor.placements)}: which of its elements a process holds is known for "
            "Replicate, and for Shard along rows or one other dimension; use fully_shard alone, or, where it goes with "
            "tensor parallelism, set its shard_placement_fn to shard another dimension than that does"
        )


def shard_slices(name: str, tensor: torch.Tensor) -> list[TensorSlice]:
    """The memory that this process holds of a block: one slice for rows or the whole, one for each row where it is columns."""
    local = local_part(tensor)
    if not is_shard(tensor):
        return [TensorSlice(local.view(-1), name)]
    if not local.numel():
        return []
    whole: Any = tensor
    first, size = _extent(whole, whole.device_mesh.get_coordinate())
    split = [dim for dim in _split_dimensions(whole) if dim > 0]
    inner = split[0] if split else min(1, tensor.ndim)  # rows are made of this dimension and those after it
    columns = math.prod(tensor.shape[inner:])
    row, column = first[0] * math.prod(tensor.shape[1:inner]) if inner else 0, 0
    if split:
        column = first[inner] * math.prod(tensor.shape[inner + 1 :])
    return shard_pieces(local.view(-1, math.prod(size[inner:])), name, columns, row, column)


def _chunked(tensor: Any) -> int | None:
    """The dimension of the mesh along which rows are split at multiples of a chunk, if they are, and nothing else is."""
    split = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    if len(split) != 1 or tensor.placements[split[0]].dim != 0:
        return None
    return None if _elements(tensor, split[0], 0) % CHUNK else split[0]


def _elements(tensor: Any, dim: int, part: int) -> int:
    """Elements of a part of the rows, which are split along a dimension of the mesh."""
    rows = -(-tensor.shape[0] // tensor.device_mesh.shape[dim])
    return max(0, min(rows, tensor.shape[0] - part * rows)) * math.prod(tensor.shape[1:])


def sums_of_blocks(blocks: Sequence[tuple[str, torch.Tensor]], terms: Sequence[NoiseTerm], gather: MomentRequest) -> Sums:
    """Sums over whole blocks, some of them sharded, with the bits of one process that holds them all. Nothing is written.

    All processes must call it with the same blocks in the same order.

    Args:
        blocks: (name, tensor) of each.
        terms, gather: as :func:`l2l.noise.add_noise` takes them, for one piece per block.
    """
    lanes = [np.zeros((0, 5, LANES))] * len(blocks)
    dims = [_chunked(tensor) if is_shard(tensor) else None for _, tensor in blocks]

    def add(found: Sequence[tuple[int, TensorSlice]]) -> None:
        indices, pieces = [i for i, _ in found], [piece for _, piece in found]
        own = [replace(term, scales=[term.scales[i] for i in indices]) for term in terms]
        wanted = MomentRequest([gather.restoring[i] for i in indices], [gather.centre[i] for i in indices])
        for i, sums in zip(indices, chunk_sums(pieces, own, wanted), strict=True):
            lanes[i] = sums

    here = [i for i, (_, tensor) in enumerate(blocks) if not is_shard(tensor) or dims[i] is not None]
    add([(i, piece) for i in here for piece in shard_slices(*blocks[i])])  # of each one piece, or none where it has no rows
    _exchange([tensor for _, tensor in blocks], dims, lanes)
    for i, (name, tensor) in enumerate(blocks):
        if i not in here:
            whole: Any = tensor.detach()
            add([(i, TensorSlice(whole.full_tensor().contiguous().view(-1), name))])
    return total(lanes)


def _exchange(tensors: Sequence[Any], dims: Sequence[int | None], lanes: list[np.ndarray]) -> None:
    """Complete the sums of chunks of the blocks that are split along a dimension of their mesh."""
    import torch.distributed as dist

    groups: dict[Any, list[int]] = {}
    for i, dim in enumerate(dims):
        if dim is not None:
            groups.setdefault(tensors[i].device_mesh.get_group(dim), []).append(i)
    for group, indices in groups.items():
        parts, device = range(group.size()), tensors[indices[0]].device
        counts = [[-(-_elements(tensors[i], dims[i] or 0, part) // CHUNK) for i in indices] for part in parts]
        own = torch.zeros(max(map(sum, counts)), 5, LANES, dtype=torch.float64)
        filled = np.concatenate([lanes[i] for i in indices])
        own[: len(filled)] = torch.from_numpy(filled)
        received = [torch.empty_like(own, device=device) for _ in parts]
        dist.all_gather(received, own.to(device), group)
        split = [one.cpu().split([*count, len(one) - sum(count)]) for one, count in zip(received, counts, strict=True)]
        for place, i in enumerate(indices):
            lanes[i] = np.concatenate([of_part[place].numpy() for of_part in split])


def check_agreement(values: Sequence[torch.Tensor]) -> None:
    """Raise RuntimeError unless all processes have the same values, here and on every other process alike.

    One number of 8 bytes is exchanged with each of the others.
    """
    import torch.distributed as dist

    own = torch.stack([value.detach().double().sum() for value in values]).sum().reshape(1)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    if any(not torch.equal(one, own) and not (one.isnan() and own.isnan()) for one in found):
        raise RuntimeError(
            f"the processes see different losses, {', '.join(f'{one.item():.6g}' for one in found)}, and each would move its "
            "shards by its own: let the closure return the same loss on all, e.g. torch.distributed.all_reduce(loss) divided "
            "by the number of processes"
        )


def reshard(model: torch.nn.Module | None) -> None:
    """Let go of the gathered weights that FSDP modules hold after a pass, so that the next pass reads the shards."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if model is None or not hasattr(fsdp, "FSDPModule"):
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            wrapped: Any = module
            wrapped.reshard()
