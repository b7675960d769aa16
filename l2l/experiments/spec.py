"""What an experiment compares: contenders, settings (a model with tasks), tuning schemes, budgets and step-size grids.

:class:`CompareConfig` holds the fields of ``l2l compare`` (docs/compare.md), :class:`MetaEvaluateConfig` those of
``l2l meta-evaluate`` (docs/protocol.md); both share :class:`ExperimentConfig`, which is all that the runner reads.
"""

import difflib
import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import yaml

from l2l.arguments import Arguments
from l2l.experiments.stats import Cell, Point
from l2l.methods import default_lr, method_class, method_names
from l2l.methods.base import Method, check_counts, check_positive
from l2l.models.schemes import Scheme, check_scheme
from l2l.params import Blocks
from l2l.report.run_directory import UNFINISHED
from l2l.tasks.tiny_world import HELD_OUT
from l2l.train.baselines import baseline_names
from l2l.train.config import FineTuneConfig
from l2l.tuners.api import Tuner
from l2l.tuners.io import CONFIG, WEIGHTS

ExecutorName: TypeAlias = Literal["local", "ray"]
Role: TypeAlias = Literal["baseline-mezo", "baseline-dizo", "tuner", "control"]
BASELINE_MEZO, BASELINE_DIZO, TUNER, CONTROL = get_args(Role)
ALL = "all"  # among the methods: every zeroth-order method of the package that needs no more than a learning rate
BASELINE = "mezo"
UNBOUNDED_STEPS = 10**9  # between evaluations of a run that ends when its seconds are spent

EXECUTION_FIELDS = ("overwrite", "processes", "executor", "ray_address", "progress")
"""Fields of a configuration that change how an experiment is executed, not its results."""
PROTOCOL_FIELDS = {
    *("model", "task", "method", "tuner", "method_args", "out", "data_dir", "steps", "max_passes", "max_seconds"),
    *("batch_size", "max_length", "seed", "train_size", "dev_size", "test_size", "eval_every", "checkpoint_every"),
    *("log_every", "revision", "save", "overwrite", "progress", "step_fraction"),
}
"""Fields of a fine-tuning run that the experiment sets alike for all contenders."""
CONTROLS = {
    "mezo_step_control": "MeZO, tuner's step control",
    "dizo_step_control": "DiZO, tuner's step control",
    "mezo_schedule": "MeZO, tuned schedule",
    "fresh_networks": "fresh networks",
    "random_sigma": "random sigma",
    "outlier_boost": "outlier boost",
    "static_table": "static table (pool)",
    "oracle_table": "oracle table (own task)",
    "random_basis": "random basis",
    "random_turns": "turns of random groups",
}
"""Controls of the protocol -> their labels in tables; :mod:`l2l.experiments.controls` builds them."""


@dataclass(frozen=True)
class Setting(Arguments):
    """A model and the tasks on which methods are compared or tuners judged."""

    name: str
    """Name in tables and of folders."""
    model: str = "l2l/tiny"
    """``l2l/tiny``, a directory or gguf file (below ``root``), or a hub id."""
    tasks: list[str] = field(default_factory=list)
    """Tasks to fine-tune on; for ``l2l meta-evaluate`` held-out ones."""
    pool: list[str] = field(default_factory=list)
    """Tasks that tuners may learn from; none of them may be held out. Empty for the embedded model: its own pool."""
    validation: list[str] = field(default_factory=list)
    """Tasks by which a tuner or its recipe may be chosen; none of them may be held out. Empty for the embedded model: its
    own validation tasks."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl`` (below ``root``); embedded tasks need none."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    batch_size: int = 16
    """Examples per step."""
    grid: list[float] = field(default_factory=list)
    """Learning rates for this model; empty: those of the experiment."""
    passes: int | None = None
    """Forward passes per run for this model; None: those of the experiment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(batch_size=self.batch_size, passes=1 if self.passes is None else self.passes)
        check_positive(grid=min(self.grid, default=1.0))
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError(f"setting name {self.name!r} names a folder: begin with a letter or digit; -, _ and . may follow")
        if not self.tasks:
            raise ValueError(f"setting {self.name!r} has no tasks: name the tasks to run on")
        task, count = Counter(self.tasks).most_common(1)[0]
        if count > 1:
            raise ValueError(f"setting {self.name!r} lists task {task!r} twice: a pair counts once")


