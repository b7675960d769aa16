"""Controls of the protocol: contenders modelled on the judged tuner, without what it learned.

Each takes over the tuner's step control, method arguments and normalizer, so that only sigma, the basis or the block
schedule differs. Controls of sigma move all blocks at every step: a block schedule is learned. Tables of sigma are saved as
tuners like any other; they come from gradients, from a random draw, or boost one block.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from l2l.estimators import Closure, consume_gradients
from l2l.experiments import spec
from l2l.experiments.spec import Contender, Entry, MetaEvaluateConfig, SchemeEntry, Setting
from l2l.models.batching import Grouping
from l2l.models.load import context_length, load_model, load_tokenizer
from l2l.optim import Schedule
from l2l.params import Blocks
from l2l.tasks import batch_loss, get_task, load_splits
from l2l.tasks.encode import encoder_for
from l2l.train.inputs import Batcher
from l2l.tuners import Provenance, RunStatistics, Tuner, random_basis, ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_SIGMA = 0.1  # least sigma in a table made from gradients, whose root mean square is 1: small, not frozen
BOOST = 4.0  # sigma of the boosted block; the others have 1
CONTROL_SEED = 1  # seed of everything drawn for a control; tuners are mostly made with seed 0
PUBLISHED_SPREAD = 0.75
"""Coefficient of variation of the published tuners' sigma: for a tuner whose own sigma is the same everywhere."""


def gradient_agreement(closures: Sequence[Closure], blocks: Blocks) -> torch.Tensor:
    """G_b [blocks] float64, an unbiased estimate of the squared norm of the full gradient per block; may be negative.

    The mean of <g_i, g_j> over all pairs of different batches: (|sum g|^2 - sum |g|^2) / (n (n - 1)). One gradient is
    kept in memory. ValueError for fewer than two batches.
    """
    count = len(closures)
    if count < 2:
        raise ValueError(f"{count} batches: agreement is between two at least")
    sums: dict[int, torch.Tensor] = {}
    squares = torch.zeros(len(blocks), dtype=torch.float64)

    def take(index: int, gradient: torch.Tensor) -> None:
        squares[index] += gradient.double().square().sum().item()
        sums[index] = gradient.double() + sums.get(index, 0.0)

    for closure in closures:
        consume_gradients(closure, blocks, take)
    whole = torch.tensor([float(sums[i].square().sum()) if i in sums else 0.0 for i in range(len(blocks))])
    return (whole.double() - squares) / (count * (count - 1))


def sigma_from(agreements: Sequence[torch.Tensor], blocks: Blocks) -> torch.Tensor:
    """Sigma [blocks] float32 with sigma^2 proportional to G_b / d_b, mean square 1 over all coordinates.

    Each task's G is divided by its sum first, so that tasks have equal weight; negative ones count as 0, and no sigma is
    below :data:`MIN_SIGMA`. ValueError where on no task the gradients of any block agree.
    """
    shares = [found.clamp(min=0) / found.clamp(min=0).sum() for found in agreements if (found > 0).any()]
    if not shares:
        raise ValueError("the gradients of different batches agree in no block: take more batches (control_batches)")
    sizes = torch.tensor([block.numel for block in blocks], dtype=torch.float64)
    square = torch.stack(shares).mean(0) / sizes
    return (square * sizes.sum() / (square * sizes).sum()).sqrt().clamp(min=MIN_SIGMA).float()


def boosted(model: torch.nn.Module, forward: Callable[[], Any]) -> tuple[torch.Tensor, str]:
    """Sigma [blocks] of 1, but :data:`BOOST` for the block that adds the largest vector to the residual stream; its name.

    Candidates are matrices with more inputs than outputs, embedding and head apart, as the output projection of an MLP.
    Of these the one whose output has the largest norm at any one token of a batch: in many language models the second or
    third of its kind, known for massive activations (Sun et al. 2024, arXiv:2402.17762). ``forward`` runs the model on a
    batch. ValueError where no matrix has more inputs than outputs.
    """
    blocks = Blocks.of(model)
    matrices = {id(block.tensor): block for block in blocks if block.tensor.ndim == 2 and not block.embedding}
    largest: dict[str, float] = {}

    def note(name: str, _: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor) and inputs and inputs[0].shape[-1] > output.shape[-1]:
            norm = float(output.detach().float().norm(dim=-1).max())
            largest[name] = max(norm, largest.get(name, 0.0))

    owners = ((matrices.get(id(getattr(module, "weight", None))), module) for module in model.modules())
    handles = [module.register_forward_hook(partial(note, block.name)) for block, module in owners if block is not None]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if not largest:
        raise ValueError("no matrix of the model has more inputs than outputs: there is no block to boost")
    chosen = max(largest, key=lambda name: largest[name])
    return torch.tensor([BOOST if name == chosen else 1.0 for name in blocks.names]), chosen


