"""The training plan of a tuner: what a user would otherwise tune, chosen on the pool's tasks (``l2l plan``).

Learning rates, numbers of directions and depths belong together: a plan is measured as one, and saved beside sigma.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from math import isfinite
from typing import Any, final

from l2l.models.prefix import TrainLayers, check_train_layers, same_layers

FOR_ALL_LAYERS = frozenset(("method", "batch_size", "depths", "layer_options"))
"""Fields that hold whichever layers are trained: budgets are counted in passes over such a batch, and the method says whether
sigma is used."""


@final
@dataclass(frozen=True)
class Depth:
    """Layers to train from a budget on."""

    budget: float
    """Least budget of a run, in forward passes of the whole model over a batch of the plan's size: it knows no machine."""
    train_layers: TrainLayers
    """``top:5``, ``top:1/3``, ``25,26``, ``all``: as ``l2l fine-tune`` takes them."""


@final
@dataclass(frozen=True)
class TrainingPlan:
    """Options of fine-tuning runs, and the layers to train by budget. None leaves an option to its default.

    Raises:
        ValueError: a value is of no use; the message names it, the rule and the way out.
    """

    method: str
    """``learned``, ``learned+rsgn``; or one without the tuner's sigma, as ``rsgn``, where that was better."""
    method_args: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the method."""
    estimator: str | None = None
    """``two_sided`` or ``one_sided``; None: the method's own."""
    num_directions: int | None = None
    """Directions per step."""
    lr: float | str | None = None
    """Learning rate, or ``auto``."""
    epsilon: float | None = None
    """Length of the perturbation."""
    batch_size: int = 16
    """Examples per step; the batch of which budgets are counted in passes."""
    schedule: str | None = None
    """``constant``, ``linear`` or ``cosine``."""
    schedule_end: float | None = None
    """Factor at which the schedule ends."""
    depths: Sequence[Depth] = (Depth(0, "all"),)
    """By budget, ascending from 0."""
    layer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``train_layers`` that a user may set, none of ``depths`` -> options that are others there, as ``{"all":
    {"num_directions": 2}}``; None leaves one to its default. Any but ``method`` and ``batch_size``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "method_args", dict(self.method_args))
        object.__setattr__(self, "layer_options", {layers: dict(own) for layers, own in self.layer_options.items()})
        self._check("method", isinstance(self.method, str) and bool(self.method), "the name of a method, as learned+rsgn")
        self._check("estimator", self.estimator in (None, "two_sided", "one_sided"), "two_sided or one_sided")
        self._check("schedule", self.schedule in (None, "constant", "linear", "cosine"), "constant, linear or cosine")
        for name in ("batch_size", "num_directions"):
            value = getattr(self, name)
            self._check(name, (name != "batch_size" and value is None) or _whole(value), "a whole number, at least 1")
        self._check("lr", self.lr in (None, "auto") or _positive(self.lr), "auto or a positive number")
        self._check("epsilon", self.epsilon is None or _positive(self.epsilon), "a positive number")
        end = self.schedule_end
        self._check("schedule_end", end is None or end == 0 or _positive(end), "a number, at least 0")
        budgets = [depth.budget for depth in self.depths]
        rising = all(low < high for low, high in pairwise(budgets))
        known = budgets[:1] == [0] and all(map(_positive, budgets[1:])) and rising
        self._check("depths", known, "budgets that ascend, each once, from 0", budgets)
        for depth in self.depths:
            check_train_layers(depth.train_layers)
        for layers, own in self.layer_options.items():
            free = not any(same_layers(layers, depth.train_layers) for depth in self.depths)
            self._check("layer_options", free, "of other layers than depths, whose options are the plan's own", layers)
            known = own.keys() <= {one.name for one in fields(self)} - FOR_ALL_LAYERS
            self._check("layer_options", known, f"of fields of a plan other than {', '.join(sorted(FOR_ALL_LAYERS))}", own)
            replace(self, layer_options={}, **own)  # raises where a value is of no use

    def _check(self, name: str, right: bool, rule: str, shown: Any = None) -> None:
        if not right:
            shown = getattr(self, name) if shown is None else shown
            raise ValueError(f"training plan: {name}={shown!r} must be {rule}; make a plan with `l2l plan`")

    def train_layers(self, budget: float) -> TrainLayers:
        """The layers to train at a budget: of the entry with the largest budget that is not above it."""
        return [depth.train_layers for depth in self.depths if depth.budget <= budget][-1]

    @property
    def options(self) -> dict[str, Any]:
        """What it decides for runs of every budget, as options of ``l2l fine-tune``."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("depths", "layer_options")}
        found |= {"method_args": dict(self.method_args)}
        return {name: value for name, value in found.items() if value is not None}

    def options_at(self, train_layers: TrainLayers) -> dict[str, Any]:
        """:attr:`options` of runs that train these layers."""
        found = self.options
        for layers, own in self.layer_options.items():
            if same_layers(layers, train_layers):
                found.update(own)
        return {name: value for name, value in found.items() if value is not None}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0


def plan_config(plan: TrainingPlan) -> dict[str, Any]:
    """JSON values."""
    others = {"layer_options": plan.layer_options} if plan.layer_options else {}
    return {**plan.options, "depths": [dict(vars(depth)) for depth in plan.depths], **others}


def build_plan(config: Mapping[str, Any]) -> TrainingPlan:
    """The plan of the values of :func:`plan_config`; ValueError where they describe none."""
    known = {one.name for one in fields(TrainingPlan)}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"training plan: there is no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    try:
        depths = [Depth(**depth) for depth in config["depths"]]
        return TrainingPlan(**{**config, "depths": depths})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"training plan: its values do not fit ({error}); it needs method and depths") from error


def plan_line(plan: TrainingPlan | None) -> str:
    """The plan in words; ``none`` for None."""
    if plan is None:
        return "none"
    first, *later = plan.depths
    layers = f"train_layers {first.train_layers}"
    layers += "".join(f", {depth.train_layers} from a budget of {depth.budget:g} whole passes" for depth in later)
    others = "".join(f"; where a user sets train_layers {at}: {options_line(own)}" for at, own in plan.layer_options.items())
    return f"{options_line(plan.options)}, {layers}{others}"


def options_line(options: Mapping[str, Any]) -> str:
    """``method learned+rsgn, batch_size 16``; empty values are left out."""
    shown = ((name, f"{value:g}" if isinstance(value, float) else value) for name, value in options.items() if value != {})
    return ", ".join(f"{name} {value}" for name, value in shown)
