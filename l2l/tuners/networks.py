"""Networks of a tuner: features of the blocks in, one sigma per block out, or two where the tuner has a basis.

A network in another package is named by its module path, ``package.module`` or ``package.module:Class``.
"""

import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, final

import torch

from l2l.plugins import load_module
from l2l.tuners.features import FEATURES

Start = Literal["random", "mezo"]
VARIABLE = "L2L_NETWORKS"
"""Environment variable: modules, separated by commas, whose networks a tuner on disk may name."""


class TunerNetwork(torch.nn.Module, ABC):
    """Abstract network over block features.

    Its constructor takes JSON values, which a tuner's config keeps: ``blocks``, their number; ``seed``, of its
    initialisation; ``inputs``, features per block; ``outputs``, 1 or 2; and arguments of its own.
    """

    shared: frozenset[str] = frozenset()
    """Parameters that serve all blocks. Each of the others has one row per block, in order."""

    @abstractmethod
    def forward(self, features: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Sigma [blocks], not negative, from features [blocks, features].

        With two outputs [blocks, 2]: sigma of the dense noise, and of the noise inside the block's basis.

        Args:
            rows: the network's blocks that the features belong to; None: all, in order.
        """


@final
class PerBlockMLP(TunerNetwork):
    """An independent MLP per block, 5 -> 64 -> tanh -> 1, in one batched computation: ZO Fine-tuner, arXiv:2510.00419.

    sigma is the absolute value of the output. 449 parameters per block at 64 hidden units.

    Args:
        start: ``random``, as in the paper: torch's initialisation of both layers, sigma scattered over the blocks.
            ``mezo``: a second layer of weight 0 and bias 1, so that sigma is 1 until something is learned.
        basis_start: with ``mezo`` and two outputs, the bias of the second.
    """

    def __init__(
        self,
        blocks: int,
        hidden: int = 64,
        seed: int = 0,
        start: Start = "random",
        inputs: int = FEATURES,
        outputs: int = 1,
        basis_start: float = 0.3,
    ) -> None:
        super().__init__()
        first = _first_sigma(start, outputs, basis_start)
        generator = torch.Generator().manual_seed(seed)
        ends = (blocks,) if outputs == 1 else (blocks, outputs)
        self.first_weight = _uniform(generator, inputs, blocks, hidden, inputs)
        self.first_bias = _uniform(generator, inputs, blocks, hidden)
        self.second_weight = _uniform(generator, hidden, *ends, hidden)
        self.second_bias = _uniform(generator, hidden, *ends)
        if start == "mezo":
            torch.nn.init.zeros_(self.second_weight)
            with torch.no_grad():
                self.second_bias.copy_(first.expand(blocks, outputs).reshape(ends))

    def forward(self, features: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        w1, b1, w2, b2 = self.first_weight, self.first_bias, self.second_weight, self.second_bias
        if rows is not None and list(rows) != list(range(len(b2))):
            w1, b1, w2, b2 = (values[torch.tensor(rows)] for values in (w1, b1, w2, b2))
        hidden = torch.tanh((w1 * features[:, None, :]).sum(-1) + b1)
        return ((w2 * (hidden[:, None, :] if w2.ndim == 3 else hidden)).sum(-1) + b2).abs()


@final
class SharedMLP(TunerNetwork):
    """One MLP for all blocks; sigma = exp(output). Without embeddings it serves models of any size and family.

    Args:
        hidden: hidden units.
        embedding: width of a learned embedding per block, an input beside the features; 0: nothing belongs to a block.
        start: ``mezo``: a second layer of weight 0, so that sigma is exactly 1 until something is learned. ``random``:
            torch's initialisation of both layers, sigma scattered about 1.
        basis_start: with two outputs, initial sigma along the basis.
    """

    def __init__(
        self,
        blocks: int,
        seed: int = 0,
        inputs: int = FEATURES,
        outputs: int = 1,
        hidden: int = 32,
        embedding: int = 0,
        start: Start = "mezo",
        basis_start: float = 0.3,
    ) -> None:
        super().__init__()
        first = _first_sigma(start, outputs, basis_start)
        generator = torch.Generator().manual_seed(seed)
        width = inputs + embedding
        self.first_weight = _uniform(generator, width, hidden, width)
        self.first_bias = _uniform(generator, width, hidden)
        self.second_weight = _uniform(generator, hidden, outputs, hidden)
        self.second_bias = _uniform(generator, hidden, outputs)
        self.shared = frozenset(name for name, _ in self.named_parameters())
        self.embedding = torch.nn.Parameter(torch.randn(blocks, embedding, generator=generator)) if embedding else None
        with torch.no_grad():
            if start == "mezo":
                self.second_weight.zero_()
                self.second_bias.zero_()
            self.second_bias += first.log()

    def forward(self, features: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        if self.embedding is not None:
            own = self.embedding if rows is None else self.embedding[torch.tensor(rows)]
            features = torch.cat([features, own], 1)
        hidden = torch.tanh(features @ self.first_weight.t() + self.first_bias)
        return torch.exp(hidden @ self.second_weight.t() + self.second_bias).squeeze(-1)


@final
class Table(TunerNetwork):
    """One learned number per block, whatever the features: sigma = exp(number).

    Args:
        inputs: ignored.
        start: ``mezo``: sigma is exactly 1. ``random``: drawn from a log-normal of mean 1.
        cv: coefficient of variation of that log-normal. The published tuners' sigma varies by 0.75 over the blocks.
        values: initial sigma of each block, in order, in place of ``start``; e.g. measured ones.
        basis_start: with two outputs, initial sigma along the basis.
        basis_values: the same of each block, in its place.

    Raises:
        ValueError: values are not one positive number per block, or there are basis_values for one output.
    """

    def __init__(
        self,
        blocks: int,
        seed: int = 0,
        inputs: int = FEATURES,
        outputs: int = 1,
        start: Start = "mezo",
        cv: float = 0.75,
        values: Sequence[float] | None = None,
        basis_start: float = 0.3,
        basis_values: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        sigma = _first_sigma(start, outputs, basis_start).repeat(blocks, 1)
        if start == "random":
            variance = torch.log(torch.tensor(1.0 + cv**2))
            normal = torch.randn(blocks, outputs, generator=torch.Generator().manual_seed(seed))
            sigma *= torch.exp(normal * variance.sqrt() - variance / 2)
        if basis_values is not None and outputs == 1:
            raise ValueError("basis_values are given for one output: sigma along a basis is the second (outputs=2)")
        for column, given in ((column, given) for column, given in enumerate((values, basis_values)) if given is not None):
            if len(given) != blocks:
                raise ValueError(f"the table has {len(given)} values for {blocks} blocks: give one per block, in order")
            for bad in (value for value in given if not 0 < value < float("inf")):
                raise ValueError(f"the table's values hold {bad}: each must be positive and finite")
            sigma[:, column] = torch.tensor(given, dtype=torch.float64)
        self.log_sigma = torch.nn.Parameter(sigma.log().squeeze(-1))

    def forward(self, features: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        return torch.exp(self.log_sigma if rows is None else self.log_sigma[torch.tensor(rows)])


NETWORKS: dict[str, type[TunerNetwork]] = {"per_block_mlp": PerBlockMLP, "shared_mlp": SharedMLP, "table": Table}


def _uniform(generator: torch.Generator, fan_in: int, *shape: int) -> torch.nn.Parameter:
    # torch's initialisation of linear layers: uniform within 1 / sqrt(fan-in)
    return torch.nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) / fan_in**0.5)


def _first_sigma(start: str, outputs: int, basis_start: float) -> torch.Tensor:
    """[outputs] initial sigma of every block: 1, and ``basis_start`` along its basis; checks the arguments."""
    if outputs not in (1, 2):
        raise ValueError(f"outputs={outputs} must be 1 (sigma) or 2 (sigma and that of the basis)")
    if not 0 < basis_start < float("inf"):
        raise ValueError(f"basis_start={basis_start} must be positive and finite")
    if start not in ("random", "mezo"):
        raise ValueError(f"start={start!r} must be 'random' or 'mezo'")
    return torch.tensor([1.0, basis_start][:outputs])


def current_network(architecture: str, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments under the names of today: ``fixed`` of earlier releases is a table drawn at random."""
    return ("table", {"start": "random", **args}) if architecture == "fixed" else (architecture, args)


def network_class(architecture: str, trusted: bool = True) -> type[TunerNetwork]:
    """The class of a network of :data:`NETWORKS`, or of a module elsewhere (``package.module[:Class]``); else ValueError.

    Args:
        trusted: whether the name comes from the user. The name in a tuner's config does not: to import a module is to run
            it, so there it must be imported already, or be listed in the environment variable ``L2L_NETWORKS``.
    """
    if architecture in NETWORKS:
        return NETWORKS[architecture]
    path, _, chosen = architecture.partition(":")
    if not all(part.isidentifier() for part in path.split(".")):
        reason = "it is no path of a module"
    elif not trusted and path not in (*sys.modules, *os.environ.get(VARIABLE, "").split(",")):
        reason = f"module {path!r} is neither imported nor named in {VARIABLE}"
    else:
        # not getmembers, which imports what a module promises lazily
        members = vars(load_module(path, f"unknown tuner architecture {architecture!r}"))
        kinds = [(name, kind) for name, kind in members.items() if isinstance(kind, type) and issubclass(kind, TunerNetwork)]
        kinds = [(name, kind) for name, kind in kinds if not inspect.isabstract(kind)]
        found = [kind for name, kind in kinds if name == chosen or (not chosen and kind.__module__ == path)]
        if len(found) == 1:
            return found[0]
        reason = f"module {path!r} has {len(found)} such networks"
    known = f"l2l has {', '.join(NETWORKS)}; one elsewhere is named package.module:Class"
    raise ValueError(f"unknown tuner architecture {architecture!r} ({reason}): {known}")


def build_network(architecture: str, args: dict[str, Any], trusted: bool = False) -> TunerNetwork:
    """A freshly initialised network. See :func:`network_class`."""
    return network_class(architecture, trusted)(**args)
