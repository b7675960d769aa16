"""Zeroth-order steps in transformers' ``Trainer``: :class:`ZOTrainer`, and :class:`ZOTrainerMixin` for other trainers.

The loop stays transformers': data, callbacks, logs, evaluation, checkpoints, resuming and schedules are its own. Replaced are
``create_optimizer``, which makes a :class:`l2l.optim.ZOOptimizer`, and ``training_step``, which takes a step of it on the
batches of one accumulation. The loss is what ``compute_loss`` gives, so trainers and models with a loss of their own keep it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from logging import getLogger
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from l2l.bad_loss import Policy
from l2l.estimators import Closure, MicroBatched
from l2l.methods.base import Estimator, FirstOrder, check_counts, check_positive
from l2l.methods.registry import build_method, check_estimator, with_estimator
from l2l.optim import CurvatureLR, ZOOptimizer
from l2l.train.config import PerturbMode, Update, doubts
from l2l.tuners.transfer import Level, check_level

_Trainer = Trainer if TYPE_CHECKING else object

logger = getLogger(__name__)


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ZOArguments:
    """How :class:`ZOTrainerMixin` steps. ``HfArgumentParser((TrainingArguments, ZOArguments))`` makes a command line of both.

    Learning rate, schedule, weight decay, and the seed, which fixes every direction, are those of ``TrainingArguments``.

    Raises:
        ValueError: a value out of range.
    """

    method: str | None = field(
        default=None,
        metadata=_help("A method of `l2l methods list`. None: learned with a tuner, else mezo."),
    )
    epsilon: float = field(
        default=1e-3,
        metadata=_help("Length of the perturbation along the direction; 1e-2 is usual for LoRA and prompt tuning."),
    )
    lr: Literal["auto"] | None = field(
        default=None,
        metadata=_help(
            "auto: the learning rate is step_fraction over the measured curvature, and schedules act on step_fraction. "
            "None: learning_rate of TrainingArguments."
        ),
    )
    step_fraction: float | None = field(
        default=None,
        metadata=_help("With lr=auto, the fraction of the step to the minimum of the parabola along the direction; None: 0.1."),
    )
    curvature_every: int = field(
        default=5, metadata=_help("With lr=auto, steps between curvature measurements, a forward pass each.")
    )
    method_args: dict[str, Any] | str | None = field(
        default=None, metadata=_help('Further fields of the method, as a mapping or its JSON: {"interval": 100}.')
    )
    tuner: str | None = field(
        default=None, metadata=_help("Directory, bundled name or hub id of the tuner that sets sigma, for method learned.")
    )
    match: Level = field(
        default="exact", metadata=_help("How alike the model must be to the tuner's own: exact, shape or kind.")
    )
    estimator: Estimator | None = field(
        default=None, metadata=_help("two_sided: central differences; one_sided: N + 1 passes. None: the method's own.")
    )
    num_directions: int | None = field(
        default=None, metadata=_help("Directions per step, whose estimates are averaged. None: the method's own number.")
    )
    perturb: PerturbMode = field(
        default="auto",
        metadata=_help(
            "in_place: weights are moved and moved back; functional: evaluations read perturbed copies, and the weights are "
            "never touched; auto: functional for half precision and under bf16 or fp16."
        ),
    )
    update: Update = field(
        default="auto",
        metadata=_help("How half-precision weights keep small updates: on a float32 master, or by stochastic rounding."),
    )
    on_bad_loss: str = field(
        default="raise",
        metadata=_help("What becomes of a step whose loss is not finite or explodes: raise, skip, clip or rollback:N."),
    )

    def __post_init__(self) -> None:
        if isinstance(self.method_args, str):
            try:
                self.method_args = json.loads(self.method_args)
            except json.JSONDecodeError as error:
                raise ValueError(f"method_args={self.method_args!r} is no JSON: {error}") from error
        if self.lr not in (None, "auto"):
            raise ValueError(f"lr={self.lr!r} must be 'auto' or left out: a number is learning_rate of TrainingArguments")
        if self.lr is None and self.step_fraction is not None:
            raise ValueError(f"step_fraction={self.step_fraction} means nothing without lr='auto': set it, or leave both out")
        optional = {} if self.step_fraction is None else {"step_fraction": self.step_fraction}
        check_positive(epsilon=self.epsilon, **optional)
        counts = {} if self.num_directions is None else {"num_directions": self.num_directions}
        check_counts(curvature_every=self.curvature_every, **counts)
        check_level(self.match)
        Policy.parse(self.on_bad_loss)
        check_estimator(self.method_name, self.estimator, self.num_directions)

    @property
    def method_name(self) -> str:
        """The method, the default one where none is named."""
        return self.method or ("mezo" if self.tuner is None else "learned")


# Training arguments that belong to backpropagation.

REFUSED: Mapping[str, str] = {
    "optim": "chooses a first-order optimizer: leave it out, and choose ZOArguments(method=...)",
    "optim_args": "belongs to a first-order optimizer: leave it out, and use ZOArguments(method_args=...)",
    "optim_target_modules": "belongs to a first-order optimizer: leave it out, and set requires_grad on what is to be trained",
    "adam_beta1": "belongs to Adam: leave it out, and use ZOArguments(method='adam', method_args=...)",
    "adam_beta2": "belongs to Adam: leave it out, and use ZOArguments(method='adam', method_args=...)",
    "adam_epsilon": "belongs to Adam: leave it out, and use ZOArguments(method='adam', method_args=...)",
    "max_grad_norm": "clips gradients, and there are none: leave it out, and use ZOArguments(on_bad_loss='clip'), which bounds "
    "projected gradients",
    "neftune_noise_alpha": "draws other noise at each evaluation, and differences of losses would be that noise: leave it out",
    "deepspeed": "shards gradients and optimizer states, and there are none: leave it out, and run a process per device",
    "fsdp": "shards the weights, which a step must perturb whole: leave it out, and run a process per device",
    "parallelism_config": "shards the weights, which a step must perturb whole: leave it out, and run a process per device",
}
"""Fields of ``TrainingArguments`` that mean nothing here, so that whoever sets them would get something else -> why, and a way
out."""
IGNORED: Mapping[str, str] = {
    "activation_checkpointing": "recomputes activations in a backward pass",
    "gradient_checkpointing": "recomputes activations in a backward pass",
    "activation_checkpointing_kwargs": "recomputes activations in a backward pass",
    "gradient_checkpointing_kwargs": "recomputes activations in a backward pass",
    "activation_offloading": "keeps activations for a backward pass",
    "torch_empty_cache_steps": "frees what a backward pass leaves",
}
"""Those that change nothing where there is no backward pass -> what they do where there is one."""
OFF: Mapping[str, Any] = {"max_grad_norm": 0, "fsdp": ([], "", False)}
"""Values that switch a refused field off, beside the class's default, None and False."""


