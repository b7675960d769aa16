"""What an evaluation of tuners is told: the fields of ``l2l meta-evaluate`` and of its YAML. See docs/protocol.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from l2l.finetune.config import FineTuneConfig
from l2l.methods.base import check_counts, check_positive

Role: TypeAlias = Literal["baseline-mezo", "baseline-dizo", "tuner", "control"]
BASELINE, BASELINE_DIZO, TUNER, CONTROL = get_args(Role)

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
"""Controls that the protocol builds itself, by what tables call them; :mod:`l2l.compare.controls` says what each is."""

OURS = {
    *("model", "task", "method", "tuner", "method_args", "out", "data_dir", "steps", "max_passes", "batch_size"),
    *("max_length", "seed", "train_size", "dev_size", "test_size", "eval_every", "checkpoint_every", "log_every"),
    *("revision", "save_model", "overwrite", "progress", "beta"),
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
        Contender("MeZO", "mezo", BASELINE),
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
    beta_grid: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3])
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
        check_positive(grid=min(self.grid, default=0.0), beta_grid=min(self.beta_grid, default=0.0))
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
        for role, most in ((BASELINE, 1), (BASELINE_DIZO, 1)):
            found = [contender.label for contender in self.contenders if contender.role == role]
            if len(found) > most:
                raise ValueError(f"contenders {found[0]!r} and {found[1]!r} both have role {role}: there is one")
        if not any(contender.role == BASELINE for contender in self.contenders):
            raise ValueError(f"no contender has role {BASELINE}: MeZO is what everything is measured against")
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


Made = TypeVar("Made")


def _made(kind: type[Made], entry: Any) -> Made:
    """A command line gives nested values as mappings or namespaces."""
    if isinstance(entry, kind):
        return entry
    return kind(**(entry if isinstance(entry, Mapping) else vars(entry)))


def _set(config: object, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # a frozen value fills itself in while it is made


def _check_distinct(what: str, names: list[str]) -> None:
    if not names:
        raise ValueError(f"there is no {what}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two {what}s are called {repeated[0]!r}: give each a name of its own")
