"""``l2l bench``: seconds and memory of a zeroth-order step beside its two forward passes and the textbook loop.

Contenders are timed alternately, each once per round and in an order that is reversed from round to round, so that a slow
minute of the machine slows all of them alike; figures are medians over the rounds.
"""

import gc
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import torch

from l2l.arguments import Arguments
from l2l.estimators import Closure, finite_loss, two_point
from l2l.methods.base import Method, check_counts
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.methods.rsgn import RSGN
from l2l.models.load import DTYPES, check_measured, context_length, load_model
from l2l.models.prefix import Fill, PrefixCache, check_train_layers, row_keys, trace_layers, train_only
from l2l.models.shapes import SHAPES, shape_config
from l2l.noise import Key, NoiseTerm, TensorSlice, active_backend, add_noise, standard_deviation
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, Direction
from l2l.report.console import print_table, progress_bar
from l2l.report.memory import PeakMemory, current_bytes
from l2l.report.run_directory import RunDirectory, environment, write_json
from l2l.tuners.api import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("l2l")

GIB = 2**30
SPREAD = 0.02
"""Standard deviation of random weight matrices."""
IGNORED = -100
"""Target of a position that predicts nothing: torch's cross entropy leaves it out."""
STEPS_WITHOUT_UPDATE = 3
"""Evaluations after which half-precision weights must be bit-identical."""
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

FORWARDS, STEP, PLAIN, LEARNED, TEXTBOOK = "two_forwards", "step", "plain_step", "learned_step", "textbook_step"
POPULATION, RSGN_STEP = "population_step", "rsgn_step"
WHOLE, CACHE = "whole_two_forwards", "cache"
"""Names of the contenders in every result."""
FUSED = (STEP, LEARNED, POPULATION, RSGN_STEP)
"""Contenders whose steps are fused with the one before: the first of a turn is not timed."""

Step: TypeAlias = Callable[[], float]
"""Does one step (or two forward passes) and returns its loss."""
Contender: TypeAlias = Callable[[], AbstractContextManager[Step]]
"""Opens a turn: a context in which a step can be repeated, and which leaves nothing behind."""
Advance: TypeAlias = Callable[[float], None]


@dataclass(frozen=True)
class BenchConfig(Arguments):
    """Measure a zeroth-order step beside its two forward passes and beside the textbook loop."""

    model: str = "opt-125m-shape"
    """A shape with random weights (``opt-tiny-shape``, ``opt-125m-shape``, … ``opt-30b-shape``), ``l2l/tiny``,
    a directory, or a hub id."""
    dtype: str = "fp32"
    """``fp32``, ``bf16`` or ``fp16``."""
    out: str = "runs/bench"
    """Directory for ``bench.json``, ``config.yaml`` and ``summary.json``."""
    device: str | None = None
    """Torch device; None: the CPU."""
    batch_size: int = 8
    """Rows per forward pass."""
    length: int = 64
    """Tokens per row."""
    answer_tokens: int | None = None
    """Loss over the last so many tokens only, with logits computed only there; None: over all tokens."""
    threads: int | None = None
    """Threads of torch and of the noise; None: as torch chooses."""
    seed: int = 0
    """Of weights, tokens and directions."""
    warmup: int = 1
    """Untimed steps of each kind at first; peak memory is measured on them."""
    repeats: int = 5
    """Rounds. In each, every kind of step is timed once; figures are medians."""
    update: Literal["auto", "master", "stochastic"] = "auto"
    """How half precision keeps an update: on a float32 master copy, or with stochastic rounding."""
    learned: bool = True
    """Measure the learned method too, with a fresh tuner."""
    textbook: bool = True
    """Measure the textbook's four-pass loop too."""
    train_layers: str = "all"
    """Layers to train (``top:5``, ``top:1/3``). Passes then read hidden states that are kept below them, and two passes of the
    whole model and the filling of the cache are measured beside them."""
    population: int | None = None
    """Measure one-sided steps of so many directions too, of MeZO with ``packed_rademacher`` noise and of ``rsgn``, beside as
    many forward passes and one more; None: not."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("batch_size", "warmup", "repeats", "threads", "answer_tokens", "population")
        counts = {name: getattr(self, name) for name in names}
        check_counts(**{name: value for name, value in counts.items() if value is not None})
        check_train_layers(self.train_layers)
        if self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2: the first token of a row is not predicted")
        if self.answer_tokens is not None and self.answer_tokens >= self.length:
            raise ValueError(f"answer_tokens={self.answer_tokens} must be below length={self.length}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")
        check_measured(self.device)

    @property
    def torch_device(self) -> torch.device:
        """Device to measure on."""
        return torch.device(self.device or "cpu")


def bench_command(config: BenchConfig) -> None:
    """Measure, leave ``bench.json``, ``config.yaml`` and ``summary.json`` in ``out``, and print the main figures.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    found = measure(config)
    folder.create()
    write_json(folder.path / "bench.json", found)
    folder.finish(found | {"config": asdict(config)})
    names = (
        *("shape", "dtype", "device", "threads", "backend"),
        *("step_over_two_forwards", "plain_step_over_two_forwards", "reference_over_ours", "learned_over_mezo"),
        *("population_over_forwards", "rsgn_over_forwards", "whole_over_top", "cache_over_forward"),
        *("peak_over_inference", "tokens_per_second", "restore_bit_identical", "noisy"),
    )
    shown = {name: found[name] for name in names if found[name] is not None}
    seconds = {f"seconds, {name.replace('_', ' ')}": value for name, value in found["seconds"].items()}
    print_table(f"bench: {config.out}", [shown | seconds])


