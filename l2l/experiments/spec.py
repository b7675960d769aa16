"""What a comparison of methods is told: the fields of ``l2l compare`` and of its YAML. See docs/compare.md.

What an evaluation of tuners is told: the fields of ``l2l meta-evaluate`` and of its YAML. See docs/protocol.md.

Who takes part in a setting, with everything decided but the learning rate; and tuners as they were on the day.

Who takes part in a comparison: methods from their short forms, and that each chooses among as many step sizes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from l2l.experiments.stats import Point
from l2l.methods import method_class, method_names
from l2l.methods.base import Method, check_counts, check_positive
from l2l.models.schemes import Scheme, check_scheme
from l2l.report.files import UNFINISHED
from l2l.train.baselines import baseline_names
from l2l.train.config import FineTuneConfig
from l2l.tuners.api import Tuner
from l2l.tuners.io import CONFIG, WEIGHTS

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
    step_fraction_grid: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3])
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
        check_positive(grid=min(self.grid, default=0.0), beta_grid=min(self.step_fraction_grid, default=0.0))
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


Role: TypeAlias = Literal["baseline-mezo", "baseline-dizo", "tuner", "control"]
BASELINE_MEZO, BASELINE_DIZO, TUNER, CONTROL = get_args(Role)

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
"""Controls that the protocol builds itself, by what tables call them; :mod:`l2l.experiments.controls` says what each is."""

OURS = {
    *("model", "task", "method", "tuner", "method_args", "out", "data_dir", "steps", "max_passes", "batch_size"),
    *("max_length", "seed", "train_size", "dev_size", "test_size", "eval_every", "checkpoint_every", "log_every"),
    *("revision", "save_model", "overwrite", "progress", "step_fraction"),
}
"""Fields of a fine-tuning run that the protocol sets for all contenders alike."""


@dataclass(frozen=True)
class Setting:
    """A model and the held-out tasks on which tuners for it are judged."""

    name: str
    """What tables and folders call it."""
    model: str = "l2l/tiny"
    """``l2l/tiny``, a directory (below ``root``), or a hub id."""
    tasks: list[str] = field(default_factory=list)
    """Held-out tasks."""
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
    """Learning rates for this model; empty: the evaluation's."""
    passes: int | None = None
    """Forward passes per run for this model; None: the evaluation's."""

    def __post_init__(self) -> None:
        check_counts(batch_size=self.batch_size, passes=1 if self.passes is None else self.passes)
        check_positive(grid=min(self.grid, default=1.0))
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError(
                f"setting name {self.name!r} names a folder: begin with a letter or digit; -, _ and . may follow"
            )
        if not self.tasks:
            raise ValueError(f"setting {self.name!r} has no tasks: name the held-out tasks to judge on")
        repeated = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if repeated:
            raise ValueError(f"setting {self.name!r} lists task {repeated[0]!r} twice: a pair counts once")


@dataclass(frozen=True)
class Contender:
    """One who takes part: a method, with a tuner or without, and how its step size is set."""

    label: str
    """What tables call it."""
    method: str = "mezo"
    """Method of :class:`FineTuneConfig`."""
    role: Role = "tuner"
    """``tuner``: to be judged; ``baseline-mezo``, ``baseline-dizo``: what it is judged by; ``control``: what it must beat
    to have learned something."""
    tuner: str | dict[str, str] | None = None
    """Directory, bundled name or hub id of a tuner; or one per setting, by the setting's name."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of :class:`FineTuneConfig`: ``{lr: auto}``, ``{schedule: cosine}``. A learning rate that is a number
    comes from the grid."""
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    """Options to choose among together with the learning rate; not for tuners, whose tries are not to outnumber those of
    what they are held against."""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"contender {self.label!r} has role {self.role!r}; use one of {', '.join(get_args(Role))}")
        if self.alternatives and self.role == TUNER:
            raise ValueError(f"contender {self.label!r} is a tuner with alternatives: enter each as a contender")
        known = {entry.name for entry in fields(FineTuneConfig)}
        for name in (name for options in (self.options, *self.alternatives) for name in options):
            if name not in known - OURS:
                raise ValueError(
                    f"contender {self.label!r} sets {name!r}, which "
                    + ("the protocol sets alike for all" if name in OURS else "is no field of a fine-tuning run")
                )
        if self.options.get("lr", "auto") != "auto":
            raise ValueError(
                f"contender {self.label!r} sets lr={self.options['lr']}: leave it to the grid, or say auto"
            )

    def tuner_for(self, setting: str) -> str | None:
        """The tuner it takes in a setting.

        Raises:
            ValueError: it has a tuner per setting, but none for this one.
        """
        if self.tuner is None or isinstance(self.tuner, str):
            return self.tuner
        if setting not in self.tuner:
            raise ValueError(
                f"contender {self.label!r} has no tuner for setting {setting!r}; it has {list(self.tuner)}"
            )
        return self.tuner[setting]


def _three() -> list[Contender]:
    return [
        Contender("MeZO", "mezo", BASELINE_MEZO),
        Contender("DiZO", "dizo", BASELINE_DIZO),
        Contender("tuner", "learned", TUNER, "l2l-tiny"),
    ]


