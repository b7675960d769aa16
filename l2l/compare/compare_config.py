"""What a comparison of methods is told: the fields of ``l2l compare`` and of its YAML. See docs/compare.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from l2l.compare.config import Contender, Setting
from l2l.methods.base import check_counts, check_positive
from l2l.models.schemes import Scheme, check_scheme

ExecutorName: TypeAlias = Literal["local", "ray"]
ALL = "all"
"""Among the methods: every zeroth-order method that comes with the package and needs no more than a learning rate."""
BASELINE = "mezo"
HOW = ("overwrite", "processes", "executor", "progress")
"""Fields that say how a comparison is run, not what it is."""


@dataclass(frozen=True)
class MethodEntry:
    """A method as it takes part, with the step sizes that it chooses among."""

    method: str
    """Name of a method, or the path of a module that defines one, as ``l2l fine-tune`` takes it."""
    label: str = ""
    """What tables call it; empty: its method. An entry takes the place of the one of that label that ``all`` made."""
    tuner: str | dict[str, str] | None = None
    """Directory, bundled name or hub id of a tuner, for methods that need one; or one per setting, by its name."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of its runs: ``{lr: auto}``, ``{epsilon: 1.0e-2}``. A learning rate that is a number comes from the
    grid."""
    grid: list[float] = field(default_factory=list)
    """Its own learning rates (values of beta under ``lr: auto``), as many as everybody has. Empty: the shared ones."""
    scale: float = 1.0
    """What the shared learning rates are multiplied by: methods that go by signs, say, take steps of another size."""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.method)
        check_positive(scale=self.scale, grid=min(self.grid, default=1.0))
        if self.grid and self.scale != 1:
            raise ValueError(f"method {self.label!r} has a grid of its own and a scale: multiply its values instead")
        if self.auto and self.scale != 1:
            raise ValueError(f"method {self.label!r} has lr: auto and a scale: beta is a pure number, leave scale out")
        if "scheme" in self.options:
            raise ValueError(f"method {self.label!r} sets scheme: name it among the schemes of the comparison")
        _ = self.contender  # refuses options that are no fields of a run, and those that the comparison sets alike

    @property
    def auto(self) -> bool:
        """Whether it chooses beta in place of a learning rate."""
        return self.options.get("lr") == "auto"

    @property
    def contender(self) -> Contender:
        """The same as one of those whom ``l2l meta-evaluate`` knows."""
        return Contender(self.label, self.method, tuner=self.tuner, method_args=self.method_args, options=self.options)


@dataclass(frozen=True)
class SchemeEntry:
    """A tuning scheme, and what its runs have in common."""

    name: Scheme = "full"
    """``full``, ``lora`` and so on."""
    scale: float = 1.0
    """What learning rates are multiplied by under this scheme, for all methods alike: adapters take larger ones."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of its runs: ``{scheme_args: {r: 16}}``."""

    def __post_init__(self) -> None:
        check_scheme(self.name, self.options.get("scheme_args", {}))
        check_positive(scale=self.scale)
        Contender(f"scheme {self.name}", options=self.options)  # refuses what is no field of a run


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods at equal forward passes and equal tuning effort: methods x models x tasks x schemes x seeds."""

    out: str = "runs/compare"
    """Directory for everything the comparison leaves. The same command again continues an interrupted one, and adds to a
    finished one what is new."""
    methods: list[MethodEntry | str] | str = ALL
    """Methods by name, or as entries with fields of their own. ``all`` stands for every zeroth-order method that comes with
    the package and needs no tuner; a list may hold it beside others."""
    exclude: list[str] = field(default_factory=list)
    """Methods that ``all`` leaves out."""
    baseline: str = BASELINE
    """Label of the method that wins are counted over."""
    settings: list[Setting] = field(default_factory=list)
    """Models with their tasks. Empty: the embedded model with its held-out tasks."""
    schemes: list[SchemeEntry | str] = field(default_factory=lambda: ["full"])
    """Tuning schemes, by name or as entries with fields of their own."""
    grid: list[float] = field(default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3])
    """Learning rates to choose among, the same for all methods up to their ``scale``."""
    beta_grid: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3])
    """Values of beta for methods with ``lr: auto``; as many as there are learning rates."""
    passes: int = 1000
    """Forward passes per run, probes and searches included."""
    seeds: int = 3
    """Seeds of the table, counted from 0."""
    tuning_seed: int = 100
    """The seed on which step sizes are chosen; it is in no table."""
    train_size: int = 1000
    """Rows to train on."""
    dev_size: int = 200
    """Rows, split off the train rows, by which step sizes are chosen."""
    test_size: int = 500
    """Rows of the validation split for accuracy; as many train rows for the final training loss."""
    evaluations: int = 4
    """Evaluations on dev per run."""
    root: str = "."
    """Where relative directories of models and data are looked for."""
    runs: str | None = None
    """Where runs are kept; None: ``out/runs``. Comparisons by the same code may share it, one at a time."""
    executor: ExecutorName = "local"
    """Who runs: processes of this machine, or a Ray cluster that sees the same files."""
    processes: int = 2
    """Runs at a time, one thread each."""
    overwrite: bool = False
    """Remove what an earlier comparison left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        _set(self, "settings", [_made(Setting, entry) for entry in self.settings] or _embedded())
        _set(self, "schemes", [_scheme(entry) for entry in self.schemes])
        if not isinstance(self.methods, str):
            given = [entry if isinstance(entry, str) else _made(MethodEntry, entry) for entry in self.methods]
            _set(self, "methods", given)
        counts = ("passes", "seeds", "train_size", "dev_size", "test_size", "evaluations", "processes")
        check_counts(**{name: getattr(self, name) for name in counts})
        check_positive(grid=min(self.grid, default=0.0), beta_grid=min(self.beta_grid, default=0.0))
        if self.executor not in get_args(ExecutorName):
            raise ValueError(f"executor is {self.executor!r}; use one of {', '.join(get_args(ExecutorName))}")
        if 0 <= self.tuning_seed < self.seeds:
            raise ValueError(f"tuning_seed={self.tuning_seed} is a seed of the table: step sizes need another")
        _check_distinct("setting", [setting.name for setting in self.settings])
        _check_distinct("scheme", [scheme.name for scheme in self.tuning_schemes])
        for setting in self.settings:
            if setting.pool or setting.validation:
                raise ValueError(f"setting {setting.name!r} has a pool or validation tasks: compare learns no tuner")

    @property
    def tuning_schemes(self) -> list[SchemeEntry]:
        """The schemes, each as an entry."""
        return [_scheme(entry) for entry in self.schemes]


Made = TypeVar("Made")


def _made(kind: type[Made], entry: Any) -> Made:
    """A command line gives nested values as mappings or namespaces."""
    if isinstance(entry, kind):
        return entry
    return kind(**(entry if isinstance(entry, Mapping) else vars(entry)))


def _scheme(entry: Any) -> SchemeEntry:
    return _made(SchemeEntry, {"name": entry} if isinstance(entry, str) else entry)


def _set(config: object, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # a frozen value fills itself in while it is made


def _embedded() -> list[Setting]:
    from l2l.tasks.tiny_world import HELD_OUT

    return [Setting("l2l-tiny", tasks=list(HELD_OUT))]


def _check_distinct(what: str, names: list[str]) -> None:
    if not names:
        raise ValueError(f"there is no {what}: name at least one")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"two {what}s are called {name!r}: name each once")
