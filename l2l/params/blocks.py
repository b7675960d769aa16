"""Blocks: a model's trainable tensors, each once. Structure is read off the modules, never off names."""

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final, overload

import torch

from l2l.params.shards import check_placements, is_shard, local_part, reshard

TRAINABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes of weights that can be moved. Half precision is never perturbed where it is stored."""


@dataclass(frozen=True, eq=False)
class Block:
    """A named tensor with one sigma of its own."""

    name: str
    tensor: torch.Tensor
    embedding: bool = False
    """Rows are looked up: most of them take no part in a batch."""
    attention: bool = False
    """Owned by a module that splits its input into heads."""

    @property
    def numel(self) -> int:
        """Coordinates of the tensor."""
        return self.tensor.numel()

    @property
    def flat(self) -> torch.Tensor:
        """[numel] view that shares memory and stays out of autograd; of a shard, what this process holds."""
        return local_part(self.tensor).view(-1)

    @property
    def sharded(self) -> bool:
        """Whether other processes hold parts of it, or copies."""
        return is_shard(self.tensor)


@final
class Blocks(Sequence[Block]):
    """An ordered collection of blocks with distinct names and distinct memory.

    Args:
        model: the module that they belong to, if they belong to one. It is held weakly, and copies belong to none.
    """

    def __init__(self, blocks: Iterable[Block], model: torch.nn.Module | None = None) -> None:
        self._blocks = tuple(blocks)
        self._model = None if model is None else weakref.ref(model)
        names = [block.name for block in self._blocks]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise ValueError(f"block names must differ, but {repeated[0]!r} appears more than once")

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> "Blocks": ...
    def __getitem__(self, index: int | slice) -> "Block | Blocks":
        return Blocks(self._blocks[index]) if isinstance(index, slice) else self._blocks[index]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(block.name for block in self._blocks)

    @property
    def model(self) -> torch.nn.Module | None:
        """The module that the blocks belong to, while it lives."""
        return None if self._model is None else self._model()

    def __reduce__(self) -> tuple[Any, ...]:
        return Blocks, (self._blocks,)

    @property
    def sharded(self) -> Block | None:
        """The first block of which other processes hold parts; None: there is none."""
        return next((block for block in self._blocks if block.sharded), None)

    @property
    def numel(self) -> int:
        """Coordinates of all blocks together."""
        return sum(block.numel for block in self._blocks)

    @staticmethod
    def of(model: torch.nn.Module, trainable: bool = True) -> "Blocks":
        """Blocks of a module: its parameters in order, tied ones once, by their canonical names (:func:`named_parameters`).

        Args:
            trainable: only parameters with ``requires_grad``; False lists the frozen ones too (for fingerprints).

        Raises:
            TypeError: it is no module, but its parameters, say.
            ValueError: nothing is trainable, or a trainable tensor is not contiguous or of a dtype that has no gradient.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"the model is given as {type(model).__name__}: give the module itself, as in l2l.MeZO(model), not its "
                "parameters; their names fix their noise, and requires_grad chooses what is trained"
            )
        reshard(model)
        embeddings = _owned(model, lambda module: isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag))
        heads = "head_dim", "head_size"
        attention = _owned(model, lambda module: any(isinstance(getattr(module, name, None), int) for name in heads))
        found: list[Block] = []
        seen: set[tuple[int, int]] = set()
        for name, parameter in named_parameters(model):
            memory = (parameter.data_ptr(), parameter.numel())
            if (trainable and not parameter.requires_grad) or (parameter.numel() and memory in seen and memory[0]):
                continue
            seen.add(memory)
            found.append(Block(name, parameter, id(parameter) in embeddings, id(parameter) in attention))
        if trainable and not found:
            raise ValueError("the model has no trainable parameter: set requires_grad=True on those to be trained")
        for block in found if trainable else ():
            if block.tensor.dtype not in TRAINABLE:
                raise ValueError(f"block {block.name!r} is {block.tensor.dtype}, which cannot be trained: freeze it")
            if block.sharded:
                check_placements(block.name, block.tensor)
            if not local_part(block.tensor).is_contiguous():
                raise ValueError(f"block {block.name!r} is not contiguous: replace it by its .contiguous() copy")
        return Blocks(found, model)


INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Parts that torch.compile, FSDP, activation checkpointing and Lightning Fabric insert into the names of parameters."""


def named_parameters(model: torch.nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a module in its own order, by canonical names: those that they have without wrappers.

    Noise, states and tuners know a parameter by its name, so a model that is compiled or parallel must have the names of the
    model itself. Left out are the parts of :data:`INSERTED`, and ``module`` where it is all that a module holds, as in
    DataParallel, DistributedDataParallel and AveragedModel.
    """
    paths: dict[str, tuple[str, torch.nn.Module]] = {}  # of each module: its canonical path with a dot at its end
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        above, _, part = path.rpartition(".")
        prefix, owner = paths.get(above, ("", module))
        sole = part == "module" and len(owner._modules) == 1 and not any(p is not None for p in owner._parameters.values())
        paths[path] = prefix + ("" if not path or part in INSERTED or sole else f"{part}."), module
        for name, parameter in module._parameters.items():
            if parameter is not None and not (remove_duplicate and id(parameter) in seen):
                seen.add(id(parameter))
                yield paths[path][0] + name, parameter


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


@final
class Attachment:
    """How blocks hang on their model, taken when this is made; :meth:`change` tells what is different since.

    Compared are the modules between the model and each block, the parameters themselves and those tied to them, what
    requires gradients, dtypes, devices, shapes, and which tensors share memory. Values may change, and so may the memory that
    holds them. It keeps the modules alive; its copies know their blocks, and no model.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._tensors = {id(block.tensor): (block.name, block.tensor) for block in blocks}
        self._links: list[tuple[dict[str, Any], str, Any, str]] = []  # holder[name] is value, at path
        model = blocks.model
        if model is not None:
            shared = {_memory(block.tensor) for block in blocks if block.tensor.data_ptr()}
            for name, parameter in named_parameters(model, remove_duplicate=False):
                if _memory(parameter) in shared:  # a block, or tied to one
                    self._tensors.setdefault(id(parameter), (name, parameter))
            self._link(model, "", {})
        self._facts, self._places = self._seen()
        self._ties = self._shared()

    def _link(self, module: torch.nn.Module, prefix: str, known: dict[int, bool]) -> bool:
        """Note what of a module leads to a block; whether anything does."""
        if id(module) not in known:
            known[id(module)] = False
            for name, parameter in module._parameters.items():
                if id(parameter) in self._tensors:
                    self._links.append((module._parameters, name, parameter, prefix + name))
                    known[id(module)] = True
            for name, child in module._modules.items():
                if child is not None and self._link(child, f"{prefix}{name}.", known):
                    self._links.append((module._modules, name, child, prefix + name))
                    known[id(module)] = True
        return known[id(module)]

    def _seen(self) -> tuple[list[tuple[Any, ...]], list[int]]:
        tensors = [tensor for _, tensor in self._tensors.values()]
        return [(t.requires_grad, t.dtype, t.device, t.shape) for t in tensors], [t.data_ptr() for t in tensors]

    def _shared(self) -> list[int]:
        """For each tensor the first one that has its memory."""
        first: dict[tuple[int, int], int] = {}
        return [first.setdefault(_memory(t), i) if t.data_ptr() else i for i, (_, t) in enumerate(self._tensors.values())]

    def change(self) -> str | None:
        """What of the model is not as it was, of the first block where that is so; None: nothing.

        A few tenths of a microsecond per parameter and module.
        """
        for holder, name, value, path in self._links:
            if holder.get(name) is not value:
                return f"{path!r} has been {'replaced' if name in holder else 'removed'}"
        facts, places = self._seen()
        if facts != self._facts:
            found = zip(self._tensors.values(), self._facts, facts, strict=True)
            (name, _), before, now = next(one for one in found if one[1] != one[2])
            words = ("requires_grad", "dtype", "device", "shape")
            what, old, new = next(one for one in zip(words, before, now, strict=True) if one[1] != one[2])
            return f"{what} of {name!r} was {old} and is {new}"
        if places != self._places:
            ties = self._shared()
            if ties != self._ties:
                names = [name for name, _ in self._tensors.values()]
                i = next(i for i in range(len(ties)) if ties[i] != self._ties[i])
                other = names[min(ties[i], self._ties[i])]
                return f"{names[i]!r} and {other!r} {'no longer share' if ties[i] == i else 'now share'} one tensor"
            self._places = places
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return Attachment, (self._blocks,)


def tensors_hash(tensors: Iterable[torch.Tensor]) -> str:
    """Hash of the bits of tensors in their order, with dtypes and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        bits = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bits.data)
    return digest.hexdigest()


def _owned(model: torch.nn.Module, kind: Callable[[torch.nn.Module], bool]) -> set[int]:
    """Identities of the parameters below the modules of a kind. A module that holds the whole model is not meant."""
    whole = sum(1 for _ in model.parameters())
    owned: set[int] = set()
    for module in model.modules():
        if kind(module):
            inside = [id(parameter) for parameter in module.parameters()]
            if len(inside) < whole or isinstance(module, torch.nn.Embedding):
                owned.update(inside)
    return owned
