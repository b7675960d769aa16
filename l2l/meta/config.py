"""What a meta-training run is told: the fields of ``l2l meta-train`` and of its YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from l2l.meta.objectives import make_objective
from l2l.meta.objectives.base import Objective
from l2l.meta.trajectory import TrajectoryConfig
from l2l.methods.base import check_counts, check_positive
from l2l.models.load import check_pattern


@dataclass(frozen=True)
class MetaTrainConfig:
    """Learn a tuner for a model over a pool of tasks."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, or a hub id."""
    tasks: list[str] | str = field(default_factory=list)
    """The pool: a list, or names separated by commas. Empty: the embedded pool, for ``l2l/tiny`` only."""
    validation_tasks: list[str] | str = field(default_factory=list)
    """Tasks outside the pool on which the tuner is judged and the best one kept. Empty: nothing is judged, the last tuner
    is kept; for the embedded pool, its own validation tasks."""
    out: str = "runs/meta-train"
    """Directory for the tuner and everything the run leaves. The same command again continues an interrupted run."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub."""
    steps: int = 1000
    """Outer steps, each on one batch of one task."""
    objective: str = "published"
    """What the tuner is trained for: a module of ``l2l.meta.objectives``."""
    objective_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments, e.g. ``{steps: 8}`` of ``unrolled``."""
    sampling: Literal["turn", "random"] = "turn"
    """Which task an outer step takes: ``turn``: each in turn; ``random``: drawn by ``task_weights``, under the seed."""
    task_weights: list[float] = field(default_factory=list)
    """How often each task of the pool is drawn, in the order of ``tasks``. Empty: all alike."""
    outer_optimizer: Literal["sgd", "adam"] = "sgd"
    """What moves the tuner's weights."""
    outer_lr: float = 0.1
    """Its learning rate."""
    lr: float = 1e-6
    """Learning rate of the zeroth-order step that the tuner is trained to make better."""
    epsilon: float = 1e-3
    """How far along the direction the loss is looked at."""
    batch_size: int = 16
    """Examples per step."""
    length_groups: int | None = None
    """Most forward passes that the rows of a batch are split into by length, so that little padding is fed. The loss is
    the same up to rounding. None: up to 6 on the CPU, 1 on other devices."""
    trajectory: Literal["teacher", "zo", "mixture"] = "teacher"
    """How the model moves meanwhile: ``teacher``: by first-order steps, as in the paper; ``zo``: by the deployed zeroth-order
    steps; ``mixture``: one or the other from restart to restart, drawn under the seed."""
    zo_share: float = 0.5
    """Share of the periods between restarts that a mixture gives to zeroth-order steps."""
    share_prompts: bool | None = None
    """Whether options of several tokens share one row with their prompt. None: where a probe of the model finds the
    numbers the same, up to rounding."""
    inner_lr: float = 1e-2
    """Learning rate of the first-order trajectory that the model follows meanwhile."""
    inner_momentum: float = 0.8
    """Its momentum."""
    inner_clip: float = 1.0
    """Limit on its gradient norm."""
    trajectory_gradient: Literal["shared", "own"] = "shared"
    """Where the trajectory's gradient is taken: ``shared``: behind the zeroth-order step, where the objective needs one
    anyway; ``own``: before it, as in the paper, for a forward and a backward pass more per outer step."""
    restart_every: int = 200
    """Outer steps until the model is put back to its initial weights."""
    restart_histories: bool = False
    """Whether what the tuner remembers of a task begins anew with the model, as at the start of a fine-tuning run, which is
    then taken to be as long as the task's steps in a period: for features that compare a run with its start."""
    validate_every: int = 250
    """Outer steps between validations."""
    validation_steps: int = 10
    """Zeroth-order steps from the initial weights, per validation task and learning rate, after which the loss is read.
    Ten are cheap and tell little: a hundred, where they can be afforded, judge more firmly."""
    validation_lrs: list[float] = field(default_factory=list)
    """Learning rates of these steps; on each task the best of them counts, so that a tuner which merely asks for another
    learning rate does not win. Empty, and no betas: ``lr`` and a third of it."""
    validation_step_fractions: list[float] = field(default_factory=list)
    """Values of beta for such steps at ``lr="auto"``, tried beside ``validation_lrs``."""
    architecture: str = "per_block_mlp"
    """Tuner network: a module of ``l2l.tuners``."""
    architecture_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments, e.g. ``{hidden: 64}``."""
    features: str = "paper"
    """What the tuner sees of each block: a name in :data:`l2l.tuners.features.FEATURE_SETS`."""
    normalizer: str = "energy"
    """What the common factor of sigma keeps constant: ``energy`` (MeZO's, as in the paper), ``curvature`` (measured on the
    pool before the first step) or ``none``."""
    basis: Literal["none", "gradients", "activations", "random"] = "none"
    """Where the tuner's basis comes from, a few input-side directions of each weight matrix: ``gradients`` of the pool's
    tasks, ``activations`` of linear layers (forward passes only), or ``random``, the control; see
    :mod:`l2l.meta.bases`. It is found before the first step and stays."""
    basis_rank: int = 8
    """Its directions per matrix; matrices of at most twice as many columns have none."""
    block_schedule: Literal["none", "role"] = "none"
    """Whether all blocks move at every step, or those of one role at a time (see :mod:`l2l.tuners.schedule`), drawn under the
    step's key, all roles alike. Goes with ``normaliser: curvature``."""
    embedding_rows_per_sample: float = 15.0
    """Rows of an embedding that one sample is expected to touch, for the normaliser."""
    normalise: bool = True
    """Whether sigma is normalised to the energy of MeZO's perturbation; ``normaliser: none`` has another word for no."""
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
    """Regular expression: parameters whose name it finds stay as they are, and the tuner has nothing to say of them."""
    dtype: str = "float32"
    """Dtype the weights are loaded in."""
    device: str | None = None
    """Torch device; None: the CPU."""
    revision: str | None = None
    """Revision of a hub model."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_pattern(self.freeze)
        check_positive(
            outer_lr=self.outer_lr,
            lr=self.lr,
            epsilon=self.epsilon,
            embedding_rows_per_sample=self.embedding_rows_per_sample,
            validation_lrs=min(self.validation_lrs, default=1.0),
            validation_step_fractions=min(self.validation_step_fractions, default=1.0),
        )
        self.travels()
        self._check_objective()
        if self.sampling not in ("turn", "random"):
            raise ValueError(f"sampling={self.sampling!r} must be 'turn' or 'random'")
        if self.task_weights and self.sampling != "random":
            raise ValueError("task_weights are given, but the tasks come in turn: set sampling to 'random'")
        if self.outer_optimizer not in ("sgd", "adam"):
            raise ValueError(f"outer_optimizer={self.outer_optimizer!r} must be 'sgd' or 'adam'")
        self._check_basis()
        check_counts(
            steps=self.steps,
            batch_size=self.batch_size,
            length_groups=1 if self.length_groups is None else self.length_groups,
            validate_every=self.validate_every,
            validation_steps=self.validation_steps,
            train_size=self.train_size,
            dev_size=self.dev_size,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            basis_rank=self.basis_rank,
        )

    def travels(self) -> TrajectoryConfig:
        """How the model moves meanwhile."""
        return TrajectoryConfig(
            self.inner_lr, self.inner_momentum, self.inner_clip, self.restart_every, self.trajectory, self.zo_share
        )

    def learns_by(self) -> Objective:
        """What the tuner is trained for.

        Raises:
            ValueError: there is no such objective, or it has no such arguments.
        """
        return make_objective(self.objective, **self.objective_args)

    def _check_objective(self) -> None:
        shares = self.trajectory != "zo" and self.trajectory_gradient == "shared"
        if shares and not self.learns_by().hands_gradients:
            raise ValueError(
                f"objective {self.objective!r} takes no backward pass whose gradient the trajectory could share: set "
                "trajectory to 'zo', or trajectory_gradient to 'own'"
            )
        self.learns_by()

    def _check_basis(self) -> None:
        if self.basis not in ("none", "gradients", "activations", "random"):
            raise ValueError(f"basis={self.basis!r} must be 'none', 'gradients', 'activations' or 'random'")
        if self.block_schedule not in ("none", "role"):
            raise ValueError(f"block_schedule={self.block_schedule!r} must be 'none' or 'role'")
        outputs = self.architecture_args.get("outputs", 2)
        if self.basis != "none" and outputs != 2:
            raise ValueError(
                f"architecture_args have outputs={outputs}, but a basis needs a sigma of its own: leave outputs out"
            )


def task_list(value: list[str] | str) -> list[str]:
    """Task names from a list or from names separated by commas."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else list(value)