def _held_out() -> list[Setting]:
    from l2l.tasks.tiny_world import HELD_OUT

    return [Setting("l2l-tiny", tasks=list(HELD_OUT))]


@dataclass(frozen=True)
class MetaEvaluateConfig:
    """Judge tuners by the protocol: on held-out tasks, at equal forward passes, at tuned learning rates, over seeds."""

    out: str = "runs/meta-evaluate"
    """Directory for everything the run leaves. The same command again continues an interrupted run."""
    settings: list[Setting] = field(default_factory=list)
    """Models with their held-out tasks. Empty: the embedded model with its own."""
    contenders: list[Contender] = field(default_factory=list)
    """Who takes part, beside the controls that the protocol builds itself. Empty: MeZO, DiZO and the bundled tuner."""
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    """Controls to build; the protocol asks for all of them, and what is left out is noted in the result."""
    judged: str | None = None
    """Label of the tuner that the figures are about and that the controls are modelled on; None: the first."""
    grid: list[float] = field(default_factory=lambda: [1e-5, 3e-5, 1e-4, 3e-4])
    """Learning rates, the same for all contenders."""
    step_fraction_grid: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3])
    """Values of beta for contenders with ``lr: auto``, the same for all of them."""
    passes: int = 1000
    """Forward passes per run, probes and searches included."""
    seeds: int = 3
    """Seeds of the table, counted from 0."""
    tuning_seed: int = 100
    """The seed on which learning rates are chosen."""
    train_size: int = 1000
    """Rows to train on."""
    dev_size: int = 200
    """Rows, split off the train rows, by which learning rates are chosen."""
    test_size: int = 500
    """Rows of the validation split for accuracy; as many train rows for the final training loss."""
    evaluations: int = 4
    """Evaluations on dev per run."""
    control_batches: int = 16
    """Batches per task from which gradient tables are made, half of them against the other half."""
    root: str = "."
    """Where relative directories of models and data are looked for."""
    runs: str | None = None
    """Where runs are kept; None: ``out/runs``. Evaluations by the same code may share it: a run that another one has done
    with the same settings is not done again."""
    processes: int = 2
    """Runs at a time, one thread each."""
    overwrite: bool = False
    """Remove what an earlier evaluation left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        _set(self, "settings", [_made(Setting, entry) for entry in self.settings] or _held_out())
        _set(self, "contenders", [_made(Contender, entry) for entry in self.contenders] or _three())
        counts = (
            "passes",
            "seeds",
            "train_size",
            "dev_size",
            "test_size",
            "evaluations",
            "control_batches",
            "processes",
        )
        check_counts(**{name: getattr(self, name) for name in counts})
        check_positive(grid=min(self.grid, default=0.0), beta_grid=min(self.step_fraction_grid, default=0.0))
        _check_distinct("setting", [setting.name for setting in self.settings])
        unknown = sorted(set(self.controls) - set(CONTROLS))
        if unknown:
            raise ValueError(f"unknown control {unknown[0]!r}; there are {', '.join(CONTROLS)}")
        labels = [contender.label for contender in self.contenders]
        _check_distinct("contender", labels + [CONTROLS[name] for name in self.controls])
        if 0 <= self.tuning_seed < self.seeds:
            raise ValueError(f"tuning_seed={self.tuning_seed} is a seed of the table: learning rates need another")
        self._check_roles()

    def _check_roles(self) -> None:
        for role, most in ((BASELINE_MEZO, 1), (BASELINE_DIZO, 1)):
            found = [contender.label for contender in self.contenders if contender.role == role]
            if len(found) > most:
                raise ValueError(f"contenders {found[0]!r} and {found[1]!r} both have role {role}: there is one")
        if not any(contender.role == BASELINE_MEZO for contender in self.contenders):
            raise ValueError(f"no contender has role {BASELINE_MEZO}: MeZO is what everything is measured against")
        tuners = [contender.label for contender in self.contenders if contender.role == TUNER]
        if not tuners:
            raise ValueError(f"no contender has role {TUNER}: there is nothing to judge")
        if self.judged is not None and self.judged not in tuners:
            raise ValueError(f"judged is {self.judged!r}, which is no contender with role {TUNER}: {', '.join(tuners)}")

    @property
    def judged_contender(self) -> Contender:
        """The tuner that the figures are about."""
        tuners = [contender for contender in self.contenders if contender.role == TUNER]
        return next(contender for contender in tuners if self.judged in (None, contender.label))


ABOUT = {"base_model", "revision", "recipe", "results", "versions", "fingerprint"}
"""What a tuner's config says about it, beside what it is."""


