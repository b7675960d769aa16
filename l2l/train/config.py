"""The configuration of a fine-tuning run: the fields of ``l2l fine-tune`` and of its YAML, checked when it is made.

What a user leaves open (:data:`OPEN`) is decided in :meth:`FineTuneConfig.completed`: by the tuner's plan, else by constants.

Learning rate and epsilon default to values of the tuning scheme. Schemes train from 10^4 to 10^10 numbers of unlike size,
so their learning rates differ by a factor of 10^2 to 10^4: a rate of one scheme has no effect, or diverges, in another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, final

from l2l.arguments import Arguments
from l2l.bad_loss import Policy
from l2l.methods import default_lr, is_first_order
from l2l.methods.base import Estimator, check_counts, check_positive
from l2l.models.kinds import Head
from l2l.models.load import Quantize, check_pattern, check_quantize
from l2l.models.offload import check_offload
from l2l.models.prefix import check_train_layers
from l2l.models.schemes import Scheme, check_scheme
from l2l.optim import CurvatureLR, LearningRate, Schedule, check_lr, check_schedule
from l2l.train.objectives import LOSS, check_objective
from l2l.train.rewards import REWARD, check_named
from l2l.tuners.plan import TrainingPlan
from l2l.tuners.transfer import Level, check_level

PerturbMode: TypeAlias = Literal["auto", "in_place", "functional"]
Update: TypeAlias = Literal["auto", "master", "stochastic"]
Save: TypeAlias = Literal["log", "model", "both"]
PrefixMode: TypeAlias = Literal["auto", "off", "memory", "disk"]
Parallel: TypeAlias = Literal["data", "population"]


@dataclass(frozen=True)
class KnownValues:
    """Learning rate and epsilon of a scheme: defaults, and the ranges that were searched in publications."""

    lr: float
    epsilon: float
    lr_range: tuple[float, float]
    """For models of a billion parameters and more."""
    epsilon_range: tuple[float, float]
    scales_low: bool = False
    """Whether the lower end of ``lr_range`` grows, too, as the model gets smaller; the upper end always does."""


KNOWN: dict[str, KnownValues] = {
    "full": KnownValues(1e-6, 1e-3, (1e-7, 1e-6), (1e-3, 1e-3), scales_low=True),
    "lora": KnownValues(5e-5, 1e-2, (5e-5, 1e-4), (1e-2, 1e-2)),
    "prefix": KnownValues(1e-3, 1e-1, (1e-3, 1e-2), (1e-1, 1e-1)),
    "prompt": KnownValues(1e-4, 1e-2, (1e-6, 1e-4), (1e-4, 1e-2)),
    "ia3": KnownValues(1e-3, 1e-2, (1e-4, 1e-2), (1e-3, 1e-1)),
    "head": KnownValues(1e-5, 1e-3, (1e-6, 1e-4), (1e-3, 1e-2)),
}
"""By scheme. Ranges of full, lora and prefix: Malladi et al. 2023, arXiv:2305.17333; of prompt: Zhang et al. 2024,
arXiv:2402.11592. None is published for ia3 and head."""

BATCH_SIZE = 16
"""Examples per step, where neither the user nor a plan decides."""
STEPS = 2000
"""Steps of a run that neither passes nor seconds end."""
OPEN = (
    *("method", "method_args", "estimator", "num_directions", "lr", "epsilon", "batch_size", "schedule", "schedule_end"),
    "train_layers",
)
"""Fields that a tuner's plan decides where the user does not."""
OF_ANY_METHOD = ("batch_size", "train_layers")
"""Of these, those that a plan decides under another method than its own too: the others belong to its method."""
DEV_ROWS, TEST_ROWS, EVAL_EVERY = 200, 500, 500
"""Rows to evaluate on, and steps between evaluations, where the configuration leaves them open and the run is long enough."""
MARGIN = 30.0
"""Factor by which a value may lie outside the known range without a warning."""
_LARGE, _SMALL = 10**9, 10**6
"""Learning rates depend on a model's size between these numbers of parameters."""


