"""The torch optimizer around :func:`zo_step`: ``step(closure)``, ``param_groups``, schedulers, exact ``state_dict``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypedDict, cast, final

import torch
from torch import nn
from torch.optim import Optimizer

from l2l.blocks import Block, Blocks
from l2l.estimators.base import Closure
from l2l.finetune.control import CurvatureLRState, LearningRate, CurvatureLR, choose_curvature_lr, curvature_lr_state, restore_curvature_lr
from l2l.finetune.step import StepReport, first_order_step, zo_step
from l2l.methods.base import FirstOrder, Method, check_positive
from l2l.methods.dizo import DiZO as DiZOMethod
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO as MeZOMethod
from l2l.noise import Key
from l2l.perturb import PerturbedParameters
from l2l.report.memory import available_bytes
from l2l.tuners.match import Level
from l2l.tuners.tuner import Tuner

STATE = "zeroth_order"
"""Entry of ``state_dict`` that holds seed, step, step control and the method's state."""


@final
class ZOOptimizer(Optimizer):
    """A zeroth-order method as a torch optimizer: no gradients are computed or stored.

    Args:
        model: its parameters with ``requires_grad`` are trained, tied ones once.
        method: where to look and what to do with what is seen. Or a first-order baseline, whose closure must carry a
            graph; its gradients are computed in the step and freed before it ends.
        lr: theta_b moves by -lr * projected gradient * u_b. ``auto``: lr is beta over the mean curvature along the
            directions, for which some steps evaluate the closure once more; the ``lr`` of ``param_groups`` then is beta.
        seed: fixes every direction, together with the step and the block's name.
        weight_decay: theta_b shrinks by lr * weight_decay each step, save blocks of one dimension (biases, norms).
        groups: overrides by name, each ``{"match": pattern, "lr": …, "weight_decay": …}``; the first match holds. Under
            ``auto`` that ``lr`` is the group's beta.
        walk, sparse_embeddings: see :class:`l2l.perturb.Theta`.
        update: for half-precision weights, ``master`` or ``stochastic``; ``auto``: see :func:`choose_update`.
        beta: under ``auto``, the share of the step to the bottom of the parabola seen; None: that of ``control``.
        control: under ``auto``, when curvature is measured and how it is averaged; None: the defaults.

    Raises:
        ValueError: a value out of range, nothing to train, a group that matches no block, beta or control given where lr
            is a number.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method[Any] | FirstOrder[Any],
        lr: LearningRate = 1e-6,
        seed: int = 0,
        weight_decay: float = 0.0,
        groups: Sequence[Mapping[str, Any]] = (),
        perturb: Literal["auto", "in_place", "exact"] = "auto",
        update: Literal["auto", "master", "stochastic"] = "auto",
        sparse_embeddings: bool = False,
        step_fraction: float | None = None,
        curvature_lr: CurvatureLR | None = None,
    ) -> None:
        self.curvature_lr = choose_curvature_lr(lr, step_fraction, curvature_lr)
        self.curvature_lr_state = CurvatureLRState()
        _check_decay(weight_decay)
        Key(seed)  # refuses what is no seed
        if lr == "auto" and isinstance(method, Method) and method.step_is_normalized:
            raise ValueError(
                f"lr='auto' is a share of the way to the bottom of the parabola seen, and the step of {_named(method)} has a "
                "length of its own: give lr as a number"
            )
        found = Blocks.of(model)
        split = _split(found, groups)
        super().__init__(
            [{"params": [(b.name, b.tensor) for b in inside], **options} for inside, options in split],
            {"lr": self.curvature_lr.step_fraction if self.curvature_lr else lr, "weight_decay": weight_decay},
        )
        self.method = method
        self.seed = seed
        self.steps_done = 0
        ordered = Blocks(block for inside, _ in split for block in inside)
        automatic = "master" if isinstance(method, FirstOrder) else choose_update(ordered)
        self.theta = PerturbedParameters(ordered, perturb, automatic if update == "auto" else update, sparse_embeddings)
        if isinstance(method, FirstOrder):
            _check_first_order(self.theta, lr, sparse_embeddings)
        self.method_state: Any = method.init(self.theta.blocks)
        self.report: StepReport | None = None

    @property
    def blocks(self) -> Blocks:
        """The blocks being trained."""
        return self.theta.blocks

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Closure, fresh: Callable[[int], Closure] | None = None
    ) -> float:
        """One step; the mean of the losses seen, in float.

        Args:
            closure: computes the loss of this step's batch, e.g. ``lambda: model(**batch).loss``. It is called twice
                per draw, and once more where curvature is measured; it must not depend on hidden randomness (call
                ``model.eval()``).
            fresh: further batches for methods that search; see :func:`zo_step`.

        Raises:
            FloatingPointError: a loss is not finite; theta is back where the step began.
        """
        lr, decay = self._rates()
        key = Key(self.seed, self.steps_done)
        if isinstance(self.method, FirstOrder):
            stepped = first_order_step(closure, self.theta, self.method, self.method_state, key, lr, decay)
        else:
            control, seen = self.curvature_lr, self.curvature_lr_state
            stepped = zo_step(closure, self.theta, self.method, self.method_state, key, lr, decay, fresh, control, seen)
        self.method_state, self.report = stepped
        self.curvature_lr_state = self.report.curvature_lr_state
        self.steps_done += 1
        self.theta.raise_deferred_interrupt()
        return self.report.loss

    def _rates(self) -> tuple[list[float], list[float]]:
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        if len(pairs) != len(self.blocks):
            raise ValueError("a parameter group was added after the optimizer was made: make a new optimizer instead")
        lr = [float(group["lr"]) for group, _ in pairs]
        return lr, [float(group["weight_decay"]) if p.ndim > 1 else 0.0 for group, p in pairs]

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the weights: it resumes exactly. Theta goes home."""
        kept = {"seed": self.seed, "step": self.steps_done, "method": _plain(self.method_state)}
        kept["masters"] = self.theta.extra_state()
        kept["control"] = curvature_lr_state(self.curvature_lr, self.curvature_lr_state)
        return {**super().state_dict(), STATE: kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: with its learning rates, ``auto`` or not.

        Raises:
            ValueError: it belongs to another kind of optimizer or method.
        """
        kept = state_dict.get(STATE)
        if kept is None:
            raise ValueError("this state_dict has no zeroth-order state: it belongs to another optimizer")
        restored = _restored(self.method_state, kept["method"])
        control, seen = restore_curvature_lr(kept.get("control"))
        self.theta.load_extra_state(kept.get("masters", {}))
        super().load_state_dict({name: value for name, value in state_dict.items() if name != STATE})
        self.seed, self.steps_done, self.method_state = kept["seed"], kept["step"], restored
        self.curvature_lr, self.curvature_lr_state = control, seen


def choose_update(blocks: Blocks) -> Literal["master", "stochastic"]:
    """How half-precision weights take updates by default.

    ``master``, a float32 copy, where it takes at most half of the memory that is free on the device; else
    ``stochastic`` rounding, if the weights are bfloat16.
    """
    half = [block for block in blocks if block.tensor.dtype in (torch.bfloat16, torch.float16)]
    if not half or any(block.tensor.dtype == torch.float16 for block in half):
        return "master"
    needed = sum(4 * block.numel for block in half)
    return "master" if 2 * needed <= available_bytes(half[0].tensor.device) else "stochastic"


def _check_first_order(theta: PerturbedParameters, lr: LearningRate, sparse_embeddings: bool) -> None:
    """Refuse what only looks along directions can do."""
    if lr == "auto":
        raise ValueError(
            "lr='auto' reads the curvature along the directions of a zeroth-order method: give lr as a number"
        )
    if sparse_embeddings:
        raise ValueError("sparse_embeddings restricts directions, and a first-order method has none: leave it off")
    if theta.update == "stochastic":
        raise ValueError("a first-order method moves half-precision weights by a float32 copy: use update='master'")


def _named(method: object) -> str:
    return type(method).__name__


def _check_decay(value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"weight_decay={value} must be finite and not negative")


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of a group, checked."""
    if "match" not in group or not set(group) <= {"match", "lr", "weight_decay"}:
        raise ValueError(f"group {dict(group)} must have 'match' and may have 'lr' and 'weight_decay', nothing else")
    check_positive(lr=group.get("lr", 1.0))
    _check_decay(group.get("weight_decay", 0.0))
    return {name: value for name, value in group.items() if name != "match"}


def _split(blocks: Blocks, groups: Sequence[Mapping[str, Any]]) -> list[tuple[list[Block], dict[str, Any]]]:
    rest, split = list(blocks), []
    for group in groups:
        options = _options(group)
        inside = [block for block in rest if re.search(group["match"], block.name)]
        if not inside:
            raise ValueError(f"group match={group['match']!r} takes no block; names look like {blocks.names[0]!r}")
        rest = [block for block in rest if block not in inside]
        split.append((inside, options))
    return [*split, (rest, {})] if rest else split


def _plain(state: Any) -> Any:
    """A method's state as dictionaries; states of what is wrapped lie inside."""
    if not is_dataclass(state):
        return state
    return {field.name: _plain(getattr(state, field.name)) for field in fields(state)}


def _restored(fresh: Any, kept: Any) -> Any:
    names = {field.name for field in fields(fresh)} if is_dataclass(fresh) else None
    alike = names == set(kept) if names and isinstance(kept, Mapping) else not names
    if not alike or (isinstance(kept, Mapping) and not names and not isinstance(fresh, Mapping)):
        raise ValueError(f"the saved method state does not fit {type(fresh).__name__}: was it another method?")
    if names is None:
        return kept
    values = {name: _restored(getattr(fresh, name), kept[name]) for name in names}
    return type(fresh)(**values)  # pyright: ignore[reportCallIssue]


class Engine(TypedDict, total=False):
    """How any method walks; see :class:`ZOOptimizer`."""

    perturb: Literal["auto", "in_place", "exact"]
    update: Literal["auto", "master", "stochastic"]
    sparse_embeddings: bool
    groups: Sequence[Mapping[str, Any]]
    step_fraction: float | None
    curvature_lr: CurvatureLR | None


def _parted(arguments: dict[str, Any]) -> tuple[dict[str, Any], Engine]:
    """Arguments of the method, and of the optimizer around it."""
    engine = {name: arguments[name] for name in Engine.__annotations__ if name in arguments}
    return {name: value for name, value in arguments.items() if name not in engine}, cast(Engine, engine)


def MeZO(
    model: nn.Module,
    lr: LearningRate = 1e-6,
    epsilon: float = 1e-3,
    seed: int = 0,
    weight_decay: float = 0.0,
    **more: Any,
) -> ZOOptimizer:
    """MeZO as a torch optimizer; further arguments are those of :class:`l2l.methods.mezo.MeZO` and :class:`Engine`."""
    method, engine = _parted(more)
    return ZOOptimizer(model, MeZOMethod(epsilon=epsilon, **method), lr, seed, weight_decay, **engine)


def DiZO(
    model: nn.Module,
    lr: LearningRate = 1e-6,
    epsilon: float = 1e-3,
    seed: int = 0,
    weight_decay: float = 0.0,
    **more: Any,
) -> ZOOptimizer:
    """DiZO as a torch optimizer; further arguments are those of :class:`l2l.methods.dizo.DiZO` and :class:`Engine`."""
    method, engine = _parted(more)
    return ZOOptimizer(model, DiZOMethod(epsilon=epsilon, **method), lr, seed, weight_decay, **engine)


def ZOFineTuner(
    model: nn.Module,
    tuner: Tuner,
    lr: LearningRate = 1e-6,
    epsilon: float = 1e-3,
    seed: int = 0,
    weight_decay: float = 0.0,
    match: Level = "exact",
    **more: Any,
) -> ZOOptimizer:
    """The learned method as a torch optimizer; further arguments: :class:`l2l.methods.learned.Learned`, :class:`Engine`.

    Args:
        match: how alike the model must be to the tuner's own; see :func:`l2l.tuners.transfer.matched`.

    Raises:
        ValueError: the tuner was made for another model; missing and extra blocks are named.
    """
    tuner = tuner.matched(model, match)
    method, engine = _parted(more)
    return ZOOptimizer(model, Learned(tuner, epsilon=epsilon, **method), lr, seed, weight_decay, **engine)