def initial_sigma(tuner: Tuner, blocks: Blocks) -> torch.Tensor:
    """Sigma [blocks] of a tuner before the first step."""
    with torch.no_grad():
        return tuner.sigma(tuner.features(RunStatistics.start(blocks)), blocks.names)


@dataclass(frozen=True)
class _Controls:
    """The controls of a setting: a method for each, named as in ``CONTROLS``, gives the control, or why there is none."""

    config: MetaEvaluateConfig
    setting: Setting
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    tuner: Tuner
    steps: int | None
    pool: Sequence[str]
    folder: Path

    @property
    def blocks(self) -> Blocks:
        return Blocks.of(self.model)

    def baseline(self, role: str) -> Contender | None:
        return next((found for found in self.config.contenders if found.role == role), None)

    def entry(self, name: str, base: Contender, tuners: Mapping[str, Tuner] | None = None) -> Entry:
        """A control with the tuner's step control, the method of ``base``, and a tuner per task."""
        judged = self.config.judged_contender
        contender = Contender(spec.CONTROLS[name], base.method, spec.CONTROL, None, base.method_args, judged.options)
        paths = {task: str(spec.freeze(tuner, self.folder)) for task, tuner in (tuners or {}).items()}
        return Entry(contender, dict.fromkeys(self.setting.tasks) | paths, self.steps if base is judged else None)

    def learned(self, name: str, tuner: Tuner) -> Entry:
        """The judged contender with another tuner."""
        return self.entry(name, self.config.judged_contender, dict.fromkeys(self.setting.tasks, tuner))

    def table(self, name: str, sigma: torch.Tensor, **about: object) -> Tuner:
        """A tuner that is a table of the trainable blocks' sigma."""
        given = dict(zip(self.blocks.names, sigma.tolist(), strict=True))
        every = [given.get(block, 1.0) for block in Blocks.of(self.model, trainable=False).names]
        provenance = Provenance(self.tuner.provenance.base_model, recipe={"control": name, **about})
        return Tuner.for_model(self.model, "table", 0, self.tuner.normalizer, provenance, values=every)

    def batches(self, name: str) -> Batcher:
        """Batches of a task's train rows, of the tuning seed."""
        config, task, seed = self.config, get_task(name), self.config.tuning_seed
        data_dir = config.run_options(self.setting, SchemeEntry())["data_dir"]
        splits = load_splits(task, data_dir, config.train_size, config.dev_size, 0, seed)
        encoder, limit = encoder_for(self.model), context_length(self.model, self.setting.max_length)
        encoded = encoder.encode(task, splits.train, self.tokenizer, limit)
        pad_id, grouping = encoder.pad_id(self.tokenizer), Grouping.of(self.model, None)
        return Batcher(encoded, task.form, pad_id, self.setting.batch_size, seed, self.model.device, grouping)

    def agreement(self, task: str) -> torch.Tensor:
        """:func:`gradient_agreement` [blocks] on the first batches of a task, at the pretrained weights."""
        batches = self.batches(task)

        def loss_of(number: int) -> Closure:
            return lambda: batch_loss(self.model, batches.at(number), batches.form)

        return gradient_agreement([loss_of(number) for number in range(self.config.control_batches)], self.blocks)

    def step_control(self, name: str, role: str) -> Entry | str:
        baseline = self.baseline(role)
        if baseline is None:
            return f"there is no {role}"
        if baseline.options == self.config.judged_contender.options:
            return "the tuner's step control is the baseline's own: the same runs"
        return self.entry(name, baseline)

    def mezo_step_control(self) -> Entry | str:
        return self.step_control("mezo_step_control", spec.BASELINE_MEZO)

    def dizo_step_control(self) -> Entry | str:
        return self.step_control("dizo_step_control", spec.BASELINE_DIZO)

    def mezo_schedule(self) -> Entry | str:
        """MeZO at the best of all schedules and learning rates: three times the tries of any other."""
        baseline = self.baseline(spec.BASELINE_MEZO)
        assert baseline is not None, "the configuration has refused that"
        schedules = [{"schedule": name} for name in get_args(Schedule)]
        contender = replace(baseline, label=spec.CONTROLS["mezo_schedule"], role=spec.CONTROL, alternatives=schedules)
        return Entry(contender, dict.fromkeys(self.setting.tasks))

    def fresh_networks(self) -> Entry | str:
        """The tuner's architecture, features and basis with weights freshly drawn; for a mere table, the published networks."""
        tuner, args = self.tuner, {}
        start_is_drawn = "start" in inspect.signature(type(tuner.network)).parameters  # a table has only sigma itself
        drawn = tuner.architecture != "table" and start_is_drawn
        architecture = tuner.architecture if drawn else "per_block_mlp"
        if architecture == tuner.architecture:
            args = {name: value for name, value in tuner.architecture_args.items() if name not in ("blocks", "seed")}
        fresh = Tuner.for_model(
            self.model,
            architecture,
            CONTROL_SEED,
            tuner.normalizer,
            Provenance(tuner.provenance.base_model, recipe={"control": "fresh networks"}),
            tuner.feature_set if architecture == tuner.architecture else "paper",
            tuner.basis,
            None,
            **args | {"start": "random"},
        )
        return self.learned("fresh_networks", fresh)

    def random_sigma(self) -> Entry | str:
        """One draw from a log-normal whose coefficient of variation over the blocks is that of the tuner's initial sigma."""
        own = initial_sigma(self.tuner, self.blocks)
        cv = float(own.std(unbiased=False) / own.mean()) or PUBLISHED_SPREAD
        drawn = Tuner.for_model(self.model, "table", CONTROL_SEED, start="random", cv=cv)
        sigma = initial_sigma(drawn, self.blocks)
        return self.learned("random_sigma", self.table("fixed random sigma", sigma, cv=cv, seed=CONTROL_SEED))

    def outlier_boost(self) -> Entry | str:
        batches = self.batches(self.setting.tasks[0])
        sigma, name = boosted(self.model, lambda: batch_loss(self.model, batches.at(0), batches.form))
        return self.learned("outlier_boost", self.table("outlier boost", sigma, block=name))

    def static_table(self) -> Entry | str:
        sigma = sigma_from([self.agreement(task) for task in self.pool], self.blocks)
        return self.learned("static_table", self.table("gradients of the pool", sigma, tasks=list(self.pool)))

    def oracle_table(self) -> Entry | str:
        """Cheats: gradients of the very task, though not of the seeds' batches."""
        sigmas = {task: sigma_from([self.agreement(task)], self.blocks) for task in self.setting.tasks}
        tables = {task: self.table("gradients of the task", sigma, tasks=[task]) for task, sigma in sigmas.items()}
        return self.entry("oracle_table", self.config.judged_contender, tables)

    def random_basis(self) -> Entry | str:
        """The tuner with random columns of the same ranks in place of its basis."""
        if not self.tuner.basis:
            return "the tuner has no basis"
        basis = random_basis(self.blocks, ranks(self.tuner.basis), CONTROL_SEED)
        return self.learned("random_basis", self.tuner.with_basis(basis))

    def random_turns(self) -> Entry | str:
        """The tuner with its blocks shuffled into as many groups of the same sizes."""
        schedule = self.tuner.block_schedule
        if schedule is None:
            return "the tuner has no block schedule"
        return self.learned("random_turns", self.tuner.with_block_schedule(schedule.shuffled(CONTROL_SEED)))


def build_controls(
    config: MetaEvaluateConfig, setting: Setting, tuner: Tuner, steps: int | None, pool: Sequence[str], folder: Path
) -> tuple[list[Entry], dict[str, str]]:
    """The controls of a setting, their tuners saved below ``folder``; and by name why one does not exist.

    The judged ``tuner`` plans for ``steps`` (see :class:`Entry`); the static table is made from gradients of the tasks of
    ``pool``. ValueError where gradients agree nowhere or no block can be boosted; FloatingPointError for a loss not finite.
    """
    if not config.controls:
        return [], {}
    source = config.run_options(setting, SchemeEntry())["model"]
    controls = _Controls(config, setting, load_model(source), load_tokenizer(source), tuner, steps, pool, folder)
    found: dict[str, Entry | str] = {name: getattr(controls, name)() for name in config.controls}
    built = [entry for entry in found.values() if isinstance(entry, Entry)]
    return built, {name: reason for name, reason in found.items() if isinstance(reason, str)}
