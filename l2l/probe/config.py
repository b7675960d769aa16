"""What the learning-rate finder is told: the fields of ``l2l lr-probe`` and of its YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from l2l.finetune.config import FineTuneConfig, PerturbMode
from l2l.methods.base import check_counts, check_positive
from l2l.models.kinds import Head
from l2l.models.quantized import Quantize
from l2l.models.schemes import Scheme

EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LEAST_EPSILONS = 3
"""Fewer do not tell rounding from truncation."""


@dataclass(frozen=True)
class ProbeConfig:
    """Recommend a learning rate and an epsilon from a few dozen probes of the loss; nothing is trained."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, or a hub id."""
    task: str = "world_topic"
    """Name of a task; `l2l tasks list` shows them."""
    method: str = "mezo"
    """The method that is to be run: it chooses the directions."""
    tuner: str | None = None
    """Directory, bundled name or hub id of the tuner that ``learned`` needs."""
    scheme: Scheme = "full"
    """What is to be trained, and so probed: every weight, an adapter, or the output head; as in ``l2l fine-tune``."""
    scheme_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of peft's configuration of the scheme."""
    out: str = "runs/lr-probe"
    """Directory for ``probe.json``, ``probe.png``, ``config.yaml`` and ``summary.json``."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub. Embedded tasks need neither."""
    probes: int = 24
    """Directions probed, each on a training batch of its own, and once more on a second batch: five forward passes."""
    sweep: int = 4
    """The first directions, along which every epsilon is tried: two more passes per epsilon."""
    epsilons: list[float] = field(default_factory=lambda: list(EPSILONS))
    """Epsilons to try, at least three; those at which the loss is not finite are left out."""
    step_fraction: float | None = None
    """Share to go of the step to the bottom of the parabola seen. None: 0.1 to 0.2, by the noise of the batches."""
    batch_size: int = 16
    """Examples per step of the run to come: the noise is that of such batches."""
    micro_batch: int | None = None
    """Most examples whose loss is computed at once; None: the whole batch."""
    objective: str = "loss"
    """What training is to minimise, as in ``l2l fine-tune``."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    train_size: int = 1000
    """Rows to train on."""
    perturb: PerturbMode = "auto"
    """How perturbed weights are made, as in ``l2l fine-tune``."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method."""
    seed: int = 0
    """Fixes rows, batches and directions."""
    dtype: str = "float32"
    """Dtype the weights are loaded in: in half precision larger epsilons are needed."""
    quantize: Quantize = "none"
    """Load the frozen base in 4 or 8 bits, as in ``l2l fine-tune``."""
    device: str | None = None
    """Torch device; None: the CPU."""
    device_map: str | None = None
    """``auto`` and the like spread the layers over the devices there are. Not beside ``device``."""
    head: Head = "auto"
    """Kind of model to load, as in ``l2l fine-tune``."""
    attn_implementation: str | None = None
    """``eager``, ``sdpa``, … as transformers names them; None lets it choose."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. It can do whatever you can."""
    revision: str | None = None
    """Revision of a hub model."""
    overwrite: bool = False
    """Remove what an earlier probe left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_counts(probes=self.probes, sweep=self.sweep, batch_size=self.batch_size, train_size=self.train_size)
        check_plan(self.probes, self.sweep, self.epsilons)
        check_positive(beta=1.0 if self.step_fraction is None else self.step_fraction)
        self.fine_tune()  # refuses what a run would

    def fine_tune(self) -> FineTuneConfig:
        """The run that is probed for. Its lr and epsilon are still open: ``auto`` is what no range speaks against."""
        return FineTuneConfig(lr="auto", **self._shared())

    def _shared(self) -> dict[str, Any]:
        """Fields that a run has as well; its ``beta`` is another matter."""
        names = {one.name for one in fields(FineTuneConfig)} - {"beta"}
        return {name: value for name, value in asdict(self).items() if name in names}

    def differing(self) -> dict[str, Any]:
        """What a run has to be told beside lr and epsilon: what differs from its defaults."""
        default = FineTuneConfig()
        quiet = {"out", "overwrite", "progress"}
        told = {name: value for name, value in self._shared().items() if name not in quiet}
        same = {"model", "task", "method"}  # said in any case: the line is to be read by people
        return {name: value for name, value in told.items() if name in same or value != getattr(default, name)}


def check_plan(probes: int, sweep: int, epsilons: Sequence[float]) -> None:
    """Refuse a plan whose figures would mean nothing.

    Raises:
        ValueError: too few probes or epsilons, an epsilon that is not positive or comes twice, a longer sweep than probes.
    """
    if probes < 2:
        raise ValueError(f"probes={probes} must be at least 2: one direction shows no spread")
    if sweep > probes:
        raise ValueError(f"sweep={sweep} must be at most probes={probes}: it takes the first of them")
    if len(set(epsilons)) != len(epsilons) or len(epsilons) < LEAST_EPSILONS:
        raise ValueError(f"epsilons={list(epsilons)} must be at least {LEAST_EPSILONS} different numbers")
    for epsilon in epsilons:
        check_positive(epsilons=epsilon)
