"""Every method and every problem that the contracts in test_contracts.py are held against. A new method adds a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from l2l.blocks import Blocks
from l2l.finetune.optimizer import ZOOptimizer
from l2l.methods.base import Method
from l2l.methods.dizo import DiZO, projected_blocks
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.tuners.tuner import Tuner


class Quadratic(nn.Module):
    """0.5 * sum(curvature * (w - target)^2): every central difference on it is exact."""

    curvature: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 4, generator=draw))
        self.vector = nn.Parameter(torch.randn(6, generator=draw))
        self.register_buffer("curvature", torch.rand(5, 4, generator=draw) + 0.5)

    def forward(self) -> Tensor:
        return 0.5 * (self.curvature * (self.matrix - 1) ** 2).sum() + 0.5 * ((self.vector + 2) ** 2).sum()


class LogisticRegression(nn.Module):
    """Two classes in eight dimensions, separable but for a few."""

    x: Tensor
    y: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.linear = nn.Linear(8, 2)
        x = torch.randn(64, 8, generator=draw)
        self.register_buffer("x", x)
        self.register_buffer("y", (x[:, 0] + 0.3 * torch.randn(64, generator=draw) > 0).long())

    def forward(self) -> Tensor:
        return functional.cross_entropy(self.linear(self.x), self.y)


class Attention(nn.Module):
    """Causal attention with one head: found by its ``head_dim``, as in any language model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_dim = width
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class TiedLM(nn.Module):
    """A language model of one layer whose output embedding is its input embedding, on one fixed batch."""

    tokens: Tensor

    def __init__(self, vocabulary: int = 24, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.embed = nn.Embedding(vocabulary, width)
            self.attention = Attention(width)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.register_buffer("tokens", torch.randint(vocabulary, (4, 7)))
        self.head.weight = self.embed.weight

    def forward(self) -> Tensor:
        x = self.embed(self.tokens)
        logits = self.head(self.norm(x + self.attention(x)))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Problem:
    name: str
    make: Callable[[], nn.Module]
    lr: float
    steps: int
    """Steps after which every method has clearly descended."""
    below: float
    """The share of the first loss that counts as descended."""


PROBLEMS = [
    Problem("quadratic", Quadratic, lr=0.03, steps=60, below=0.5),
    Problem("logistic", LogisticRegression, lr=0.1, steps=80, below=0.7),
    Problem("tied_lm", TiedLM, lr=0.01, steps=150, below=0.85),
]


@dataclass(frozen=True)
class MethodCase:
    name: str
    make: Callable[[nn.Module], Method[Any]]
    state_bytes: Callable[[Blocks], int]
    """What the method's docstring declares to keep between steps."""
    projects: bool = False
    """Changes weights other than along the directions looked at."""


def nothing(blocks: Blocks) -> int:
    return 0


def sigma_and_moments(blocks: Blocks) -> int:
    return (4 + 2 * 8 + 8 * 4 + 8) * len(blocks)  # sigma, moments, constants, first variances


def projected_copy(blocks: Blocks) -> int:
    chosen = [blocks[i].tensor for i in projected_blocks(blocks, None)]
    return sum(tensor.numel() * tensor.element_size() for tensor in chosen)


METHODS = [
    MethodCase("mezo", lambda model: MeZO(), nothing),
    MethodCase("mezo_rademacher", lambda model: MeZO(distribution="rademacher"), nothing),
    MethodCase("mezo_3_draws", lambda model: MeZO(draws=3), nothing),
    MethodCase("dizo_zo", lambda model: DiZO(interval=3, iterations=2), projected_copy, projects=True),
    MethodCase("dizo_fo", lambda model: DiZO(interval=3, iterations=2, search="fo"), projected_copy, projects=True),
    MethodCase("learned", lambda model: Learned(Tuner.for_model(model, seed=5)), sigma_and_moments),
]


def optimizer_for(case: MethodCase, model: nn.Module, lr: float, seed: int = 0) -> ZOOptimizer:
    return ZOOptimizer(model, case.make(model), lr=lr, seed=seed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters, tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest absolute difference of any coordinate."""
    return max((left[name] - right[name]).abs().max().item() for name in left)