@dataclass(frozen=True)
class Entry:
    """A contender in one setting."""

    label: str
    role: str
    method: str
    tuners: Mapping[str, str | None]
    """Task -> directory of the tuner; the same one for all tasks, save for an oracle's."""
    method_args: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    alternatives: Sequence[Mapping[str, Any]] = ()

    @staticmethod
    def of(contender: Contender, tuner: str | None, tasks: Sequence[str]) -> Entry:
        """A contender of the configuration, with its tuner."""
        given = contender.method_args, contender.options, tuple(contender.alternatives)
        return Entry(contender.label, contender.role, contender.method, dict.fromkeys(tasks, tuner), *given)

    def points(self, grid: Sequence[float], beta_grid: Sequence[float]) -> list[Point]:
        """What its learning rate is chosen among: the same values for all, small ones first."""
        found: list[Point] = []
        for alternative in self.alternatives or ({},):
            auto = (self.options | dict(alternative)).get("lr") == "auto"
            for value in sorted(beta_grid if auto else grid):
                found.append(dict(alternative) | ({"lr": "auto", "step_fraction": value} if auto else {"lr": value}))
        return found


def freeze(tuner: Tuner, folder: Path) -> Path:
    """Save a tuner below ``folder`` under a name that its content gives; nothing is written where it lies there already.

    So a run says by its tuner's path what it used, and a tuner that is learned anew is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
        saved = tuner.save_pretrained(Path(temporary) / "tuner")
        target = folder / fingerprint(saved)
        if not target.exists():
            saved.rename(target)
    return target


def fingerprint(directory: Path) -> str:
    """Hash of what a saved tuner is, whatever its card says about it."""
    config = json.loads((directory / CONFIG).read_text())
    kept = {name: value for name, value in config.items() if name not in ABOUT}
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)
    for path in sorted(directory.glob("*" + Path(WEIGHTS).suffix)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def plain_methods() -> list[str]:
    """Zeroth-order methods that come with the package and can be made without being told anything, by name."""
    return [name for name in method_names() if _is_plain(method_class(name))]


def _is_plain(kind: type) -> bool:
    needed = [
        one.name
        for one in (fields(kind) if is_dataclass(kind) else ())
        if one.init and one.default is MISSING and one.default_factory is MISSING
    ]
    return issubclass(kind, Method) and not needed


def contenders(config: CompareConfig) -> list[MethodEntry]:
    """Every entry of a comparison, in order.

    Raises:
        ValueError: nobody takes part, two entries have one label, a method that takes no steps, an exclusion or a
            baseline that nothing goes by.
    """
    given = config.methods.split(",") if isinstance(config.methods, str) else config.methods
    entries = [MethodEntry(entry.strip()) if isinstance(entry, str) else entry for entry in given]
    own = [entry for entry in entries if entry.method != ALL]
    labels = [entry.label for entry in own]
    if len(set(labels)) < len(labels):
        twice = Counter(labels).most_common(1)[0][0]
        raise ValueError(f"two methods are called {twice!r}: give one of them a label of its own")
    found: dict[str, MethodEntry] = {}
    for entry in entries:
        names = _all_but(config.exclude) if entry.method == ALL else ()
        found |= {name: found.get(name, MethodEntry(name)) for name in names}
        if entry.method != ALL:
            found[entry.label] = entry
    _check(config, list(found.values()))
    return list(found.values())


def _all_but(excluded: Sequence[str]) -> list[str]:
    known = plain_methods()
    for name in excluded:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"exclude names {name!r}, which is not among the methods of 'all'{hint}")
    return [name for name in known if name not in excluded]


def _check(config: CompareConfig, entries: Sequence[MethodEntry]) -> None:
    if not entries:
        raise ValueError("no method takes part: name at least one under methods")
    for entry in entries:
        if entry.method in baseline_names():
            raise ValueError(f"method {entry.method!r} takes no steps, so it cannot be compared at equal passes")
    labels = [entry.label for entry in entries]
    if config.baseline not in labels and config.baseline != BASELINE:
        raise ValueError(f"baseline is {config.baseline!r}, which no method is called; there are {', '.join(labels)}")
    for setting in config.settings:
        _check_effort(config, setting, entries)


def _check_effort(config: CompareConfig, setting: Setting, entries: Sequence[MethodEntry]) -> None:
    """Refuse that one has more tries than another."""
    sizes = {entry.label: len(points(config, setting, config.tuning_schemes[0], entry)) for entry in entries}
    common = Counter(sizes.values()).most_common(1)[0][0]
    for label, size in sizes.items():
        if size != common:
            raise ValueError(
                f"method {label!r} would choose among {size} step sizes and others among {common} in setting "
                f"{setting.name!r}: tuning effort must be equal, so give it {common} (grid, or beta_grid for lr: auto)"
            )


def points(config: CompareConfig, setting: Setting, scheme: SchemeEntry, entry: MethodEntry) -> list[Point]:
    """The step sizes among which an entry chooses, small ones first.

    Raises:
        ValueError: a value is there twice.
    """
    if entry.auto:
        values = entry.grid or config.step_fraction_grid
    else:
        factor = entry.scale * scheme.scale
        values = [float(f"{value * factor:.6g}") for value in entry.grid or setting.grid or config.grid]
    if len(set(values)) < len(values):
        raise ValueError(f"method {entry.label!r} has a step size twice in its grid: {sorted(values)}")
    return [{"lr": "auto", "step_fraction": value} if entry.auto else {"lr": value} for value in sorted(values)]
