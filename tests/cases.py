"""Every method and every problem that the contracts in test_contracts.py are held against. A new method adds a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from l2l.methods import is_first_order, method_names
from l2l.methods.base import Method
from l2l.methods.registry import build_method
from l2l.methods.wrappers import wrapper_names
from l2l.optim import ZOOptimizer
from l2l.tuners.api import Tuner


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
    own_lr: float
    """Of methods whose step has a length of its own: about how far a coordinate goes in one."""
    steps: int
    """Steps after which every method has clearly descended."""
    below: float
    """The share of the first loss that counts as descended."""


PROBLEMS = [
    Problem("quadratic", Quadratic, lr=0.03, own_lr=0.03, steps=60, below=0.5),
    Problem("logistic", LogisticRegression, lr=0.1, own_lr=0.03, steps=80, below=0.7),
    Problem("tied_lm", TiedLM, lr=0.01, own_lr=0.003, steps=150, below=0.85),
]


@dataclass(frozen=True)
class MethodCase:
    name: str
    args: dict[str, Any]

    def make(self, model: nn.Module) -> Method[Any]:
        tuner = Tuner.for_model(model, seed=5) if "learned" in self.name.split("+") else None
        made = build_method(self.name, 1e-3, self.args, tuner, model)
        assert isinstance(made, Method), "first-order methods have contracts of their own"
        return made


def zeroth_order() -> list[str]:
    """Names of all methods of the package but first-order ones: a file that is added is held against the contracts."""
    return [name for name in method_names() if not is_first_order(name)]


ARGS: dict[str, dict[str, Any]] = {
    "adam": {"num_directions": 8},
    "adamu": {"horizon": 60},
    "blockwise+mezo": {"blockwise": {"level": "block", "groups": 2}},
    "conmezo": {"beta": 0.9, "warm_up": 5},
    "dizo": {"interval": 3, "iterations": 2},
    "es": {"num_directions": 4},
    "forward_grad": {"num_directions": 2},
    "hizoo": {"smooth": 0.01},
    "hybrid+mezo": {"hybrid": {"match": "vector|bias"}},
    "lozo": {"interval": 5},
    "lozo_m": {"interval": 5},
    "momentum": {"momentum": 0.5},
    "pseuzo": {"window_bytes": 2**14},
    "sign": {"num_directions": 8},
    "sparse_mezo": {"sparsity": 0.1},
    "subzero": {"interval": 5, "rank": 3},
    "subzero_plus": {"interval": 5, "num_directions": 8, "rank": 3},
}
"""Where defaults would make nothing happen in a few steps."""

ONE_SIDED: dict[str, Any] = {"estimator": "one_sided", "num_directions": 3}
RANKED: dict[str, Any] = {"antithetic": False, "num_directions": 8, "rank": 1, "shaping": "centered_ranks"}

SHORT: dict[str, float] = {
    **{"es": 8**0.5, "fzoo": 8**0.5, "sign-reading=scalar": 2.0, "subzero_plus": 2.0},
    "es-antithetic=False-num_directions=8-rank=1-shaping=centered_ranks": 96**0.5,
}
"""Of methods, or cases of one, whose coordinates go but a part of the learning rate in a step: how many of these make it
whole."""

METHODS = [
    *(MethodCase(name, ARGS.get(name, {})) for name in zeroth_order()),
    *(MethodCase(f"{name}+mezo", ARGS.get(f"{name}+mezo", {})) for name in wrapper_names()),
    MethodCase("mezo", {"distribution": "rademacher"}),
    MethodCase("mezo", {"num_directions": 3}),
    MethodCase("mezo", ONE_SIDED),
    MethodCase("dizo", ARGS["dizo"] | ONE_SIDED),
    MethodCase("adam", {"estimator": "one_sided", "num_directions": 8}),
    MethodCase("es", RANKED),
    MethodCase("dizo", {"interval": 3, "iterations": 2, "search": "fo"}),
    MethodCase("learned+lozo", {"lozo": ARGS["lozo"]}),
    MethodCase("learned+mezo", {"mezo": ONE_SIDED}),
    MethodCase("blockwise+mezo", ARGS["blockwise+mezo"] | {"mezo": ONE_SIDED}),
    MethodCase("sparse+learned+lozo", {"lozo": ARGS["lozo"]}),
    MethodCase("sign", {"reading": "scalar"}),
    MethodCase("sparse+lozo_m", {"sparse": {"interval": 3}, "lozo_m": ARGS["lozo_m"]}),
    MethodCase("sparse+mezo", {"sparse": {"kind": "magnitude", "interval": 3}}),
    MethodCase("sparse+mezo", {"sparse": {"kind": "wanda", "interval": 3}}),
    MethodCase("tezo", {"rule": "adam"}),
    MethodCase("tezo", {"rule": "momentum"}),
]


ALONG_NOISE = [case for case in METHODS if case.name in ("mezo", "dizo", "learned")]
"""Methods whose walks are sums of noise alone, bit for bit; along shapes they are within one rounding per walk."""
STEPPED = [case for case in METHODS if not case.make(TiedLM()).step_is_normalized]
"""Methods to which a learning rate of ``auto`` means something."""


def named(case: MethodCase) -> str:
    return "-".join([case.name, *(f"{key}={value}" for key, value in case.args.items())])


def optimizer_for(case: MethodCase, model: nn.Module, problem: Problem, seed: int = 0, **more: Any) -> ZOOptimizer:
    method = case.make(model)
    short = SHORT.get(named(case), SHORT.get(case.name.split("+")[-1], 1.0))
    lr = method.default_lr or (problem.own_lr * short if method.step_is_normalized else problem.lr)
    return ZOOptimizer(model, method, lr=lr, seed=seed, **more)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters, tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest absolute difference of any coordinate."""
    return max((left[name] - right[name]).abs().max().item() for name in left)