@dataclass(frozen=True)
class SchemeEntry(Arguments):
    """A tuning scheme, and further options of all runs under it."""

    name: Scheme = "full"
    """``full``, ``lora`` and so on."""
    scale: float = 1.0
    """Factor of all learning rates under this scheme, for all methods alike: adapters take larger ones."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of its runs: ``{scheme_args: {r: 16}}``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scheme(self.name, self.options.get("scheme_args", {}))
        check_positive(scale=self.scale)
        _check_options(f"scheme {self.name!r}", self.options)


@dataclass(frozen=True)
class Contender(Arguments):
    """A method that takes part: with a tuner or without, and the step sizes among which it chooses."""

    label: str = ""
    """Name in tables; empty: the method's. In ``l2l compare`` it replaces the entry of that label that ``all`` made."""
    method: str = "mezo"
    """Name of a method, or the path of a module that defines one, as ``l2l fine-tune`` takes it."""
    role: Role = "tuner"
    """For ``l2l meta-evaluate``. ``tuner``: to be judged; ``baseline-mezo``, ``baseline-dizo``: what it is judged by;
    ``control``: what it must beat to have learned something."""
    tuner: str | dict[str, str] | None = None
    """Directory, bundled name or hub id of a tuner, for methods that need one; or one per setting, by its name."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of its runs: ``{lr: auto}``, ``{epsilon: 1.0e-2}``. A learning rate that is a number comes from the
    grid."""
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    """Options to choose among together with the learning rate; not for tuners, which must not have more tries than what
    they are compared with."""
    grid: list[float] = field(default_factory=list)
    """Its own learning rates (values of step_fraction under ``lr: auto``), one or as many as others have. Empty: the shared
    ones, for a method with a default of its own in the same ratios around that. For ``l2l compare`` only."""
    scale: float = 1.0
    """Factor of the shared learning rates: methods whose step is normalized, say, need another magnitude. For
    ``l2l compare`` only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.label:
            object.__setattr__(self, "label", self.method)
        who = f"contender {self.label!r}"
        if self.alternatives and self.role == TUNER:
            raise ValueError(f"{who} is a tuner with alternatives: enter each as a contender")
        check_positive(scale=self.scale, grid=min(self.grid, default=1.0))
        for options in (self.options, *self.alternatives):
            _check_options(who, options)
        if "scheme" in self.options:
            raise ValueError(f"{who} sets scheme: name it among the schemes of the comparison")
        if self.options.get("lr", "auto") != "auto":
            raise ValueError(f"{who} sets lr={self.options['lr']}: leave it to the grid, or use auto")
        if self.scale != 1 and self.grid:
            raise ValueError(f"{who} has a grid of its own and a scale: multiply its values instead")
        if self.scale != 1 and self.options.get("lr") == "auto":
            raise ValueError(f"{who} has lr: auto and a scale: step_fraction is a pure number, leave scale out")

    def tuner_for(self, setting: str) -> str | None:
        """The tuner it takes in a setting; ValueError where it has one per setting, but none for this one."""
        if self.tuner is None or isinstance(self.tuner, str):
            return self.tuner
        if setting not in self.tuner:
            raise ValueError(f"contender {self.label!r} has no tuner for setting {setting!r}; it has {list(self.tuner)}")
        return self.tuner[setting]


def _check_options(who: str, options: Mapping[str, Any]) -> None:
    known = {entry.name for entry in fields(FineTuneConfig)}
    for name in options:
        if name in PROTOCOL_FIELDS:
            raise ValueError(f"{who} sets {name!r}, which the protocol sets alike for all")
        if name not in known:
            raise ValueError(f"{who} sets {name!r}, which is no field of a fine-tuning run")


@dataclass(frozen=True)
class ExperimentConfig(Arguments):
    """Fields that every experiment has."""

    out: str = "runs/experiment"
    """Directory of all results. The same command again continues an interrupted run."""
    settings: list[Setting] = field(default_factory=list)
    """Models with their tasks. Empty: the embedded model with its held-out tasks."""
    grid: list[float] = field(default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3])
    """Learning rates to choose among, the same for all contenders (up to their ``scale``)."""
    step_fraction_grid: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3])
    """Values of step_fraction for contenders with ``lr: auto``."""
    passes: int = 1000
    """Forward passes per run, probes and searches included."""
    seconds: float | None = None
    """Seconds of training per run, in place of ``passes``; evaluations are not counted."""
    seeds: int = 3
    """Seeds of the table, counted from 0."""
    tuning_seed: int = 100
    """The seed on which step sizes are chosen; its runs are in no table."""
    train_size: int = 1000
    """Rows to train on."""
    dev_size: int = 200
    """Rows, split off the train rows, by which step sizes are chosen."""
    test_size: int = 500
    """Rows of the validation split for accuracy; as many train rows for the final training loss."""
    evaluations: int = 4
    """Evaluations on dev per run; under ``seconds`` one, at the end."""
    root: str = "."
    """Directory to which relative directories of models and data refer."""
    runs: str | None = None
    """Directory of the runs; None: ``out/runs``. Experiments by the same code may share it, one at a time: a run that
    another one has done with the same settings is not done again."""
    executor: ExecutorName = "local"
    """What executes the runs: processes of this machine, or a Ray cluster that sees the same files."""
    ray_address: str | None = None
    """Of the cluster: ``host:port`` on one of its machines, ``auto``, or ``ray://host:port`` from elsewhere; ``local``:
    one that is started on this machine. None: that of ``RAY_ADDRESS``, else ``local``."""
    processes: int = 2
    """Runs at a time, one thread each."""
    overwrite: bool = False
    """Remove what an earlier experiment left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        embedded = [Setting("l2l-tiny", tasks=list(HELD_OUT))]
        _set(self, "settings", [_as(Setting, entry) for entry in self.settings] or embedded)
        counts = ("passes", "seeds", "train_size", "dev_size", "test_size", "evaluations", "processes")
        check_counts(**{name: getattr(self, name) for name in counts})
        check_positive(**{name: min(getattr(self, name), default=0.0) for name in ("grid", "step_fraction_grid")})
        check_positive(seconds=1.0 if self.seconds is None else self.seconds)
        if 0 <= self.tuning_seed < self.seeds:
            raise ValueError(f"tuning_seed={self.tuning_seed} is a seed of the table: step sizes need another")
        check_distinct("setting", [setting.name for setting in self.settings])
        for setting in self.settings:
            if self.seconds is not None and setting.passes is not None:
                raise ValueError(f"setting {setting.name!r} has passes, but the runs are limited by seconds")

    @property
    def tuning_schemes(self) -> list[SchemeEntry]:
        """The schemes to compare under: full fine-tuning unless a preset has others."""
        return [SchemeEntry()]

    @property
    def recorded(self) -> dict[str, Any]:
        """The configuration as YAML, without :data:`EXECUTION_FIELDS`."""
        kept = {name: value for name, value in asdict(self).items() if name not in EXECUTION_FIELDS}
        return yaml.safe_load(yaml.safe_dump(kept, sort_keys=False))

    def budget(self, setting: Setting) -> dict[str, Any]:
        """Options of a run that end it at the budget.

        ``steps`` is the number of passes, since a step takes at least one, and ``max_passes`` ends the run with the first
        step after which the passes are spent. Evaluations are counted at two passes per step, and runs of a method of more are
        evaluated as often (:attr:`Entry.eval_every`). Under ``seconds`` nothing bounds the steps, and the run is evaluated
        once, at its end.
        """
        if self.seconds is not None:
            every = UNBOUNDED_STEPS
            return {"max_seconds": self.seconds, "eval_every": every, "checkpoint_every": every}
        passes = setting.passes or self.passes
        every = max(1, passes // 2 // self.evaluations)
        return {"steps": passes, "max_passes": passes, "eval_every": every, "checkpoint_every": passes}

    def run_options(self, setting: Setting, scheme: SchemeEntry) -> dict[str, Any]:
        """Options that all runs of a setting under a scheme share."""
        return {
            "model": located(setting.model, self.root),
            "data_dir": None if setting.data_dir is None else str(Path(self.root) / setting.data_dir),
            **{name: getattr(setting, name) for name in ("max_length", "batch_size")},
            **{name: getattr(self, name) for name in ("train_size", "dev_size", "test_size")},
            **self.budget(setting),
            "scheme": scheme.name,
            **scheme.options,
        }

    def points(self, setting: Setting, scheme: SchemeEntry, contender: Contender) -> list[Point]:
        """The points a contender chooses among, by alternative, then by step size; ValueError where one occurs twice."""
        found: list[Point] = []
        for alternative in contender.alternatives or [{}]:
            auto = (contender.options | alternative).get("lr") == "auto"
            values = contender.grid or (self.step_fraction_grid if auto else setting.grid or self.grid)
            factor = 1.0 if auto else contender.scale * scheme.scale
            if factor != 1:
                values = [float(f"{value * factor:.6g}") for value in values]
            if len(set(values)) < len(values):
                raise ValueError(f"contender {contender.label!r} has a step size twice in its grid: {sorted(values)}")
            own = default_lr(contender.method)
            if own is not None and not auto and not contender.grid:  # as many values, around the default of the method
                middle = math.sqrt(min(values) * max(values))
                values = [float(f"{own * value / middle:.6g}") for value in values]
            made = ({"lr": "auto", "step_fraction": value} if auto else {"lr": value} for value in sorted(values))
            found += [alternative | point for point in made]
        return found


Made = TypeVar("Made")


def _as(kind: type[Made], entry: Any) -> Made:
    """An entry of a command line, which may be a mapping or a namespace."""
    return entry if isinstance(entry, kind) else kind(**(entry if isinstance(entry, Mapping) else vars(entry)))


def _set(config: object, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # a frozen dataclass normalizes its fields while it is made


def check_distinct(what: str, names: Sequence[str]) -> None:
    """Refuse an empty list, and a name that occurs twice."""
    if not names:
        raise ValueError(f"there is no {what}: name at least one")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"two {what}s are called {name!r}: name each once")


def located(name: str, root: str) -> str:
    """The directory or file of that name below ``root`` where there is one; else the name unchanged."""
    below = Path(root) / name
    return str(below) if below.exists() else name


@dataclass(frozen=True)
class CompareConfig(ExperimentConfig):
    """Compare methods at equal passes (or seconds) and equal tuning effort: methods x models x tasks x schemes x seeds."""

    out: str = "runs/compare"
    """Directory for everything the comparison leaves. The same command again continues an interrupted one, and adds to a
    finished one what is new."""
    methods: list[Contender | str] | str = ALL
    """Methods by name, or as entries with fields of their own. ``all`` stands for every zeroth-order method that comes with
    the package and needs no tuner; a list may hold it beside others."""
    exclude: list[str] = field(default_factory=list)
    """Methods that ``all`` leaves out."""
    baseline: str = BASELINE
    """Label of the method that wins are counted over."""
    schemes: list[SchemeEntry | str] = field(default_factory=lambda: ["full"])
    """Tuning schemes, by name or as entries with fields of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "schemes", self.tuning_schemes)
        if not isinstance(self.methods, str):
            entries = [entry if isinstance(entry, str) else _as(Contender, entry) for entry in self.methods]
            _set(self, "methods", entries)
        check_distinct("scheme", [scheme.name for scheme in self.tuning_schemes])
        for setting in self.settings:
            if setting.pool or setting.validation:
                raise ValueError(f"setting {setting.name!r} has a pool or validation tasks: compare learns no tuner")

    @property
    def tuning_schemes(self) -> list[SchemeEntry]:
        """The schemes to compare under, in order."""
        return [_as(SchemeEntry, {"name": entry} if isinstance(entry, str) else entry) for entry in self.schemes]

    @property
    def contenders(self) -> list[Contender]:
        """Every contender, in order.

        ValueError where there is none, two have one label, a method takes no steps, an exclusion or the baseline is
        unknown, or two would choose among different numbers of step sizes.
        """
        given = self.methods.split(",") if isinstance(self.methods, str) else self.methods
        entries = [Contender(method=entry.strip()) if isinstance(entry, str) else entry for entry in given]
        labels = Counter(entry.label for entry in entries if entry.method != ALL)
        for twice in [label for label, count in labels.most_common(1) if count > 1]:
            raise ValueError(f"two methods are called {twice!r}: give one of them a label of its own")
        found: dict[str, Contender] = {}
        for entry in entries:
            if entry.method != ALL:
                found[entry.label] = entry
                continue
            known = plain_methods()
            for name in self.exclude:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"exclude names {name!r}, which is not among the methods of 'all'{hint}")
            found |= {name: found.get(name, Contender(method=name)) for name in known if name not in self.exclude}
        if not found:
            raise ValueError("no method takes part: name at least one under methods")
        for entry in found.values():
            if entry.method in baseline_names():
                raise ValueError(f"method {entry.method!r} takes no steps, so it cannot be compared at equal passes")
        if self.baseline not in found and self.baseline != BASELINE:
            raise ValueError(f"baseline is {self.baseline!r}, the label of no method; there are {', '.join(found)}")
        for setting in self.settings:
            sizes = {label: len(self.points(setting, self.tuning_schemes[0], entry)) for label, entry in found.items()}
            choices = Counter(size for size in sizes.values() if size > 1)  # a contender of one step size has no choice
            common = choices.most_common(1)[0][0] if choices else 1
            for label, size in sizes.items():
                if size not in (1, common):
                    raise ValueError(
                        f"method {label!r} would choose among {size} step sizes and others among {common} in setting "
                        f"{setting.name!r}: tuning effort must be equal, so give it {common} (grid, or step_fraction_grid "
                        "for lr: auto)"
                    )
        return list(found.values())


def plain_methods() -> list[str]:
    """Zeroth-order methods of the package that need no argument, by name."""
    found = {name: kind for name in method_names() if issubclass(kind := method_class(name), Method)}
    given = {name: [one for one in fields(kind) if one.init] if is_dataclass(kind) else [] for name, kind in found.items()}
    needed = {name for name, own in given.items() for one in own if one.default is one.default_factory is MISSING}
    return [name for name in found if name not in needed]


@dataclass(frozen=True)
class MetaEvaluateConfig(ExperimentConfig):
    """Judge tuners by the protocol: on held-out tasks, at equal forward passes, at tuned learning rates, over seeds."""

    out: str = "runs/meta-evaluate"
    """Directory for everything the run leaves. The same command again continues an interrupted run."""
    contenders: list[Contender] = field(default_factory=list)
    """Who takes part, beside the controls that the protocol builds itself. Empty: MeZO, DiZO and the bundled tuner."""
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    """Controls to build; the protocol asks for all of them, and what is left out is noted in the result."""
    judged: str | None = None
    """Label of the tuner that the figures are about and that the controls are modelled on; None: the first."""
    grid: list[float] = field(default_factory=lambda: [1e-5, 3e-5, 1e-4, 3e-4])
    """Learning rates, the same for all contenders."""
    step_fraction_grid: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3])
    """Values of step_fraction for contenders with ``lr: auto``, the same for all of them."""
    control_batches: int = 16
    """Batches per task from which gradient tables are made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        default = [Contender("MeZO", "mezo", BASELINE_MEZO), Contender("DiZO", "dizo", BASELINE_DIZO)]
        default.append(Contender("tuner", "learned", TUNER, "l2l-tiny"))
        _set(self, "contenders", [_as(Contender, entry) for entry in self.contenders] or default)
        check_counts(control_batches=self.control_batches)
        for unknown in sorted(set(self.controls) - set(CONTROLS)):
            raise ValueError(f"unknown control {unknown!r}; there are {', '.join(CONTROLS)}")
        check_distinct("contender", [one.label for one in self.contenders] + [CONTROLS[name] for name in self.controls])
        for one in self.contenders:
            if one.grid or one.scale != 1:
                raise ValueError(f"contender {one.label!r} has a grid or a scale: the protocol has one grid for all")
        for role in (BASELINE_MEZO, BASELINE_DIZO):
            found = self._labels(role)
            if len(found) > 1:
                raise ValueError(f"contenders {found[0]!r} and {found[1]!r} both have role {role}: there is one")
        if not self._labels(BASELINE_MEZO):
            raise ValueError(f"no contender has role {BASELINE_MEZO}: MeZO is what everything is measured against")
        if not (tuners := self._labels(TUNER)):
            raise ValueError(f"no contender has role {TUNER}: there is nothing to judge")
        if self.judged is not None and self.judged not in tuners:
            raise ValueError(f"judged is {self.judged!r}, which is no contender with role {TUNER}: {', '.join(tuners)}")

    def _labels(self, role: str) -> list[str]:
        return [contender.label for contender in self.contenders if contender.role == role]

    @property
    def judged_contender(self) -> Contender:
        label = self.judged or self._labels(TUNER)[0]
        return next(contender for contender in self.contenders if contender.label == label)


@dataclass(frozen=True)
class MethodCosts:
    """What a method declares of itself where it was built."""

    memory: str = ""  # memory beside the weights, as a formula
    paper: str = ""
    kept_bytes: int | None = None  # most bytes of tensors that it keeps between steps; None where it declares none
    trained_bytes: int = 0  # bytes of the weights that are trained
    step_is_normalized: bool = False  # whether its learning rate is of another magnitude than MeZO's

    @staticmethod
    def of(method: Any, blocks: Blocks) -> "MethodCosts":
        """The costs that a method declares, for these blocks."""
        info, trained = method.info, sum(block.numel * block.tensor.element_size() for block in blocks)
        return MethodCosts(info.memory, info.paper, method.state_bytes(blocks), trained, method.step_is_normalized)


@dataclass(frozen=True)
class Entry:
    """A contender in a setting."""

    contender: Contender
    tuners: Mapping[str, Any]
    """Task -> the tuner, and once it is saved its directory; the same for all tasks, except for an oracle's."""
    steps: int | None = None  # steps to plan for, of a method with a ``horizon``; None: those of the budget
    costs: MethodCosts = MethodCosts()
    eval_every: int | None = None  # steps between evaluations, of a method of more than two passes a step


@dataclass(frozen=True)
class Place:
    """A setting under a tuning scheme, with every contender that takes part in it."""

    setting: Setting
    scheme: SchemeEntry
    entries: Mapping[str, Entry]  # by label
    left_out: Mapping[str, str] = field(default_factory=dict)  # label -> why it does not take part here
    inputs: Mapping[str, Any] = field(default_factory=dict)  # task -> fingerprint of what its runs read

    @property
    def cells(self) -> list[Cell]:
        """One cell per task of the setting."""
        return [Cell(self.setting.name, self.scheme.name, task) for task in self.setting.tasks]

    def frozen(self, folder: Path) -> "Place":
        """The place with its tuners saved below a folder, as they are now."""
        entries = {}
        for label, entry in self.entries.items():
            saved = {task: str(freeze(tuner, folder)) for task, tuner in entry.tuners.items() if isinstance(tuner, Tuner)}
            entries[label] = replace(entry, tuners={**entry.tuners, **saved})
        return replace(self, entries=entries)


ABOUT_FIELDS = {"base_model", "revision", "recipe", "results", "versions", "fingerprint"}
"""Fields of a tuner's config that describe its origin and do not change what it computes."""


def freeze(tuner: Tuner, folder: Path) -> Path:
    """Save a tuner below ``folder`` under the hash of its content, by which its path identifies it, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
        saved = tuner.save_pretrained(Path(temporary) / "tuner")
        target = folder / fingerprint(saved)
        if not target.exists():
            saved.rename(target)
    return target


def fingerprint(directory: Path) -> str:
    """Hash of a saved tuner's weights and config, its card and :data:`ABOUT_FIELDS` apart."""
    config = json.loads((directory / CONFIG).read_text())
    kept = {name: value for name, value in config.items() if name not in ABOUT_FIELDS}
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)
    for path in sorted(directory.glob("*" + Path(WEIGHTS).suffix)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