def doubts(scheme: str, lr: LearningRate, epsilon: float, parameters: int) -> list[str]:
    """A line for each of ``lr`` and ``epsilon`` that lies further than :data:`MARGIN` outside the scheme's known range.

    Args:
        parameters: of the model, frozen ones included: small models need, and tolerate, larger learning rates.
    """
    known = KNOWN[scheme]
    size = _LARGE / min(max(parameters, _SMALL), _LARGE)
    ranges = [("epsilon", epsilon, known.epsilon_range)]
    if not isinstance(lr, str):
        low, high = known.lr_range
        ranges.append(("lr", lr, (low * size if known.scales_low else low, high * size)))
    found = []
    for name, value, (low, high) in ranges:
        if not low / MARGIN <= value <= high * MARGIN:
            where, what = ("below", "nothing may happen") if value < low else ("above", "the run may diverge")
            span = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
            found.append(f"{name}={value:g} lies far {where} what is known to work for scheme {scheme!r} here, {span}: {what}")
    return found


@dataclass(frozen=True)
class FineTuneConfig(Arguments):
    """Fine-tune a model on a task with forward passes only."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, a gguf file, or an id of the hub (of a gguf file ``owner/name/file.gguf``)."""
    task: str = "world_topic"
    """Name of a task; `l2l tasks list` shows them."""
    method: str | None = None
    """A name of `l2l methods list`, or a module that defines a method, by its name or the path of its file. ``a+b+c`` puts a
    around b around c: ``learned+lozo``, ``sparse+mezo``. Baselines: ``adamw`` and ``sgd`` by backpropagation, which need an
    ``lr`` of their own; ``zero_shot``, ``icl`` and ``linear_probe``, which take no steps. None: the method of the tuner's
    plan, else ``learned`` with a tuner and ``mezo`` without."""
    tuner: str | None = None
    """Directory, bundled name or hub id of a tuner. Where it has a plan (`l2l tuners show`), that decides what is left open of
    method, method_args, estimator, num_directions, lr, epsilon, batch_size, schedule, schedule_end and train_layers."""
    match: Level = "exact"
    """How alike the model must be to the tuner's own. ``exact``: names and shapes of all blocks, frozen ones included;
    ``shape``: these under other names, or parts of them; ``kind``: any, its blocks take the sigma of similar ones. A
    size-free tuner serves every model."""
    out: str = "runs/fine-tune"
    """Directory for the run's files. The same command again continues an interrupted run that would read the same."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub. Embedded tasks need neither."""
    steps: int | None = None
    """Most steps, each of two forward passes per direction; searches and curvature measurements need further ones. None:
    as many as ``max_passes`` and ``max_seconds`` allow, 2000 where neither is given."""
    max_passes: int | None = None
    """Stop after the step that spends this many forward passes: for comparisons at equal passes."""
    max_seconds: float | None = None
    """Stop after the step that spends this many seconds of training, evaluations apart: for comparisons at equal time."""
    lr: LearningRate | None = None
    """Learning rate; None: the method's where its steps have a length of their own (``rsgn``: 1), else the scheme's, 1e-6 for
    ``full`` and 5e-5 for ``lora``. Full fine-tuning of large models: 1e-7 to
    1e-6; the embedded model: 1e-4 to 1e-3. ``auto``: ``step_fraction`` divided by the mean curvature along the directions,
    which the batch's logits tell; for objectives other than the loss a third evaluation at some steps measures it."""
    step_fraction: float | None = None
    """Under ``lr: auto``, fraction of the step that would reach the minimum of the parabola fitted along the direction. None:
    half of the measured share of the signal; 0.1 for objectives other than the loss, of which no share is known."""
    curvature_every: int = 5
    """Under ``lr: auto``, steps between curvature measurements, a forward pass each; the first 5 steps all have one."""
    schedule: Schedule | None = None
    """Factor of the learning rate (under ``auto``, of ``step_fraction``) over the run: 1, or falling from 1 to
    ``schedule_end`` linearly or along half a cosine. Progress is that of steps, passes or seconds, whichever is furthest. None:
    ``constant``."""
    schedule_end: float | None = None
    """Factor at which ``linear`` and ``cosine`` end; None: 0."""
    epsilon: float | None = None
    """Length of the perturbation along the direction; None: the scheme's, 1e-3 for ``full`` and 1e-2 for ``lora``. In
    bfloat16 under ``lr: auto``, 1e-2: with less, rounding errors look like curvature."""
    estimator: Estimator | None = None
    """How losses become projected gradients. ``two_sided``: central differences, 2 N passes for N directions; ``one_sided``:
    all directions share one loss at theta, N + 1 passes. None: the method's own, two-sided for all that leave the choice."""
    num_directions: int | None = None
    """Directions per step, N, whose estimates are averaged; None: the method's own number, 1 for most."""
    batch_size: int | None = None
    """Examples per step; None: 16."""
    micro_batch: int | None = None
    """Most examples per forward pass, to bound memory; the loss is the same up to rounding. None: the whole batch."""
    reward: str | None = None
    """Maximise the mean of a function of sampled completions, ``package.module:function`` or ``./file.py:function``. It is
    called as TRL calls its reward functions, with prompts, completions and the further columns of the prompts' rows, by name,
    and returns a list of floats. It takes the place of ``task`` and ``objective``. See docs/rewards.md."""
    prompts: str | None = None
    """With ``reward``: a file of JSON lines, each with a ``prompt`` (a text, or a chat as a list of role and content) and any
    further fields, the same in all."""
    temperature: float = 1.0
    """With ``reward``: the logits of sampled tokens are divided by it; 0: the likeliest token."""
    eval_samples: int = 4
    """With ``reward``: completions of each prompt in an evaluation."""
    objective: str = "loss"
    """What training minimises. ``loss``: the task's; ``accuracy`` of the best scored option, ``f1`` or ``exact_match`` of
    generated answers: their negative; or ``package.module:function`` or ``./file.py:function``, called with (model, tokenizer,
    rows), which returns a float to minimise. All but ``loss`` have no gradient; the best step is then chosen by the objective
    on dev."""
    max_new_tokens: int = 50
    """Most tokens of a generated answer or a completion, in training and evaluation."""
    length_groups: int | None = None
    """Most forward passes into which the rows of a batch are split by length, which saves padding; the loss is the same up
    to rounding. None: up to 6 on the CPU, 1 on other devices."""
    share_prompts: bool | None = None
    """Whether options of several tokens share one row with their prompt, which feeds far fewer tokens. None: where a probe
    of the model finds the loss the same up to rounding."""
    compile: bool = False
    """Compile the decoder; the first steps take half a minute or more. On the CPU this needs a C++ compiler."""
    perturb: PerturbMode = "auto"
    """How weights are perturbed. ``in_place``: moved and moved back, which in half precision is inexact; ``functional``:
    transient copies, the stored weights are never touched; ``auto``: ``functional`` for half precision."""
    update: Update = "auto"
    """How half-precision weights keep small updates. ``master``: on a float32 copy; ``stochastic``: with stochastic
    rounding, no copy; ``auto``: ``master`` where memory allows. Float32 weights need neither."""
    sparse_embeddings: bool = False
    """Perturb and update only the embedding rows that the batch touches. Refused where embedding and head are tied."""
    weight_decay: float = 0.0
    """Decay of matrices: theta -= lr * weight_decay * theta."""
    on_bad_loss: str = "raise"
    """What becomes of a step whose loss is not finite, or explodes: ``raise`` ends the run; ``skip`` leaves the step out;
    ``clip`` bounds projected gradients by 10 times their running median, and skips what is not finite; ``rollback:N`` goes back
    to the weights of N steps before. Counted in metrics.csv and summary.json; see :mod:`l2l.bad_loss`."""
    seed: int = 0
    """Fixes data order and every direction."""
    train_size: int = 1000
    """Rows to train on."""
    dev_size: int | None = None
    """Rows, split off the train rows, by which the best step is chosen. None: 200, or as many as keep all evaluations within a
    third of the run, by the tokens that it feeds; at least 32."""
    test_size: int | None = None
    """Rows of the validation split to report on, and of the train rows. None: 500, or fewer, as with ``dev_size``."""
    eval_every: int | None = None
    """Steps between evaluations on dev. None: 500; a quarter of the steps expected in ``max_seconds`` where that is less."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between rows of metrics.csv and TensorBoard; steps.l2l has every step."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    loop: Literal["bare", "lightning"] = "bare"
    """Plain Python loop, or a Lightning trainer around the same steps. The losses are equal bit for bit."""
    method_args: dict[str, Any] | None = None
    """Further fields of the method, e.g. ``{interval: 100}`` for dizo or ``{num_directions: 4}``; of a composed method, by
    part: ``{lozo: {rank: 4}}``."""
    scheme: Scheme = "full"
    """What is trained: every weight, an adapter (``lora``, ``prefix``, ``prompt``, ``ia3``) beside a frozen base, or the
    output ``head`` alone."""
    scheme_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of peft's configuration of the scheme, e.g. ``{r: 16}`` for lora or ``{num_virtual_tokens: 20}``."""
    freeze: str | None = None
    """Regular expression: parameters in whose name it is found are not trained."""
    train_layers: str | int | list[int] | None = None
    """Layers to train, with what follows the last one (a norm, a head that is not tied): ``top:5``, ``top:1/3`` (rounded up),
    or their numbers from 0, ``25,26,29``; None: ``all``. An embedding, and a head that is tied to it, is then frozen. Adapters
    of ``lora`` and ``ia3`` are trained in these layers only. See docs/schemes.md."""
    prefix_cache: PrefixMode = "auto"
    """Where the hidden states below the lowest trained layer are kept, computed once per row: ``memory``, on the model's
    device; ``disk``, in a file of the run's directory; ``auto``: the first of memory, the host's memory and disk in which they
    take up to half of what is free, and no cache where layers cannot be left out; ``off``: every pass runs all layers."""
    stream_layers: bool = False
    """Leave the layers below those that are trained in the checkpoint's files: they are read one at a time to build the prefix
    cache, and are never in memory together. Needs ``train_layers``, and a directory of safetensors."""
    offload: bool = False
    """Keep the layers in the host's memory, for models larger than the device: each is on the device only while it computes,
    with the next one on its way, and takes its update when it comes again. Weights are then perturbed as copies (``perturb``:
    ``functional``), and the run is that of such a model in memory, bit for bit. Needs ``--device cuda``."""
    quantize: Quantize = "none"
    """Load the frozen base in 4 or 8 bits: ``bnb4``, ``bnb8`` or ``torchao-int8``. Adapters stay float32."""
    dtype: str = "float32"
    """Dtype the weights are loaded in."""
    device: str | None = None
    """Torch device; None: the CPU."""
    device_map: str | None = None
    """``auto`` and the like spread the layers over the available devices; needs ``accelerate``. Not beside ``device``."""
    revision: str | None = None
    """Revision of a hub model."""
    head: Head = "auto"
    """Kind of model to load: ``causal``, ``masked``, ``seq2seq`` or ``classifier``; ``auto``: what the checkpoint was saved
    from. A ``classifier`` gets a fresh head where the checkpoint has none, with a label for each option of the task."""
    attn_implementation: str | None = None
    """``eager``, ``sdpa``, … as transformers names them; None lets it choose."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. It can do whatever you can."""
    parallel: Parallel | None = None
    """How the processes that ``torchrun`` has started share a run. ``data``: each evaluates its part of every batch, in pieces
    of ``micro_batch`` (by default one for each), and they exchange the losses; ``population``: each evaluates some of the
    ``num_directions`` of a step on the whole batch, and late or dead ones are left out. None: ``data`` where there are several.
    Rank 0 writes. See docs/scale.md."""
    executor: Literal["local", "ray"] = "local"
    """Where the workers of a population are. ``ray``: processes of a Ray cluster, which evaluate all of it, while this process
    writes; ``local``: the ranks that ``torchrun`` starts, if there are any."""
    ray_address: str | None = None
    """Of the cluster: ``host:port`` on one of its machines, ``auto``, or ``ray://host:port`` from elsewhere; ``local``: one
    that is started on this machine. None: that of ``RAY_ADDRESS``, else ``local``. All machines need the same files."""
    workers: int = 2
    """Processes of the cluster, each with as many processors as this process has threads (``OMP_NUM_THREADS``), and with a GPU
    where ``device`` is one. One that is lost is replaced."""
    checksum_every: int = 100
    """Steps between comparisons of the weights of all processes, to the last bit."""
    rank_timeout: float | None = None
    """Seconds that another process is waited for. None: 1800 under ``data``, where the run then ends; 60 under ``population``,
    where rank 0 waits for a worker, whose directions are then left out; workers wait for rank 0 for 1800 at least."""
    save: Save = "both"
    """What the run leaves of the best weights: ``model``, written to ``out/model``; ``log``, the run log ``out/steps.l2l`` of
    some 20 bytes a step, from which `l2l replay` and ``l2l.load_model(base, log=...)`` rebuild them; or ``both``."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show progress bars: of each phase, and of the whole run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_named(self.reward, self.prompts, self.temperature):
            self._check_reward()
        check_scheme(self.scheme, self.scheme_args)
        check_pattern(self.freeze)
        check_quantize(self.quantize, self.scheme)
        Policy.parse(self.on_bad_loss)
        check_level(self.match)
        if self.tuner is None:  # no plan decides: config.yaml and summary.json record the values that are used
            for name, value in self._defaults({}).items():
                object.__setattr__(self, name, value)
        if isinstance(self.lr, str):
            check_lr(lr=self.lr)
        if self.steps is None and self.max_passes is None and self.max_seconds is None:
            object.__setattr__(self, "steps", STEPS)
        optional = {name: getattr(self, name) for name in ("epsilon", "step_fraction", "max_seconds", "rank_timeout")}
        optional["lr"] = None if isinstance(self.lr, str) else self.lr  # a schedule may pass through 0; at 0 nothing trains
        check_positive(**{name: value for name, value in optional.items() if value is not None})
        check_schedule(self.schedule or "constant", self.schedule_end or 0.0)
        check_train_layers(self.train_layers or "all")
        if self.train_layers not in (None, "all") and self.scheme in ("prefix", "prompt"):
            raise ValueError(f"scheme {self.scheme!r} trains what lies below all layers: leave train_layers out, or use lora")
        if self.stream_layers:
            self._check_streaming()
        if self.offload:
            self._check_offload()
        counts = "train_size checkpoint_every log_every curvature_every checksum_every workers"
        optional = ["length_groups", "steps", "max_passes", "num_directions", "batch_size", "dev_size", "test_size"]
        optional = [name for name in (*optional, "eval_every") if getattr(self, name) is not None]
        check_counts(**{name: getattr(self, name) for name in (*counts.split(), "max_new_tokens", "eval_samples", *optional)})
        if self.parallel == "data" and ":" in self.objective:
            raise ValueError(
                f"parallel='data' splits batches, and only a task's own objectives are known to be means over rows, not "
                f"{self.objective!r}: use --parallel population with a method of several directions"
            )
        objective = self.objective if self.reward is None else LOSS
        check_objective(objective, self.micro_batch, self.batch_size or BATCH_SIZE)

    def _check_reward(self) -> None:
        """Give task and objective the name of what takes their place; ValueError where a field does not go with a reward."""
        for option in (option for option in fields(FineTuneConfig) if option.name in ("task", "objective")):
            if (given := getattr(self, option.name)) not in (option.default, REWARD):
                raise ValueError(
                    f"{option.name}={given!r} does not go with a reward, which takes its place: leave one of them out"
                )
            object.__setattr__(self, option.name, REWARD)
        wanted = {"compile": (False,), "sparse_embeddings": (False,), "prefix_cache": ("auto", "off")}
        for name, values in wanted.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with a reward, whose texts are sampled: leave it out"
                )
        if self.method is not None and is_first_order(self.method):
            raise ValueError(
                f"method {self.method!r} needs the gradient of what it minimises, and a reward has none: take a method of "
                "forward passes, such as mezo or es"
            )
        if self.lr == "auto":
            raise ValueError(
                "lr='auto' measures the curvature of a loss, and the reward of sampled texts is flat but for jumps where a "
                "token changes: give lr as a number"
            )

    def _defaults(self, planned: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the open fields: planned, or constants; the method's own estimator and directions have no name."""
        method = self.method or planned.get("method") or ("mezo" if self.tuner is None else "learned")
        if self.lr is None and "lr" not in planned and is_first_order(method):
            raise ValueError(f"method {method!r} takes a learning rate of its own size, and lr is not given: try 1e-5")
        known = KNOWN[self.scheme]
        constants = {"method": method, "method_args": {}, "lr": default_lr(method) or known.lr, "epsilon": known.epsilon}
        constants |= {"batch_size": BATCH_SIZE, "schedule": "constant", "schedule_end": 0.0, "train_layers": "all"}
        return {name: value for name, value in (constants | dict(planned)).items() if getattr(self, name) is None}

    def completed(self, planned: Mapping[str, Any] = MappingProxyType({})) -> "CompleteConfig":
        """The configuration with every open field decided: by ``planned`` (see :meth:`open_to`), else by constants."""
        return CompleteConfig(**vars(self) | self._defaults(planned))

    def open_to(self, plan: TrainingPlan) -> dict[str, Any]:
        """What a tuner's plan decides, ``train_layers`` at budget 0; nothing under schemes, for which no plan is made."""
        if self.scheme != "full":
            return {}
        own = self.method in (None, plan.method)
        layers = plan.train_layers(0) if self.train_layers is None else self.train_layers
        values = plan.options_at(layers) | {"train_layers": layers}
        names = [name for name in (OPEN if own else OF_ANY_METHOD) if getattr(self, name) is None]
        return {name: values[name] for name in names if name in values}

    def _check_offload(self) -> None:
        """Raise ValueError where layers cannot lie in the host's memory, or need not."""
        check_offload(self.device)
        wanted = {"quantize": ("none",), "device_map": (None,), "stream_layers": (False,), "compile": (False,)}
        for name, values in (wanted | {"perturb": ("auto", "functional")}).items():
            if getattr(self, name) not in values:
                raise ValueError(f"offload does not go with {name}={getattr(self, name)!r}: leave one of them out")

    def _check_streaming(self) -> None:
        """Raise ValueError where the lower layers would be needed in memory."""
        wanted = {"scheme": "full", "quantize": "none", "device_map": None, "compile": False, "share_prompts": None}
        for name, value in wanted.items():
            if getattr(self, name) not in (value, False):
                raise ValueError(f"stream_layers does not go with {name}={getattr(self, name)!r}: leave one of them out")
        if self.train_layers == "all" or self.prefix_cache == "off":
            raise ValueError(
                "stream_layers leaves layers out of memory whose hidden states are kept: set train_layers (top:5), and leave "
                "prefix_cache on"
            )
        if self.objective not in ("loss", "accuracy"):
            raise ValueError(f"stream_layers cannot run all layers, as objective {self.objective!r} may: leave it off")

    def curvature_lr(self) -> CurvatureLR | None:
        """The controller of the step size where the learning rate is ``auto``, else None."""
        return CurvatureLR(self.step_fraction, every=self.curvature_every) if self.lr == "auto" else None


@final
@dataclass(frozen=True)
class CompleteConfig(FineTuneConfig):
    """A configuration without open fields: what a run reads and records. Made by :meth:`FineTuneConfig.completed`."""

    method: str = ""
    lr: LearningRate = "auto"
    schedule: Schedule = "constant"
    schedule_end: float = 0.0
    epsilon: float = 0.0
    batch_size: int = 0
    method_args: dict[str, Any] = field(default_factory=dict)
    train_layers: str | int | list[int] = ""