def check_training_arguments(args: TrainingArguments) -> None:
    """Raise ValueError at the first field of :data:`REFUSED` that is set; say in a line which of :data:`IGNORED` are.

    A field is set where its value is neither its class's default nor one that switches it off.
    """
    defaults = {one.name: one.default for one in fields(args)}
    off = {name: value if isinstance(value, tuple) else (value,) for name, value in OFF.items()}

    def is_set(name: str) -> bool:
        value = getattr(args, name, None)
        return value is not None and value is not False and value not in (defaults.get(name), *off.get(name, ()))

    for name, why in REFUSED.items():
        if is_set(name):
            raise ValueError(f"TrainingArguments({name}={getattr(args, name)!r}) {why}")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} devices in one process would be nn.DataParallel, whose copies know nothing of perturbed weights: "
            "set CUDA_VISIBLE_DEVICES to one of them, or run a process per device with torchrun or accelerate launch"
        )
    if ignored := [name for name in IGNORED if is_set(name)]:
        logger.warning("ignored, as there is no backward pass: %s", ", ".join(ignored))


def make_optimizer(model: torch.nn.Module, args: TrainingArguments, zo: ZOArguments, steps: int | None) -> ZOOptimizer:
    """The optimizer that the two sets of arguments describe.

    Args:
        steps: of the run, for methods that plan ahead; None: not known.

    Raises:
        ValueError: an unknown method or argument, a tuner that does not fit, a method that goes backward, options that do not
            go together.
    """
    given = zo.method_name, zo.epsilon, zo.method_args or {}, zo.tuner, model, steps, zo.match
    method = with_estimator(build_method(*given), zo.estimator, zo.num_directions)  # pyright: ignore[reportArgumentType]
    if isinstance(method, FirstOrder):
        raise ValueError(f"method {zo.method_name!r} goes backward: use transformers' own Trainer, or choose another method")
    half = args.bf16 or args.fp16
    perturb = "functional" if half and zo.perturb == "auto" else zo.perturb
    lr = zo.lr or args.learning_rate
    if all(parameter.requires_grad for parameter in model.parameters()):
        known_lr = "auto" if method.step_is_normalized else lr  # no range is known of the rates of normalized steps
        for line in doubts("full", known_lr, method.epsilon, sum(p.numel() for p in model.parameters())):
            logger.warning("%s", line)
    optimizer = ZOOptimizer(
        model,
        method,
        lr,
        args.seed,
        args.weight_decay,
        perturb=perturb,
        update=zo.update,
        curvature_lr=CurvatureLR(zo.step_fraction, every=zo.curvature_every) if zo.lr == "auto" else None,
        on_bad_loss=zo.on_bad_loss,
    )
    if args.torch_compile and optimizer.theta.mode == "functional":
        raise ValueError(
            "torch_compile=True needs weights that are perturbed in place: a compiled forward cannot be given transient "
            "copies. Leave torch_compile out, or use float32 weights with ZOArguments(perturb='in_place')"
        )
    return optimizer


