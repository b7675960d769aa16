"""What a fine-tuning run is told: the fields of ``l2l fine-tune`` and of its YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from l2l.finetune.control import LearningRate, Schedule, StepControl, check_lr, check_schedule
from l2l.methods.base import check_counts, check_positive

Walk: TypeAlias = Literal["auto", "in_place", "exact"]
Update: TypeAlias = Literal["auto", "master", "stochastic"]


@dataclass(frozen=True)
class FineTuneConfig:
    """Fine-tune a model on a task with forward passes only."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, or a hub id."""
    task: str = "world_topic"
    """Name of a task; `l2l tasks list` shows them."""
    method: str = "mezo"
    """``mezo``, ``dizo``, ``learned``, or the path of a module that defines a method."""
    tuner: str | None = None
    """Directory, bundled name or hub id of the tuner that ``learned`` needs."""
    out: str = "runs/fine-tune"
    """Directory for everything the run leaves. The same command again continues an interrupted run."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub. Embedded tasks need neither."""
    steps: int = 2000
    """Steps to do; two forward passes each and draw, searches and third losses apart."""
    max_passes: int | None = None
    """Stop when this many forward passes are spent, however many steps that was: for comparisons at equal passes."""
    lr: LearningRate = 1e-6
    """Learning rate. Full fine-tuning of large models: 1e-7 to 1e-6; the embedded model: 1e-4 to 1e-3. ``auto``: beta over
    the mean curvature along the directions, which a third loss at some steps shows."""
    beta: float = 0.1
    """Under ``lr: auto``, the share to go of the step to the bottom of the parabola seen. Begin with 0.1 or 0.2, whatever
    the model, task and method."""
    control_every: int = 5
    """Under ``lr: auto``, steps from one third loss to the next, a forward pass each; the first 5 steps all have one."""
    schedule: Schedule = "constant"
    """What multiplies the learning rate (under ``auto``, beta) over the run: 1, or from 1 to ``schedule_end`` along a
    line or half a cosine. The run's share is that of its steps or of its passes, whichever is further."""
    schedule_end: float = 0.0
    """Where ``linear`` and ``cosine`` end, as a share of the learning rate."""
    epsilon: float = 1e-3
    """How far along the direction the loss is looked at. In bfloat16 under ``lr: auto``, 1e-2: closer, rounding passes for
    curvature."""
    batch_size: int = 16
    """Examples per step."""
    length_groups: int | None = None
    """Most forward passes that the rows of a batch are split into by length, so that little padding is fed. The batches
    stay the same, the loss too, up to rounding. None: up to 6 on the CPU, 1 on other devices."""
    share_prompts: bool | None = None
    """Whether options of several tokens share one row with their prompt, which feeds far fewer tokens. The loss is the
    same up to rounding. None: where a probe of the model finds that this is so."""
    compile: bool = False
    """Compile the decoder with torch.compile. The first steps take half a minute or more; on the CPU a C++ compiler is
    needed."""
    walk: Walk = "auto"
    """How perturbed weights are made. ``in_place``: the weights are moved and moved back, which in half precision is
    inexact; ``exact``: transient copies, the stored weights are never touched; ``auto``: ``exact`` for half precision."""
    update: Update = "auto"
    """How half-precision weights are updated, so that small updates are not lost. ``master``: on a float32 copy;
    ``stochastic``: with stochastic rounding, no copy; ``auto``: ``master`` where memory allows. Float32 weights need
    neither."""
    sparse_embeddings: bool = False
    """Perturb and update only the embedding rows that the batch touches. Refused where the embedding is tied to the
    head, whose logits read every row."""
    weight_decay: float = 0.0
    """Decay of matrices: theta -= lr * weight_decay * theta."""
    seed: int = 0
    """Fixes data order and every direction."""
    train_size: int = 1000
    """Rows to train on."""
    dev_size: int = 200
    """Rows, split off the train rows, by which the best step is chosen."""
    test_size: int = 500
    """Rows of the validation split to report on."""
    eval_every: int = 500
    """Steps between evaluations on dev."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between rows of metrics.csv and TensorBoard; steps.jsonl has every step."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    loop: Literal["bare", "lightning"] = "bare"
    """Who runs the loop: plain Python, or a Lightning trainer. The losses are the same, bit for bit."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method, e.g. ``{interval: 100}`` for dizo or ``{draws: 4}``."""
    dtype: str = "float32"
    """Dtype the weights are loaded in."""
    device: str | None = None
    """Torch device; None: the CPU."""
    revision: str | None = None
    """Revision of a hub model."""
    save_model: bool = True
    """Write the best model to ``out/model``."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_lr(lr=self.lr)
        check_positive(epsilon=self.epsilon, beta=self.beta)
        check_schedule(self.schedule, self.schedule_end)
        _check_choice("walk", self.walk, get_args(Walk))
        _check_choice("update", self.update, get_args(Update))
        check_counts(
            steps=self.steps,
            batch_size=self.batch_size,
            train_size=self.train_size,
            dev_size=self.dev_size,
            test_size=self.test_size,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            control_every=self.control_every,
            length_groups=1 if self.length_groups is None else self.length_groups,
            max_passes=1 if self.max_passes is None else self.max_passes,
        )

    def control(self) -> StepControl | None:
        """Step control where the learning rate is ``auto``."""
        return StepControl(self.beta, self.control_every) if self.lr == "auto" else None


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
