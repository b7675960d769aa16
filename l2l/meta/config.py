"""Configuration of meta-training: the fields of ``l2l meta-train`` and of its YAML."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from l2l.aliases import renamed
from l2l.arguments import Arguments
from l2l.meta.objectives import make_objective
from l2l.meta.pool import check_weights
from l2l.meta.state import Objective, PopulationObjective
from l2l.methods.base import check_counts, check_positive
from l2l.models.load import EMBEDDED, check_pattern
from l2l.models.prefix import check_train_layers
from l2l.tasks import get_task
from l2l.tasks.tiny_world import POOL, VALIDATION
from l2l.tuners import NORMALIZERS, EnergyNormalizer, feature_set

_KINDS = 2
"""Sets the random stream of a mixture's periods apart from those of batches and tasks."""
COUNTS = (
    "steps batch_size validate_every validation_steps restart_every train_size dev_size checkpoint_every log_every basis_rank "
    "processes"
)
"""Fields that are whole numbers, at least 1."""
POSITIVE = ("outer_lr", "lr", "epsilon", "embedding_rows_per_sample", "inner_lr", "inner_clip")


INITIAL, THETA, MEASURED = (f"{name}.safetensors" for name in ("initial", "theta", "measured"))
"""While a run is not finished: the model's initial weights; those at the last validation; and basis and normalizer, so that a
resumed run is the same to the last bit wherever it resumes."""


