"""Learning rate and epsilon by tuning scheme: what a run takes where it is told none, and what it is warned about.

The schemes differ by a factor of 10^2 to 10^4, because they train from 10^4 to 10^10 numbers of unlike size: what is right
for one is without effect, or diverges, in another. Ranges are those that were searched for full, lora and prefix by Malladi
et al. 2023, arXiv:2305.17333, and for prompt by Zhang et al. 2024, arXiv:2402.11592. For ia3 and head none is published.

What a fine-tuning run is told: the fields of ``l2l fine-tune`` and of its YAML.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from l2l.methods import is_first_order
from l2l.methods.base import check_counts, check_positive
from l2l.models.kinds import Head
from l2l.models.load import Quantize, check_pattern, check_quantize
from l2l.models.schemes import Scheme, check_scheme
from l2l.optim import CurvatureLR, LearningRate, Schedule, check_lr, check_schedule
from l2l.train.objectives import check_objective
from l2l.tuners.transfer import Level, check_level

logger = logging.getLogger(__name__)

MARGIN = 30.0
"""How far outside the known range a value may lie before it is warned about."""
_LARGE, _SMALL = 10**9, 10**6
"""Parameters of a model from which on, and down to which, learning rates depend on its size."""


@dataclass(frozen=True)
class Known:
    """What is known to work for a scheme."""

    lr: float
    epsilon: float
    lr_range: tuple[float, float]
    """For models of a billion parameters and more."""
    epsilon_range: tuple[float, float]
    grows: bool = False
    """Whether the lower end grows too as the model gets smaller; the upper end always does."""


KNOWN: dict[str, Known] = {
    "full": Known(1e-6, 1e-3, (1e-7, 1e-6), (1e-3, 1e-3), grows=True),
    "lora": Known(5e-5, 1e-2, (5e-5, 1e-4), (1e-2, 1e-2)),
    "prefix": Known(1e-3, 1e-1, (1e-3, 1e-2), (1e-1, 1e-1)),
    "prompt": Known(1e-4, 1e-2, (1e-6, 1e-4), (1e-4, 1e-2)),
    "ia3": Known(1e-3, 1e-2, (1e-4, 1e-2), (1e-3, 1e-1)),
    "head": Known(1e-5, 1e-3, (1e-6, 1e-4), (1e-3, 1e-2)),
}
"""Scheme -> what is known."""


def resolve(scheme: str, lr: LearningRate | None, epsilon: float | None) -> tuple[LearningRate, float]:
    """Learning rate and epsilon as given, or where they are None as the scheme has them."""
    known = KNOWN[scheme]
    return known.lr if lr is None else lr, known.epsilon if epsilon is None else epsilon


def doubts(scheme: str, lr: LearningRate, epsilon: float, parameters: int) -> list[str]:
    """What speaks against these values, a line each; empty where they lie within :data:`MARGIN` of the known range.

    Args:
        parameters: of the model, frozen ones included: small models need, and bear, larger learning rates.
    """
    known = KNOWN[scheme]
    size = _LARGE / min(max(parameters, _SMALL), _LARGE)
    low, high = known.lr_range
    found = [_doubt(scheme, "epsilon", epsilon, known.epsilon_range)]
    if not isinstance(lr, str):
        found.append(_doubt(scheme, "lr", lr, (low * size if known.grows else low, high * size)))
    return [line for line in found if line]


def _doubt(scheme: str, name: str, value: float, known: tuple[float, float]) -> str:
    low, high = known
    if low / MARGIN <= value <= high * MARGIN:
        return ""
    where, what = ("below", "nothing may happen") if value < low else ("above", "the run may diverge")
    span = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
    return f"{name}={value:g} lies far {where} what is known to work for scheme {scheme!r} here, {span}: {what}"


def warn(scheme: str, lr: LearningRate, epsilon: float, parameters: int) -> None:
    """Log :func:`doubts` as warnings."""
    for line in doubts(scheme, lr, epsilon, parameters):
        logger.warning("%s", line)


PerturbMode: TypeAlias = Literal["auto", "in_place", "functional"]
Update: TypeAlias = Literal["auto", "master", "stochastic"]


@dataclass(frozen=True)
class FineTuneConfig:
    """Fine-tune a model on a task with forward passes only."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, or a hub id."""
    task: str = "world_topic"
    """Name of a task; `l2l tasks list` shows them."""
    method: str = "mezo"
    """A name of `l2l methods list`, or the path of a module that defines a method. ``a+b+c`` puts a around b around c:
    ``learned+lozo``, ``sparse+mezo``. Baselines: ``adamw`` and ``sgd``, by backpropagation, which take a learning rate of
    their own size; ``zero_shot``, ``icl`` and ``linear_probe``, which take no steps."""
    tuner: str | None = None
    """Directory, bundled name or hub id of the tuner that ``learned`` needs."""
    match: Level = "exact"
    """How alike the model must be to the tuner's own. ``exact``: names and shapes of all blocks, frozen ones included;
    ``shape``: these under other names, or parts of them; ``kind``: any, its blocks take the sigma of similar ones. A
    size-free tuner serves every model."""
    out: str = "runs/fine-tune"
    """Directory for everything the run leaves. The same command again continues an interrupted run."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub. Embedded tasks need neither."""
    steps: int = 2000
    """Steps to do; two forward passes each and draw, searches and third losses apart."""
    max_passes: int | None = None
    """Stop when this many forward passes are spent, however many steps that was: for comparisons at equal passes."""
    max_seconds: float | None = None
    """Stop when this many seconds of training are spent, evaluations apart: for comparisons at equal time."""
    lr: LearningRate | None = None
    """Learning rate; None: the scheme's, 1e-6 for ``full`` and 5e-5 for ``lora``. Full fine-tuning of large models: 1e-7 to
    1e-6; the embedded model: 1e-4 to 1e-3. ``auto``: beta over the mean curvature along the directions, which a third loss
    at some steps shows."""
    step_fraction: float = 0.1
    """Under ``lr: auto``, the share to go of the step to the bottom of the parabola seen. Begin with 0.1 or 0.2, whatever
    the model, task and method."""
    curvature_every: int = 5
    """Under ``lr: auto``, steps from one third loss to the next, a forward pass each; the first 5 steps all have one."""
    schedule: Schedule = "constant"
    """What multiplies the learning rate (under ``auto``, beta) over the run: 1, or from 1 to ``schedule_end`` along a
    line or half a cosine. The run's share is that of its steps or of its passes, whichever is further."""
    schedule_end: float = 0.0
    """Where ``linear`` and ``cosine`` end, as a share of the learning rate."""
    epsilon: float | None = None
    """How far along the direction the loss is looked at; None: the scheme's, 1e-3 for ``full`` and 1e-2 for ``lora``. In
    bfloat16 under ``lr: auto``, 1e-2: closer, rounding passes for curvature."""
    batch_size: int = 16
    """Examples per step."""
    micro_batch: int | None = None
    """Most examples whose loss is computed at once: the memory of so many, the loss of the whole batch up to rounding.
    None: the whole batch."""
    objective: str = "loss"
    """What training minimises. ``loss``: the task's; ``accuracy`` of the best scored option, ``f1`` or ``exact_match`` of
    generated answers: their negative; or ``package.module:function``, which is called with (model, tokenizer, rows) and
    gives a float to minimise. None but ``loss`` has a gradient; the best step is then chosen by the objective on dev."""
    max_new_tokens: int = 50
    """Most tokens that are generated for an answer, in training and evaluation."""
    length_groups: int | None = None
    """Most forward passes that the rows of a batch are split into by length, so that little padding is fed. The batches
    stay the same, the loss too, up to rounding. None: up to 6 on the CPU, 1 on other devices."""
    share_prompts: bool | None = None
    """Whether options of several tokens share one row with their prompt, which feeds far fewer tokens. The loss is the
    same up to rounding. None: where a probe of the model finds that this is so."""
    compile: bool = False
    """Compile the decoder with torch.compile. The first steps take half a minute or more; on the CPU a C++ compiler is
    needed."""
    perturb: PerturbMode = "auto"
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
    """Further fields of the method, e.g. ``{interval: 100}`` for dizo or ``{draws: 4}``; of one put together, by part:
    ``{lozo: {rank: 4}}``."""
    scheme: Scheme = "full"
    """What is trained: every weight, an adapter (``lora``, ``prefix``, ``prompt``, ``ia3``) beside a frozen base, or the
    output ``head`` alone."""
    scheme_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of peft's configuration of the scheme, e.g. ``{r: 16}`` for lora or ``{num_virtual_tokens: 20}``."""
    freeze: str | None = None
    """Regular expression: parameters whose name it finds stay as they are."""
    quantize: Quantize = "none"
    """Load the frozen base in 4 or 8 bits: ``bnb4``, ``bnb8`` or ``torchao-int8``. Adapters stay float32."""
    dtype: str = "float32"
    """Dtype the weights are loaded in."""
    device: str | None = None
    """Torch device; None: the CPU."""
    device_map: str | None = None
    """``auto`` and the like spread the layers over the devices there are; needs ``accelerate``. Not beside ``device``."""
    revision: str | None = None
    """Revision of a hub model."""
    head: Head = "auto"
    """Kind of model to load: ``causal``, ``masked``, ``seq2seq`` or ``classifier``; ``auto``: what the checkpoint was saved
    from. A ``classifier`` gets a fresh head where the checkpoint has none, with a label for each option of the task."""
    attn_implementation: str | None = None
    """``eager``, ``sdpa``, … as transformers names them; None lets it choose."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. It can do whatever you can."""
    save_model: bool = True
    """Write the best model to ``out/model``."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_scheme(self.scheme, self.scheme_args)
        check_pattern(self.freeze)
        check_quantize(self.quantize, self.scheme)
        check_level(self.match)
        if self.lr is None and is_first_order(self.method):
            raise ValueError(
                f"method {self.method!r} takes a learning rate of its own size, and lr is not given: try 1e-5"
            )
        lr, epsilon = resolve(self.scheme, self.lr, self.epsilon)
        object.__setattr__(self, "lr", lr)  # what is recorded is what runs
        object.__setattr__(self, "epsilon", epsilon)
        check_lr(lr=lr)
        check_positive(epsilon=epsilon, step_fraction=self.step_fraction)
        check_positive(max_seconds=1.0 if self.max_seconds is None else self.max_seconds)
        check_schedule(self.schedule, self.schedule_end)
        _check_choice("perturb", self.perturb, get_args(PerturbMode))
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
            curvature_every=self.curvature_every,
            length_groups=1 if self.length_groups is None else self.length_groups,
            max_passes=1 if self.max_passes is None else self.max_passes,
            max_new_tokens=self.max_new_tokens,
        )
        check_objective(self.objective, self.micro_batch, self.batch_size)

    def loading(self) -> dict[str, Any]:
        """What :func:`l2l.load_model` is told besides the name."""
        names = (
            "dtype",
            "device",
            "device_map",
            "revision",
            "head",
            "attn_implementation",
            "trust_remote_code",
            "seed",
        )
        return {name: getattr(self, name) for name in (*names, "quantize")}

    def curvature_lr(self) -> CurvatureLR | None:
        """Step control where the learning rate is ``auto``."""
        return CurvatureLR(self.step_fraction, self.curvature_every) if self.lr == "auto" else None


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
