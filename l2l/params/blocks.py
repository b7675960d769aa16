"""Blocks: a model's trainable tensors, each once. Structure is read off the modules, never off names."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import final, overload

import torch

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
        """[numel] view that shares memory and stays out of autograd."""
        return self.tensor.detach().view(-1)


@final
class Blocks(Sequence[Block]):
    """An ordered collection of blocks with distinct names and distinct memory."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = tuple(blocks)
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
    def numel(self) -> int:
        """Coordinates of all blocks together."""
        return sum(block.numel for block in self._blocks)

    @staticmethod
    def of(model: torch.nn.Module, trainable: bool = True) -> "Blocks":
        """Blocks of a module: its parameters in order, tied ones once.

        Args:
            trainable: only parameters with ``requires_grad``; False lists the frozen ones too (for fingerprints).

        Raises:
            ValueError: nothing is trainable, or a trainable tensor is not contiguous or of a dtype that has no gradient.
        """
        embeddings = _owned(model, lambda module: isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag))
        heads = "head_dim", "head_size"
        attention = _owned(model, lambda module: any(isinstance(getattr(module, name, None), int) for name in heads))
        found: list[Block] = []
        seen: set[tuple[int, int]] = set()
        for name, parameter in model.named_parameters():
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
            if not block.tensor.is_contiguous():
                raise ValueError(f"block {block.name!r} is not contiguous: replace it by its .contiguous() copy")
        return Blocks(found)


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