def measure(config: BenchConfig) -> dict[str, Any]:
    """The figures, written nowhere: ratios, medians in seconds, peaks in bytes, and what they were measured on.

    A ratio of times is the median over rounds of the ratios within a round. Peaks count the weights, but not what the
    process holds beside them after a first forward pass: interpreter, libraries, tokens.

    Raises:
        ValueError, FileNotFoundError: as :func:`build`.
    """
    machine, threads = hardware(), torch.get_num_threads()
    if machine["noisy"]:
        logger.warning("load %.1f on %d cores: times are noisy", machine["load_average"], machine["cores"])
    device, dtype = config.torch_device, DTYPES[config.dtype]
    try:
        torch.set_num_threads(config.threads or threads)
        model = build(config.model, config.dtype, device, config.seed, config.length)
        blocks = Blocks.of(model, trainable=False)
        sizes = [block.numel * block.tensor.element_size() for block in blocks]
        ids = tokens(config, model.config.get_text_config().vocab_size)
        whole, top = causal_loss(model, ids, config.answer_tokens), None
        finite_loss(whole)  # loads libraries, which are not counted in the peaks
        if config.train_layers != "all":
            top = Top.of(model, ids, config.train_layers)
        closure = whole if top is None else causal_loss(model, ids, config.answer_tokens, torch.ones_like(ids))
        beside = current_bytes(device) - sum(sizes)

        found = contenders(model, closure, config)
        if top is not None:
            found[WHOLE] = lambda: nullcontext(lambda: (finite_loss(whole) + finite_loss(whole)) / 2)
            found[CACHE] = lambda: nullcontext(top.fill)
        attached = nullcontext() if top is None else top.cache.attached()
        with attached, progress_bar("bench", len(found) * (config.repeats + 1), visible=config.progress) as advance:
            used = {name: peak - beside for name, peak in peaks(found, device, config.warmup, advance).items()}
            seconds = rounds(found, device, config.repeats, advance)
        optimizer = ZOOptimizer(model, MeZO(), seed=config.seed, update=config.update)
        above = {name: ratio(seconds, name, FORWARDS) for name in (POPULATION, RSGN_STEP)}
        per_forward = {name: value and 2 * value / ((config.population or 1) + 1) for name, value in above.items()}
        share = {name: peak / used[FORWARDS] for name, peak in used.items()} if used[FORWARDS] > 0 else {}
        return {
            "shape": config.model,
            "dtype": SHORT[dtype],
            "device": str(device),
            "backend": active_backend(device, dtype),
            "threads": torch.get_num_threads(),
            **{name: getattr(config, name) for name in ("batch_size", "length", "answer_tokens", "train_layers")},
            "parameters": blocks.numel,
            "weight_bytes": sum(sizes),
            "largest_block_bytes": max(sizes),
            "step_over_two_forwards": ratio(seconds, STEP, FORWARDS),
            "plain_step_over_two_forwards": ratio(seconds, PLAIN, FORWARDS),
            "reference_over_two_forwards": ratio(seconds, TEXTBOOK, FORWARDS),
            "reference_over_ours": ratio(seconds, TEXTBOOK, STEP),
            "learned_over_mezo": ratio(seconds, LEARNED, STEP),
            "population_over_forwards": per_forward[POPULATION],
            "rsgn_over_forwards": per_forward[RSGN_STEP],
            "whole_over_top": ratio(seconds, WHOLE, FORWARDS),
            "cache_over_forward": doubled(ratio(seconds, CACHE, WHOLE)),
            "peak_over_inference": share.get(STEP),
            "learned_peak_over_inference": share.get(LEARNED),
            "reference_peak_over_inference": share.get(TEXTBOOK),
            "tokens_per_second": config.batch_size * config.length / median(seconds[STEP]),
            "update": optimizer.theta.update,
            "restore_bit_identical": None if dtype == torch.float32 else _restores_every_bit(optimizer, closure),
            "seconds": {name: median(values) for name, values in seconds.items()},
            "samples": seconds,
            "peak_bytes": used,
            "bytes_beside_weights": beside,
            **machine,
        }
    finally:
        torch.set_num_threads(threads)