@final
class SteppedOptimizer(Optimizer):
    """A :class:`l2l.optim.ZOOptimizer` as a training loop holds it, which calls ``step()`` after ``training_step`` has stepped.

    ``step(closure)`` takes a step; the ``step()`` that follows has nothing left to do. Everything else is the optimizer's.
    """

    def __init__(self, optimizer: ZOOptimizer) -> None:
        self.optimizer = optimizer
        self._taken = False

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Closure | None = None
    ) -> float | None:
        """Take a step with the closure; without one, end the step that was taken.

        Raises:
            TypeError: there is no closure, and no step was taken.
        """
        taken, self._taken = self._taken, False
        if closure is None and taken:
            return None
        loss = self.optimizer.step(closure)
        self._taken = True
        return loss

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)


@final
class _NewStep(TrainerCallback):
    """Drops the batches of a step that was begun and not taken, as where an epoch ends within an accumulation."""

    def __init__(self, pieces: list[Closure]) -> None:
        self._pieces = pieces

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._pieces.clear()


class ZOTrainerMixin(_Trainer):
    """Makes a transformers ``Trainer``, or a trainer built on it, train by forward passes: put it before the trainer's class.

    ``class MyTrainer(ZOTrainerMixin, SomeTrainer)`` takes what ``SomeTrainer`` takes, and ``zo``. A step evaluates
    ``compute_loss`` twice per direction on its batch; ``gradient_accumulation_steps`` batches are the micro-batches of one
    evaluation, and under several processes a loss is the mean over all of them. Modules are in eval mode, for two losses of one
    batch must not differ by dropout; the model's own flag alone says ``training``, which trainers ask to tell the losses of
    training from those of evaluation. ``bf16`` and ``fp16`` compute in that precision, and evaluations read perturbed copies of
    the weights; no gradient is scaled.

    Args:
        zo: method, epsilon and the like; None: the defaults.
        args, optimizers, …: the trainer's own. Of ``TrainingArguments``, fields of :data:`REFUSED` may not be set.
            ``optimizers`` may hold a :class:`l2l.optim.ZOOptimizer`, then ``zo`` is to be left out.

    Raises:
        TypeError: ``optimizers`` holds another optimizer, or ``optimizer_cls_and_kwargs`` is given.
        ValueError: a field of ``TrainingArguments`` that means nothing here, or an optimizer beside ``zo``.
    """

    def __init__(self, *given: Any, zo: ZOArguments | None = None, **named: Any) -> None:
        args = named.get("args", given[1] if len(given) > 1 else None)
        if args is not None:
            check_training_arguments(args)
        optimizer = named.get("optimizers", (None, None))[0]
        if optimizer is not None and not isinstance(optimizer, ZOOptimizer):
            raise TypeError(
                f"optimizers holds {type(optimizer).__name__}, which needs gradients: pass l2l.MeZO(model, ...) or the like, "
                "or leave it out and pass zo=ZOArguments(...)"
            )
        if optimizer is not None and zo is not None:
            raise ValueError("both optimizers and zo choose the optimizer: pass one of them")
        if named.get("optimizer_cls_and_kwargs") is not None:
            raise TypeError("optimizer_cls_and_kwargs makes a first-order optimizer: leave it out, pass zo=ZOArguments(...)")
        self.zo = zo or ZOArguments()
        self._pieces: list[Closure] = []
        super().__init__(*given, **named)
        self.add_callback(_NewStep(self._pieces))

    @property
    def zo_optimizer(self) -> ZOOptimizer:
        """The zeroth-order optimizer; its ``report`` tells losses, projected gradients and passes of the last step.

        Raises:
            RuntimeError: it is not made yet.
        """
        found: Any = self.optimizer
        while found is not None and not isinstance(found, ZOOptimizer):
            found = found.optimizer
        if found is None:
            raise RuntimeError("there is no optimizer yet: call train(), or create_optimizer()")
        return found

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Make the optimizer from ``TrainingArguments`` and ``zo``, or take the one given in ``optimizers``.

        Raises:
            ValueError: as of :func:`make_optimizer`.
        """
        found: Any = self.optimizer
        if found is None:
            trained: Any = self.model if model is None else model
            found = make_optimizer(trained, self.args, self.zo, self.state.max_steps or None)
        self.optimizer = SteppedOptimizer(found) if isinstance(found, ZOOptimizer) else found
        if self.accelerator.scaler is not None:  # of fp16: it scales gradients, and steps by what it finds in them
            self.accelerator.scaler = torch.amp.GradScaler(enabled=False)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Take a step on this batch and those before it that belong to the same accumulation.

        Returns:
            The step's loss, a float32 scalar on the trainer's device: the mean of its evaluations. 0 for a batch that is
            not the last of its accumulation.

        Raises:
            FloatingPointError: a loss is not finite, and ``on_bad_loss`` is ``raise``. The weights are as before the step.
        """
        self._pieces.append(partial(self._loss, model, self._prepare_inputs(inputs), num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.tensor(0.0, device=self.args.device)
        pieces = tuple(self._pieces)
        self._pieces.clear()
        own: Any = self.model
        own.eval()
        own.training = True
        self.optimizer.step(pieces[0] if len(pieces) == 1 else MicroBatched(pieces))
        report = self.zo_optimizer.report
        assert report is not None, "a step leaves a report"
        return torch.tensor(report.loss, device=self.args.device)

    def _loss(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Share of a batch in the loss of its accumulation, the same number in every process."""
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5.19
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        if not scaled:
            loss = loss / self.current_gradient_accumulation_steps
        if self.accelerator.num_processes > 1:  # gathered and then averaged, so that all processes take the same step
            everywhere: Any = self.accelerator.gather(loss.detach().reshape(1))
            loss = everywhere.mean()
        return loss


class ZOTrainer(ZOTrainerMixin, Trainer):
    """transformers' ``Trainer`` with zeroth-order steps: see :class:`ZOTrainerMixin`.

    ``ZOTrainer(model=model, args=TrainingArguments(...), zo=ZOArguments(method="mezo", epsilon=1e-3), train_dataset=rows)``
    """