@dataclass(frozen=True)
class MetaTrainConfig(Arguments):
    """Learn a tuner for a model over a pool of tasks."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, a gguf file, or an id of the hub (of a gguf file ``owner/name/file.gguf``)."""
    tasks: list[str] | str = field(default_factory=list)
    """The pool: a list, or names separated by commas. Empty: the embedded pool, for ``l2l/tiny`` only."""
    validation_tasks: list[str] | str = field(default_factory=list)
    """Tasks outside the pool that choose the best tuner. Empty: the last is kept; for the embedded pool, its own ones."""
    out: str = "runs/meta-train"
    """Directory of the tuner and of the run's files. The same command again continues an interrupted run."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub."""
    steps: int = 1000
    """Outer steps, each on one batch of one task."""
    objective: str = "one_step_loss"
    """What the tuner is trained for: a name in :data:`l2l.meta.objectives.OBJECTIVES`, or a module that defines one."""
    objective_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments, e.g. ``{steps: 8}`` of ``unrolled_loss``."""
    sampling: Literal["turn", "random"] = "turn"
    """Which task an outer step takes: ``turn``: each in turn; ``random``: sampled by ``task_weights``, under the seed."""
    task_weights: list[float] = field(default_factory=list)
    """Relative frequency of each task of the pool, in the order of ``tasks``. Empty: all alike."""
    outer_optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of the tuner's weights."""
    outer_lr: float = 0.1
    """Its learning rate."""
    lr: float = 1e-6
    """Learning rate of the zeroth-order step that the tuner is trained to make better."""
    epsilon: float = 1e-3
    """Distance along the direction at which the loss is evaluated."""
    batch_size: int = 16
    """Examples per step."""
    length_groups: int | None = None
    """Most forward passes that a batch is split into by the length of its rows, to save padding. The loss is the same up to
    rounding. None: up to 6 on the CPU, 1 on other devices."""
    trajectory: Literal["teacher", "zo", "mixture"] = "teacher"
    """How the model moves while the tuner learns: ``teacher``: first-order steps, as in the paper; ``zo``: the zeroth-order
    steps of fine-tuning; ``mixture``: one of the two per period between restarts, sampled under the seed."""
    zo_share: float = 0.5
    """Share of a mixture's periods that are zeroth-order."""
    share_prompts: bool | None = None
    """Whether options of several tokens share one row with their prompt. None: where a probe finds no difference."""
    inner_lr: float = 1e-2
    """Learning rate of the first-order trajectory, which falls linearly to zero from each restart to the next."""
    inner_momentum: float = 0.8
    """Its momentum."""
    inner_clip: float = 1.0
    """Limit on its gradient norm, applied to the velocity as clip / (1 - momentum)."""
    trajectory_gradient: Literal["shared", "own"] = "shared"
    """Where the trajectory's gradient is taken: ``shared``: after the zeroth-order step, where the objective needs one
    anyway; ``own``: before it, as in the paper, for one more forward and backward pass per outer step."""
    restart_every: int = 200
    """Outer steps until the model is put back to its initial weights."""
    restart_histories: bool = False
    """Whether a task's run statistics start anew with the model, as in a fine-tuning run of as many steps as the task has in
    a period: for features that compare a run with its start."""
    validate_every: int = 250
    """Outer steps between validations."""
    validation_steps: int = 10
    """Zeroth-order steps from the initial weights, per validation task and learning rate. Ten are noisy, a hundred better."""
    validation_lrs: list[float] = field(default_factory=list)
    """Learning rates of these steps; on each task the best counts. Empty, and no step fractions: ``lr`` and a third of it."""
    validation_step_fractions: list[float] = field(default_factory=list)
    """Step fractions of further such runs at ``lr="auto"``."""
    architecture: str = "per_block_mlp"
    """Tuner network: a module of ``l2l.tuners``."""
    architecture_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments, e.g. ``{hidden: 64}``."""
    features: str = "paper"
    """Inputs of the tuner for each block: a name in :data:`l2l.tuners.features.FEATURE_SETS`."""
    normalizer: str = "energy"
    """What the common factor of sigma keeps constant: ``energy`` (that of MeZO's perturbation, as in the paper), ``curvature``
    (measured on the pool before the first step) or ``none``."""
    basis: Literal["none", "gradients", "activations", "random"] = "none"
    """Source of the tuner's basis, a few input-side directions of each weight matrix: ``gradients`` of the pool's tasks,
    ``activations`` of linear layers (forward passes only), or ``random``, the control; see :mod:`l2l.meta.bases`. It is
    computed before the first step and fixed."""
    basis_rank: int = 8
    """Directions per matrix; matrices of at most twice as many columns have no basis."""
    block_schedule: Literal["none", "role"] = "none"
    """Whether all blocks move at every step, or those of one role (see :mod:`l2l.tuners.schedule`), sampled uniformly under
    the step's key. Goes with ``normalizer: curvature``."""
    embedding_rows_per_sample: float = 15.0
    """Rows of an embedding that one sample is expected to look up, for the normalizer."""
    normalise: bool = True
    """Whether ``normalizer: energy`` normalises sigma. False is the same as ``normalizer: none``."""
    seed: int = 0
    """Fixes initialisation, data order and every direction."""
    train_size: int = 1000
    """Rows per task to train on."""
    dev_size: int = 64
    """Rows per task to validate on."""
    checkpoint_every: int = 250
    """Outer steps between checkpoints."""
    log_every: int = 10
    """Outer steps between rows of metrics.csv and TensorBoard."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    freeze: str | None = None
    """Regular expression: parameters whose name it finds are not trained and are no blocks of the tuner."""
    train_layers: str | int | list[int] = "all"
    """Layers to train, as ``l2l fine-tune`` takes them; sigma of blocks outside of them stays what it is at the start."""
    dtype: str = "float32"
    """Dtype the weights are loaded in."""
    device: str | None = None
    """Torch device; None: the CPU."""
    revision: str | None = None
    """Revision of a hub model."""
    processes: int = 1
    """Members of a population that are evaluated at a time, each by a process with as many threads as this one
    (``OMP_NUM_THREADS``). 1: by this process. For the objectives ``evolution`` and ``es_full_run``."""
    executor: Literal["local", "ray"] = "local"
    """Where these processes are: on this machine, or in a Ray cluster that sees the same files, ``out`` among them."""
    ray_address: str | None = None
    """Of the cluster: ``host:port`` on one of its machines, ``auto``, or ``ray://host:port`` from elsewhere; ``local``: one
    that is started on this machine. None: that of ``RAY_ADDRESS``, else ``local``."""
    overwrite: bool = False
    """Remove the files of an earlier run in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "objective", renamed({"objective": self.objective}, ("objective",))["objective"])
        check_pattern(self.freeze)
        check_train_layers(self.train_layers)
        check_positive(**{name: getattr(self, name) for name in POSITIVE})
        for name in ("validation_lrs", "validation_step_fractions"):
            check_positive(**{name: min(getattr(self, name), default=1.0)})
        if not 0 <= self.zo_share <= 1:
            raise ValueError(f"zo_share={self.zo_share} must lie between 0 and 1")
        if not 0 <= self.inner_momentum < 1:
            raise ValueError(f"inner_momentum={self.inner_momentum} must be at least 0 and below 1")
        shares = self.trajectory != "zo" and self.trajectory_gradient == "shared"
        if not self.make_objective().hands_gradients and shares:
            raise ValueError(
                f"objective {self.objective!r} takes no backward pass whose gradient the trajectory could share: set "
                "trajectory to 'zo', or trajectory_gradient to 'own'"
            )
        if self.task_weights and self.sampling != "random":
            raise ValueError("task_weights are given, but the tasks come in turn: set sampling to 'random'")
        outputs = self.architecture_args.get("outputs", 2)
        if self.basis != "none" and outputs != 2:
            raise ValueError(
                f"architecture_args have outputs={outputs}, but a basis needs a sigma of its own: leave outputs out"
            )
        check_counts(**{name: getattr(self, name) for name in COUNTS.split()})
        if self.shared and not isinstance(self.make_objective(), PopulationObjective):
            raise ValueError(
                f"objective {self.objective!r} has no members that several processes could evaluate: use evolution or "
                "es_full_run, or leave processes and executor out"
            )
        check_counts(length_groups=1 if self.length_groups is None else self.length_groups)

    @property
    def shared(self) -> bool:
        """Whether other processes evaluate the members of a population."""
        return self.executor == "ray" or self.processes > 1

    def inner_lr_at(self, step: int) -> float:
        """First-order learning rate at outer step ``step``: from ``inner_lr`` linearly to 0 within each period."""
        return self.inner_lr * (1 - (step % self.restart_every) / self.restart_every)

    def zeroth_order(self, step: int) -> bool:
        """Whether outer step ``step`` moves the model by the zeroth-order step: the same throughout a period."""
        if self.trajectory != "mixture":
            return self.trajectory == "zo"
        return np.random.default_rng((self.seed, step // self.restart_every, _KINDS)).random() < self.zo_share

    def make_objective(self) -> Objective:
        """The objective of the tuner; see :func:`l2l.meta.objectives.make_objective`."""
        return make_objective(self.objective, **self.objective_args)


def task_list(value: list[str] | str) -> list[str]:
    """Task names from a list or from names separated by commas."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else list(value)


def with_defaults(config: MetaTrainConfig) -> MetaTrainConfig:
    """The configuration with its pool spelled out, checked as far as it can be before anything is loaded: ValueError where
    there is no pool, an unknown task, features or normalizer, or a validation task inside the pool."""
    tasks, validation = task_list(config.tasks), task_list(config.validation_tasks)
    if config.normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={config.normalizer!r} must be one of {', '.join(NORMALIZERS)}")
    if config.normalizer != EnergyNormalizer.name and not config.normalise:
        raise ValueError(f"normalise is off, but normalizer is {config.normalizer!r}: leave one of them out")
    feature_set(config.features)
    if not tasks and config.model != EMBEDDED:
        raise ValueError("tasks is empty: name the pool's tasks, e.g. --tasks rte,boolq,copa")
    if not tasks:
        tasks, validation = list(POOL), validation or list(VALIDATION)
    both = sorted(set(tasks) & set(validation))
    if both:
        raise ValueError(f"task {both[0]!r} is in the pool and in validation_tasks: a tuner is judged on other tasks")
    if config.task_weights and len(check_weights(config.task_weights)) != len(tasks):
        raise ValueError(f"task_weights has {len(config.task_weights)} values for {len(tasks)} tasks: give one for each")
    for name in (*tasks, *validation):
        get_task(name)
    return replace(config, tasks=tasks, validation_tasks=validation)