def _restores_every_bit(optimizer: ZOOptimizer, closure: Closure) -> bool:
    """Whether evaluating perturbed weights without an update leaves every bit of the weights as it was."""
    weights = [block.tensor for block in optimizer.blocks]
    before = checksum(weights)
    for number in range(STEPS_WITHOUT_UPDATE):
        with optimizer.theta.step():
            direction = Direction(Key(optimizer.seed, number), (1.0,) * len(weights))
            two_point(closure, optimizer.theta, direction, MeZO.epsilon)
    return checksum(weights) == before


def hardware() -> dict[str, Any]:
    """Date, versions, processor, graphics card, cores, and the load average of the last minute where the system has it."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": environment()["versions"],
        "cpu": cpu or platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cores,
        "load_average": load,
        "noisy": load is not None and load > cores,
    }


# The model and its loss


def build(name: str, dtype: str, device: torch.device, seed: int = 0, length: int | None = None) -> "PreTrainedModel":
    """The model of a name in eval mode. A shape gets the same random weights on every device: keyed noise for matrices,
    1 for weights of norms, 0 for biases.

    Args:
        name: a shape of :mod:`l2l.models.shapes`, or what :func:`l2l.models.load.load_model` takes.
        length: tokens per row that it must take.

    Raises:
        ValueError, FileNotFoundError: no such shape or model, or too few positions; before weights are made.
    """
    if name not in SHAPES and not name.endswith("-shape"):
        model = load_model(name, dtype, device)
        context_length(model, length)
        return model
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"):
        context_length(AutoModelForCausalLM.from_config(shape_config(name)), length)
    with torch.device(device), no_init_weights():  # buffers are computed, weights are not
        model = AutoModelForCausalLM.from_config(shape_config(name), dtype=DTYPES[dtype])
    model.tie_weights()
    blocks = list(Blocks.of(model, trainable=False))
    for block in blocks:
        block.flat.fill_(1.0 if block.tensor.ndim == 1 and block.name.endswith("weight") else 0.0)
    matrices = [TensorSlice(block.flat, block.name) for block in blocks if block.tensor.ndim > 1]
    add_noise(matrices, [NoiseTerm(Key(seed), [(SPREAD / standard_deviation("gaussian"),)] * len(matrices))])
    return model.eval()


def tokens(config: BenchConfig, vocabulary: int) -> torch.Tensor:
    """Random token ids [batch_size, length]."""
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(vocabulary, (config.batch_size, config.length), generator=generator)
    return ids.to(config.torch_device)


@final
@dataclass(frozen=True)
class Top:
    """The rows' hidden states below the trained layers. Only passes that are given a mask read them."""

    cache: PrefixCache
    rows: Fill

    @staticmethod
    def of(model: "PreTrainedModel", ids: torch.Tensor, train_layers: str) -> "Top":
        """Freeze what is not trained, and keep the states of the rows."""
        train_only(model, train_layers)
        trace = trace_layers(model)
        mask = torch.ones_like(ids).cpu()
        keys, lengths = row_keys({"input_ids": ids, "attention_mask": mask})
        nowhere = torch.empty(0, dtype=torch.long)
        rows = Fill(ids.cpu(), mask, keys, lengths, rows=nowhere, positions=nowhere, at_places=())
        found = Top(PrefixCache(model, trace, trace.lowest_trained(model)), rows)
        found.fill()
        return found

    def fill(self) -> float:
        """Compute the states; 0."""
        with nullcontext() if self.cache.rows else self.cache.attached():
            self.cache.keep(self.rows, self.cache.compute(self.rows))
        return 0.0


def causal_loss(
    model: "PreTrainedModel", ids: torch.Tensor, answer_tokens: int | None, mask: torch.Tensor | None = None
) -> Closure:
    """Mean float32 cross entropy of the next token; over all of them, or the last ``answer_tokens`` of each row."""
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    options: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    if answer_tokens is not None:
        options["logits_to_keep"], targets = answer_tokens + 1, targets[:, -(answer_tokens + 1) :]

    def loss() -> torch.Tensor:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, **options).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    return loss


# Contenders


def contenders(model: "PreTrainedModel", closure: Closure, config: BenchConfig) -> dict[str, Contender]:
    """Name -> contender, in the order of a round. Every turn has an optimizer and directions of its own."""
    seeds = count(config.seed)

    @contextmanager
    def steps(method: Method[Any], fused: bool) -> Iterator[Step]:
        optimizer = ZOOptimizer(model, method, seed=next(seeds), update=config.update)
        with optimizer.theta.fused_steps() if fused else nullcontext():
            yield lambda: optimizer.step(closure)

    @contextmanager
    def textbook() -> Iterator[Step]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = count(next(seeds))
        devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            yield lambda: textbook_step(parameters, closure, next(own))

    found: dict[str, Contender] = {
        FORWARDS: lambda: nullcontext(lambda: (finite_loss(closure) + finite_loss(closure)) / 2),
        STEP: lambda: steps(MeZO(), fused=True),
    }
    if config.learned:
        tuner = Tuner.for_model(model, seed=config.seed)
        found[LEARNED] = lambda: steps(Learned(tuner), fused=True)
    if config.population is not None:
        size = config.population
        method = MeZO(num_directions=size, estimator="one_sided", distribution="packed_rademacher")
        found[POPULATION] = lambda: steps(method, fused=True)
        found[RSGN_STEP] = lambda: steps(RSGN(num_directions=size), fused=True)
    found[PLAIN] = lambda: steps(MeZO(), fused=False)
    if config.textbook:
        found[TEXTBOOK] = textbook
    return found


def textbook_step(
    parameters: Sequence[torch.nn.Parameter], closure: Closure, seed: int, lr: float = 1e-6, epsilon: float = 1e-3
) -> float:
    """One step of Malladi et al. 2023, arXiv:2305.17333, Algorithm 1; the mean of the two losses. For comparison only.

    Four passes over the weights, each with noise drawn anew from a reset seed. Every tensor of noise is materialised, and
    every pass makes a new tensor of weights in their dtype: in bfloat16 this drifts and loses most of an update. Torch's
    global random state is reset four times.

    Raises:
        FloatingPointError: a loss is not finite; the weights stay perturbed then.
    """

    def add(scale: float, then: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            data = parameter.data
            noise = torch.normal(mean=0.0, std=1.0, size=data.shape, dtype=data.dtype, device=data.device)
            parameter.data = data + scale * noise * then

    add(1.0, epsilon)
    plus = finite_loss(closure)
    add(-2.0, epsilon)
    minus = finite_loss(closure)
    add(1.0, epsilon)
    projected_gradient = (plus - minus) / (2 * epsilon)
    add(-lr * projected_gradient, 1.0)
    return (plus + minus) / 2


# Measuring


def peaks(found: Mapping[str, Contender], device: torch.device, steps: int, advance: Advance) -> dict[str, int]:
    """Name -> most bytes in use during ``steps`` steps, weights and setting up included; these steps also warm up."""
    peak_bytes: dict[str, int] = {}
    for name, contender in found.items():
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with PeakMemory(device) as peak, contender() as step:
            losses = [step() for _ in range(steps + (name in FUSED))]
            wait(device)
        peak_bytes[name] = peak.bytes
        advance(losses[-1])
    return peak_bytes


def rounds(found: Mapping[str, Contender], device: torch.device, repeats: int, advance: Advance) -> dict[str, list[float]]:
    """Name -> seconds of a step in each round. The order is reversed from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(repeats):
        names = list(found)
        for name in names if number % 2 == 0 else names[::-1]:
            with found[name]() as step:
                if name in FUSED:
                    step()
                wait(device)
                start = time.perf_counter()
                loss = step()
                wait(device)
                seconds[name].append(time.perf_counter() - start)
            advance(loss)
    return seconds


def wait(device: torch.device) -> None:
    """Return when the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def doubled(value: float | None) -> float | None:
    """Twice a ratio to two passes: one to a single pass."""
    return value and 2 * value


def ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> float | None:
    """Median over rounds of one contender's seconds over another's; None where one was not measured."""
    if above not in seconds or below not in seconds:
        return None
    return median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """A number that a change of any bit changes: two sums over the bits, one weighted by position, modulo 2**64."""
    found = 0
    for tensor in tensors:
        bits = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        for part in bits.split(2**22):
            wide = part.to(torch.int64)
            place = torch.arange(1, 2 * len(wide), 2, device=wide.device)
            found = (found * 31 + int(wide.sum()) * 7 + int((wide * place).sum())) % 2**64
    return found
