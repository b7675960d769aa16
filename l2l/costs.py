"""Predicted peak memory and time per step, from shapes and a short measurement.

Memory is a pure function of sizes, part by part, in bytes. Time is arithmetic of a forward pass and traversals of the weights,
over measured speeds: these take a few hundred milliseconds, once per process and kind of load. Nothing random is drawn, so a
run that is predicted first gives the same results.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from l2l.models import auto_class, kind_of_config
from l2l.models import load as loading
from l2l.models.heads import JoinedParts
from l2l.models.offload import stream_of
from l2l.models.prefix import layer_list
from l2l.models.shapes import SHAPES, shape_config
from l2l.noise import Key, NoiseTerm, TensorSlice, active_backend, add_noise, standard_deviation
from l2l.params import Blocks
from l2l.report.memory import available_bytes, current_bytes
from l2l.tasks.encode import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model. Tied tensors count once."""

    parameters: int
    """All parameters."""
    blocks: tuple[int, ...]
    """Coordinates of each block that is trained."""
    whole: tuple[int, ...]
    """Coordinates of the trained blocks that a forward pass reads whole; of an embedding that is not the head too, only
    rows are looked up."""
    matrices: int
    """Coordinates of the matrices every token is multiplied with: neither embeddings nor the head."""
    layers: int
    heads: int
    width: int
    """Of the hidden states."""
    expanded: int
    """Widest hidden layer of the MLPs."""
    gates: int
    """Projections of that width per layer: 1, or 2 where one gates the other."""
    vocabulary: int
    modules: int
    """Modules without children: each costs a call."""
    eager_attention: bool = False
    """Whether attention scores are materialised."""
    absent: int = 0
    """Coordinates of all layers that are not on the device: they stay in files, or are there only while they compute."""
    visiting: int = 0
    """Coordinates of the offloaded layers that are there at once."""

    @property
    def trained(self) -> int:
        """Coordinates of all blocks together."""
        return sum(self.blocks)

    @property
    def resident(self) -> int:
        """Coordinates of the weights that are on the device at once."""
        return self.parameters - self.absent + self.visiting

    @property
    def head(self) -> int:
        """Coordinates of the matrix that gives the logits."""
        return self.vocabulary * self.width


def config_of(model: str, revision: str | None = None) -> "PreTrainedConfig":
    """The transformers config of a named shape, ``l2l/tiny``, a directory, a gguf file or a hub id. No weights are
    read.

    Raises:
        ValueError: no such shape, or the config cannot be read.
        FileNotFoundError: no such directory, or the model is neither in the local cache nor can it be fetched.
    """
    if model in SHAPES or (model.endswith("-shape") and not Path(model).is_dir()):
        return shape_config(model)
    from transformers import AutoConfig

    source = str(Path(loading.__file__).parent / "tiny") if model == loading.EMBEDDED else model
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    if gguf := loading.gguf_path(model, revision):
        source, options = str(gguf.parent), {"gguf_file": gguf.name}
    elif Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"directory {model!r} has no config.json; give a directory saved by save_pretrained")
    try:
        return AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no config of {model!r} in a directory of that name, in the cache or on the hub: {line}; "
            f"or name a shape: {', '.join(SHAPES)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"cannot read the config of {model!r}: {str(error).strip().splitlines()[0]}") from error


def meta_model(config: "PreTrainedConfig", dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The model of a config with modules and shapes, and no data."""
    with torch.device("meta"):
        return auto_class(kind_of_config(config)).from_config(config, dtype=dtype, trust_remote_code=False)


def model_shape(model: "PreTrainedModel", trained: Blocks | None = None, below: Sequence[torch.nn.Module] = ()) -> ModelShape:
    """Sizes of a model.

    Args:
        trained: its trained blocks; by default all.
        below: layers that passes leave out, because what they give is kept: they count among the parameters alone.
    """
    every = Blocks.of(model, trainable=False)
    skipped = {id(weight) for layer in below for weight in layer.parameters()}
    text: Any = model.config.get_text_config()
    trained = every if trained is None else trained
    output = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    head = getattr(output, "weight", None)
    matrices = [b.tensor for b in every if b.tensor.ndim >= 2 and not b.embedding and b.tensor is not head]
    matrices = [matrix for matrix in matrices if id(matrix) not in skipped]
    width = int(text.hidden_size)
    flat = [tuple(m.shape) for m in matrices if m.ndim == 2]
    expanded = max((max(shape) for shape in flat), default=width)
    layers = int(text.num_hidden_layers) - len(below)
    wide = sum(expanded in shape for shape in flat)
    return ModelShape(
        parameters=every.numel,
        blocks=tuple(block.numel for block in trained),
        whole=tuple(block.numel for block in trained if not block.embedding or block.tensor is head),
        matrices=sum(matrix.numel() for matrix in matrices),
        layers=layers,
        heads=int(getattr(text, "num_attention_heads", 1) or 1),
        width=width,
        expanded=expanded,
        gates=max(1, round(wide / max(layers, 1)) - 1),  # of its matrices one leads back
        vocabulary=int(text.vocab_size),
        modules=_leaves(model) - sum(map(_leaves, below)),
        eager_attention=getattr(model.config, "_attn_implementation", None) == "eager",
    )


def offloaded(shape: ModelShape, model: torch.nn.Module) -> ModelShape:
    """The sizes of a model whose layers are offloaded (:mod:`l2l.models.offload`): two are on the device at once."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layer_list(model) or ()]
    return replace(shape, absent=sum(sizes), visiting=sum(sorted(sizes)[-2:]))


def _leaves(module: torch.nn.Module) -> int:
    return sum(1 for inner in module.modules() if not any(True for _ in inner.children()))


PerturbMode = Literal["in_place", "functional"]
Update = Literal["direct", "master", "stochastic"]

LOSS_BYTES = 4
"""Losses are float32."""


@dataclass(frozen=True)
class Load:
    """Input of one forward pass, all its calls together."""

    rows: int
    length: int
    read: int
    """Places, of all rows together, whose logits are computed."""
    calls: int = 1
    """Calls of the model that the rows are split into by length."""

    @property
    def tokens(self) -> int:
        """Tokens fed, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Plan:
    """How a model is fine-tuned: choices of the run, and the declared costs of the method."""

    dtype: torch.dtype
    perturb: PerturbMode
    update: Update
    passes: float = 2.0
    """Forward passes per step, without those of ``lr="auto"``."""
    num_directions: int = 1
    """Directions per step; 0: a first-order method, which perturbs nothing."""
    state: int = 0
    """Bytes that the method keeps between steps."""
    scratch: int = 0
    """Bytes that a step holds for the method."""
    prefix: int = 0
    """Bytes of hidden states that are kept, below the lowest trained layer."""
    differentiates: bool = False
    """Whether derivatives are taken: activations of all layers are then held, an upper bound where only the last layers
    are differentiated, or in forward mode."""
    learned: bool = False
    """Whether a tuner reads the moments of the weights at each step."""
    one_sided: bool = False
    """Whether the directions of a step share one loss at theta."""
    whole_passes: float | None = None
    """Of the passes, those that run all layers; the others run the last one. None: all do."""

    def work(self, layers: int) -> float:
        """Whole forward passes that take as long as those of a step, of so many layers."""
        whole = self.passes if self.whole_passes is None else self.whole_passes
        return whole + (self.passes - whole) / max(layers, 1)

    @staticmethod
    def of(dtype: torch.dtype, perturb: PerturbMode, update: Update, method: Any, blocks: Blocks) -> "Plan":
        """The plan of a method object for these blocks."""
        directions, state, scratch = (
            getattr(method, "num_directions", 0),
            method.state_bytes(blocks),
            method.scratch_bytes(blocks),
        )
        inside = method
        while not hasattr(inside, "tuner") and hasattr(inside, "inner"):
            inside = inside.inner
        told = {"differentiates": method.differentiates, "learned": hasattr(inside, "tuner")}
        told["one_sided"] = getattr(method, "estimator", "") == "one_sided"
        told["whole_passes"] = getattr(method, "whole_passes", None)
        return Plan(dtype, perturb, update, method.passes, directions, state, scratch, **told)


def choose_perturb_mode(dtype: torch.dtype, perturb: str) -> PerturbMode:
    """How weights are perturbed; ``auto`` is in place where restoring them costs one rounding.

    Raises:
        ValueError: half precision cannot be perturbed in place.
    """
    whole = dtype in (torch.float32, torch.float64)
    if perturb == "in_place" and not whole:
        raise ValueError(
            f"perturb='in_place' needs float32 weights, these are {dtype}: use perturb='functional' or dtype float32"
        )
    return "functional" if perturb == "functional" or not whole else "in_place"


def choose_update(dtype: torch.dtype, update: str, room: int, master: int) -> Update:
    """How an update reaches the weights: float32 takes it directly.

    Args:
        update: ``master``, ``stochastic``, or ``auto``: the master where it takes at most half of the room, else
            stochastic rounding for bfloat16.
        room: bytes left once the weights are loaded.
        master: bytes of a float32 copy of the trained weights.

    Raises:
        ValueError: float16 is to be rounded stochastically.
    """
    if dtype in (torch.float32, torch.float64):
        return "direct"
    if update == "stochastic" and dtype == torch.float16:
        raise ValueError("update='stochastic' rounds to bfloat16: use update='master' or dtype bf16")
    scarce = update == "auto" and 2 * master > room and dtype == torch.bfloat16
    return "stochastic" if update == "stochastic" or scarce else "master"


def activation_bytes(shape: ModelShape, load: Load, dtype: torch.dtype) -> int:
    """Most that a forward pass without gradients holds at once: in an MLP, in attention, or at the logits.

    An MLP holds the residual stream, its input, the expanded states and their activation. Attention holds the residual
    stream, its input, queries, keys and values, the scaled queries, and the output; eager attention the scores and
    their float32 softmax as well. The loss holds the last hidden states, the logits, and their float32 logarithms.
    """
    return load.tokens * load.length * dtype.itemsize + max(_held(shape, load, dtype))


def backward_bytes(shape: ModelShape, load: Load, dtype: torch.dtype) -> int:
    """Most that a forward and backward pass hold at once: the activations of every layer, and the logits with their
    gradient. An upper bound: what autograd frees in time is not told apart.
    """
    mlp, attention, loss = _held(shape, load, dtype)
    return load.tokens * load.length * dtype.itemsize + shape.layers * (mlp + attention) + 2 * loss


def _held(shape: ModelShape, load: Load, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of the tensors that one MLP, one layer's attention and the loss compute."""
    size, d = dtype.itemsize, shape.width
    mlp = load.tokens * (2 * d + (shape.gates + 1) * shape.expanded) * size
    attention = load.tokens * 7 * d * size
    if shape.eager_attention:
        attention += load.tokens * load.length * shape.heads * (size + LOSS_BYTES)
    cast = 0 if dtype == torch.float32 else LOSS_BYTES
    loss = 2 * load.tokens * d * size + load.read * shape.vocabulary * (size + cast + LOSS_BYTES)
    return mlp, attention, loss


def memory_parts(shape: ModelShape, load: Load, plan: Plan) -> dict[str, int]:
    """Bytes of each part at the peak of a step: ``perturb`` are the copies of perturbed blocks, ``master`` the float32 copy
    of the trained weights, ``method`` and ``scratch`` what the method holds between steps and within one."""
    size = plan.dtype.itemsize
    copied = plan.num_directions and plan.perturb == "functional"
    return {
        "weights": shape.resident * size,
        "activations": (backward_bytes if plan.differentiates else activation_bytes)(shape, load, plan.dtype),
        "batch": load.tokens * 16,  # the id and the mask of a token, int64
        "perturb": sum(sorted(shape.whole)[-2:]) * size if copied else 0,  # at most two blocks are copied at a time
        "master": min(shape.trained, shape.resident) * LOSS_BYTES if plan.update == "master" else 0,
        "method": plan.state,
        "scratch": plan.scratch,
        **({"prefix_cache": plan.prefix} if plan.prefix else {}),
    }


def transient_bytes(parts: dict[str, int]) -> int:
    """What steps add to a model that is loaded and a method that is set up."""
    return sum(parts.get(name, 0) for name in ("activations", "batch", "perturb", "scratch", "prefix_cache"))


def inference_bytes(parts: dict[str, int]) -> int:
    """What a forward pass alone would need."""
    return parts["weights"] + parts["activations"] + parts["batch"]


@dataclass(frozen=True)
class Speeds:
    """What this machine does per second, or the seconds it takes."""

    matrices: float
    """FLOP/s of a product with as many rows as tokens are fed in a call."""
    head: float
    """FLOP/s of a product with as many rows as tokens are read in a call."""
    attention: float
    """Seconds of one layer's attention on the rows fed, projections apart."""
    pointwise: float
    """Seconds of one layer's norms, activation and additions on the tokens fed."""
    logits: float
    """Seconds to turn one logit into a log-probability."""
    module: float
    """Seconds to call one module on hardly any data."""
    one_stream: float
    """Elements/s of a traversal that adds one direction."""
    two_streams: float
    """Elements/s of a traversal that removes one direction and adds another."""
    block: float
    """Seconds a traversal spends on each block, however small."""


@dataclass(frozen=True)
class Passes:
    """Forward passes and traversals of the weights in a mean step."""

    forwards: float
    one_stream: float
    two_streams: float


def forward_flops(shape: ModelShape, load: Load) -> dict[str, int]:
    """FLOP of a forward pass: 2 per matrix coordinate and token, 2 per head coordinate and token read, 4 per pair of
    tokens and coordinate of a layer's attention."""
    return {
        "matrices": 2 * load.tokens * shape.matrices,
        "head": 2 * load.read * shape.head,
        "attention": 4 * load.tokens * load.length * shape.width * shape.layers,
    }


def forward_seconds(shape: ModelShape, load: Load, speeds: Speeds) -> float:
    """Seconds of one forward pass with its loss."""
    flops = forward_flops(shape, load)
    products = flops["matrices"] / speeds.matrices + flops["head"] / speeds.head
    around = shape.layers * (speeds.attention + speeds.pointwise) + load.calls * shape.modules * speeds.module
    return products + around + load.read * shape.vocabulary * speeds.logits


def step_passes(plan: Plan, every: int = 0) -> Passes:
    """Forward passes and traversals of a step, in a loop that owns the model.

    In place, a traversal per forward pass: half of them to the other side of a direction, half from there to the next one;
    one-sided, from each direction to the next, and by way of theta. One of them makes the update, and adds a direction for
    each but the first, two at a time. Functional: a copy for each forward pass, and the update per direction; a learned
    method also reads the weights. A first-order method traverses the weights once.

    Args:
        every: steps between the extra losses of ``lr="auto"``, at unperturbed weights; 0: there are none.
    """
    third = 1 / every if every else 0.0
    forwards = plan.passes + third
    if not plan.num_directions:
        return Passes(forwards, 1, 0)
    if plan.perturb == "in_place":
        to_next, update = plan.passes - 2 if plan.one_sided else plan.passes / 2, (plan.num_directions - 1) / 2
        return Passes(forwards, plan.passes - to_next + 2 * third, to_next + update - third)
    return Passes(forwards, forwards + plan.num_directions + plan.learned, 0)


def traversal_seconds(shape: ModelShape, passes: Passes, speeds: Speeds) -> float:
    """Seconds a step spends on perturbing and updating the weights."""
    elements = shape.trained * (passes.one_stream / speeds.one_stream + passes.two_streams / speeds.two_streams)
    return elements + (passes.one_stream + passes.two_streams) * len(shape.blocks) * speeds.block


def step_seconds(shape: ModelShape, load: Load, passes: Passes, speeds: Speeds) -> float:
    """Seconds of a mean step."""
    return passes.forwards * forward_seconds(shape, load, speeds) + traversal_seconds(shape, passes, speeds)


_REPEATS, _SECONDS = 8, 0.04
"""A measurement is repeated so often, or until it has taken so long."""
_LIMITS = {"cpu": (4.0e8, 2**24), "cuda": (4.0e12, 2**28)}
"""Device -> FLOP of the product measured, and most coordinates of its matrix."""
_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Most elements of the states that attention and pointwise work are measured on; larger ones are in proportion."""
_WEIGHTS = {"reference": 2**20, "cpu": 2**22, "cuda": 2**28}
"""Weights traversed, by backend or else device."""


def speeds_for(shape: ModelShape, load: Load, dtype: torch.dtype, device: torch.device | str = "cpu") -> Speeds:
    """Measured speeds for the sizes of a model and its load."""
    device = torch.device(device)
    threads = torch.get_num_threads()
    # Loads that differ by little share a measurement: rows up to a power of two.
    rounded = [1 << max(0, (rows - 1).bit_length()) for rows in (load.tokens, load.read)]
    products = [_product_speed(rows, shape.width, dtype, device, threads) for rows in rounded]
    size, most = max(1, shape.width // shape.heads), _limit(_ELEMENTS, device)
    rows = min(load.rows, max(1, most // (load.length * shape.heads * size)))
    attention = _attention_seconds((rows, shape.heads, load.length, size), dtype, device, threads) * load.rows / rows
    tokens = min(load.tokens, max(1, most // shape.expanded))
    pointwise = _pointwise_seconds(tokens, shape.width, shape.expanded * shape.gates, dtype, device, threads)
    pointwise = pointwise * load.tokens / tokens
    one, two, block = _traversal_speeds(dtype, device, threads)
    logits, module = _small_seconds(device, threads)
    return Speeds(products[0], products[1], attention, pointwise, logits, module, one, two, block)


@torch.no_grad()
def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some runs, after one that does not count. Other load on the machine only ever makes a run slower."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    work()
    taken: list[float] = []
    while len(taken) < _REPEATS and sum(taken) <= _SECONDS:
        wait()
        begin = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _limit(table: dict[str, Any], device: torch.device) -> Any:
    return table["cuda" if device.type == "cuda" else "cpu"]


# The measurements are cached by all that they depend on, the number of threads among it.


@lru_cache(maxsize=64)
def _product_speed(rows: int, width: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """FLOP/s of [rows, width] times a matrix: few rows stream a large matrix, many rows reuse a small one."""
    flops, coordinates = _limit(_LIMITS, device)
    rows, width = min(rows, 4096), min(width, 8192)
    columns = max(16, min(int(flops / (2 * rows * width)), coordinates // width))
    states = torch.full((rows, width), 0.5, dtype=dtype, device=device)
    matrix = torch.full((columns, width), 0.25, dtype=dtype, device=device)
    return 2 * rows * width * columns / seconds_of(lambda: torch.nn.functional.linear(states, matrix), device)


@lru_cache(maxsize=64)
def _attention_seconds(form: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """Seconds of attention on states [rows, heads, length, size of a head]."""
    state, (rows, _, length, _) = torch.full(form, 0.5, dtype=dtype, device=device), form
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(rows, 1, length, length)
    work = torch.nn.functional.scaled_dot_product_attention
    return seconds_of(lambda: work(state, state, state, attn_mask=mask).transpose(1, 2).contiguous(), device)


@lru_cache(maxsize=64)
def _pointwise_seconds(tokens: int, width: int, expanded: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
    state = torch.full((tokens, width), 0.5, dtype=dtype, device=device)
    wide = torch.full((tokens, expanded), 0.5, dtype=dtype, device=device)
    twice = [lambda: torch.nn.functional.layer_norm(state, (width,)), lambda: torch.add(state, state)] * 2
    return seconds_of(lambda: [work() for work in (*twice, lambda: torch.nn.functional.gelu(wide))], device)


@lru_cache(maxsize=8)
def _small_seconds(device: torch.device, threads: int) -> tuple[float, float]:
    """Seconds per logit of the loss, and per module called."""
    rows, columns = 16, 2**15
    logits = torch.full((rows, columns), 0.5, device=device)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    loss = seconds_of(lambda: torch.nn.functional.cross_entropy(logits, targets, reduction="none"), device)
    module, little = torch.nn.Linear(8, 8, device="meta").to_empty(device=device), torch.zeros(8, 8, device=device)
    call = seconds_of(lambda: [module(little) for _ in range(32)], device) / 32
    # A model's module costs about four small calls: its own, and those around it (views, additions, checks).
    return loss / (rows * columns), 4 * call


@lru_cache(maxsize=8)
def _traversal_speeds(dtype: torch.dtype, device: torch.device, threads: int) -> tuple[float, float, float]:
    """Elements/s with one direction and with two, and seconds per block."""
    backend = active_backend(device, dtype)
    count = _WEIGHTS[backend] if backend in _WEIGHTS else _limit(_WEIGHTS, device)
    flat = torch.zeros(count, dtype=dtype, device=device)
    unit = 2.0**-20 / standard_deviation("gaussian")
    here, there = NoiseTerm(Key(0), [(unit,)]), NoiseTerm(Key(0, 1), [(unit,)])
    both = NoiseTerm(Key(0), [(unit, -unit)])
    whole = [TensorSlice(flat, "calibration")]
    one = seconds_of(lambda: add_noise(whole, [here]), device)
    two = seconds_of(lambda: add_noise(whole, [both, there]), device)
    slices = [TensorSlice(flat[16 * i : 16 * (i + 1)], f"calibration.{i}") for i in range(64)]
    small = NoiseTerm(Key(0), [(unit,)] * len(slices))
    return count / one, count / two, seconds_of(lambda: add_noise(slices, [small]), device) / len(slices)


@dataclass(frozen=True)
class Prediction:
    """Predicted needs of a step."""

    parts: dict[str, int]
    """Bytes by part; see :func:`memory_parts`."""
    passes: float
    """Forward passes per step, all included."""
    work: float
    """Whole forward passes that take as long."""
    seconds_per_forward: float | None
    seconds_per_step: float | None
    """None where nothing was measured."""

    @property
    def bytes(self) -> int:
        """Of all parts together."""
        return sum(self.parts.values())


def predict(
    shape: ModelShape, peak: Load, mean: Load, plan: Plan, device: torch.device | str | None = None, every: int = 0
) -> Prediction:
    """Memory and time of a step.

    Args:
        peak: the largest load, which decides the memory.
        mean: the load of a mean step, which decides the time.
        device: where speeds are measured; None: time is not predicted.
        every: steps between the extra losses of ``lr="auto"``; 0: there are none.
    """
    passes, parts = step_passes(plan, every).forwards, memory_parts(shape, peak, plan)
    timed = step_passes(replace(plan, passes=plan.work(shape.layers)), every)
    if device is None:
        return Prediction(parts, passes, timed.forwards, None, None)
    speeds = speeds_for(shape, mean, plan.dtype, device)
    seconds = forward_seconds(shape, mean, speeds), step_seconds(shape, mean, timed, speeds)
    return Prediction(parts, passes, timed.forwards, *seconds)


def advice(shape: ModelShape, load: Load, plan: Plan, room: int) -> str:
    """One line: whether it fits, else the smallest change that makes it fit."""
    needed = sum(memory_parts(shape, load, plan).values())
    have = f"needs {gib(needed)} of {gib(room)} available"
    if needed <= room:
        return f"fits: {have}"
    for words, other_load, other_plan in _changes(load, plan):
        lower = sum(memory_parts(shape, other_load, other_plan).values())
        if lower <= room:
            return f"does not fit: {have}; with {words} it needs {gib(lower)} and fits"
    return f"does not fit: {have}; no smaller batch or dtype helps: use a smaller model, or a machine with more memory"


def _changes(load: Load, plan: Plan) -> list[tuple[str, Load, Plan]]:
    """Smaller runs, the mildest change first."""

    def fewer(rows: int) -> Load:
        return Load(rows, load.length, max(1, load.read * rows // load.rows))

    found: list[tuple[str, Load, Plan]] = []
    thin, halves = plan, [load.rows >> shift for shift in range(1, load.rows.bit_length())]
    if plan.update == "master" and plan.dtype == torch.bfloat16:
        thin = replace(plan, update="stochastic")
        found.append(("update stochastic", load, thin))
    found += [(f"batch_size {rows}", fewer(rows), plan) for rows in halves]
    if plan.dtype in (torch.float32, torch.float64):
        thin = replace(plan, dtype=torch.bfloat16, perturb="functional", update="stochastic")
        found.append(("dtype bf16 and update stochastic", load, thin))
    if thin is not plan:
        together = "update stochastic and batch_size 1" if thin.dtype == plan.dtype else "dtype bf16 and batch_size 1"
        found.append((together, fewer(1), thin))
    return found


def gib(size: int) -> str:
    """A size in words."""
    return f"{size / 2**30:.2f} GiB"


@dataclass(frozen=True)
class Expectation:
    """Predicted needs of a run."""

    peak_bytes: int
    """Of the process on the CPU, of tensors on CUDA; what is in use now included."""
    seconds_per_step: float | None
    """None where it was not worth measuring."""
    missing: int
    """Bytes by which the peak exceeds what there is; 0 where the run fits."""
    passes_per_step: float = 2.0
    """Forward passes, MeZO's by default; a backward pass counts as two."""
    work_per_step: float = 2.0
    """Whole forward passes that take as long."""

    def line(self, steps: int | None = None, passes: int | None = None, seconds: float | None = None) -> str:
        """One line for a terminal, about a run that ends with the first of these limits."""
        words = f"expected: {gib(self.peak_bytes)} at most"
        if self.missing:
            words += f", {gib(self.missing)} more than there is: lower batch_size or max_length"
        if self.seconds_per_step is not None:
            count = self.steps(steps, passes, seconds)
            words += f", {self.seconds_per_step:.3g} s per step, {self.seconds_per_step * count / 3600:.2g} h for {count} steps"
        return words

    def steps(self, steps: int | None = None, passes: int | None = None, seconds: float | None = None) -> int:
        """Expected steps of a run that ends with the first of these limits, of which there is one."""
        per_step = (1, steps), (self.passes_per_step, passes), (self.seconds_per_step, seconds)
        return min(ceil(limit / each) for each, limit in per_step if each is not None and limit is not None)


def expect(
    model: "PreTrainedModel",
    blocks: Blocks,
    perturb: PerturbMode,
    masters: bool,
    method: Any,
    batches: Sequence[Batch],
    evaluated: Sequence[Batch],
    measure: bool,
    every: int = 0,
    below: Sequence[torch.nn.Module] = (),
    prefix: int = 0,
) -> Expectation:
    """Peak memory and seconds per step of a run about to begin.

    Args:
        blocks: the trained blocks.
        perturb: how they are perturbed.
        masters: whether half-precision weights have float32 masters.
        method: the method object, its state already made.
        batches: some batches of steps; time follows from their mean, memory from the largest.
        evaluated: some batches of evaluations.
        measure: whether to measure this machine for the time; a few hundred milliseconds, once per process.
        every: steps between the extra losses of ``lr="auto"``; 0: there are none.
        below: layers that steps leave out; ``prefix``: bytes of memory in which what they give is kept.
    """
    shape, dtype = model_shape(model, blocks, below), model.dtype
    if stream_of(model) is not None:
        shape = offloaded(shape, model)
    calls = [load for batch in (*batches, *evaluated) for load in loads_of(batch)]
    largest = max(calls, key=lambda load: activation_bytes(shape, load, dtype))
    mean = mean_load([loads_of(batch) for batch in batches])
    plan = replace(Plan.of(dtype, perturb, "master" if masters else "direct", method, blocks), prefix=prefix)
    used, room = current_bytes(model.device), available_bytes(model.device)  # before anything is measured
    found = predict(shape, largest, mean, plan, model.device if measure else None, every)
    more = transient_bytes(found.parts)
    return Expectation(used + more, found.seconds_per_step, max(0, more - room), found.passes, found.work)


EVALUATION_WORK = 0.5
"""Work of evaluations over that of training, at most, where the configuration leaves their rows open: a third of a run."""
FREE_OPERATIONS = 1e12
"""Floating-point operations of evaluations, half a minute of a thread, below which it is not worth leaving rows out."""
FEWEST_ROWS = 32
"""Rows, one forward pass, below which no evaluation goes: fewer would say nothing."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Rows that each evaluation of a run takes, by kind, beside the work of its training."""

    train: int
    dev: int
    test: int
    every: int
    """Steps between evaluations on dev."""
    steps: int
    """Expected number of steps."""
    training: float
    """Evaluations of a row that would feed as many tokens as training does."""

    @property
    def before(self) -> float:
        """Rows evaluated before training."""
        return self.train + self.dev

    @property
    def during(self) -> float:
        """Rows evaluated during training."""
        return self.dev * ceil(self.steps / self.every)

    @property
    def whole(self) -> float:
        """Rows of all evaluations and of training."""
        return self.before + self.during + self.training + self.before + 2 * self.test


def evaluated_rows(
    there: Mapping[str, int], asked: Collection[str], times: Mapping[str, int], row: float, trained: float, parameters: int
) -> dict[str, int]:
    """Rows to evaluate, by kind: all, or as many as keep all evaluations of a run within a third of it.

    A pure function of counts, so that every machine, and a run that is continued, evaluates the same rows.

    Args:
        there: rows that there are, by kind.
        asked: kinds whose number the user has set: they keep all of them.
        times: evaluations in the whole run, by kind.
        row: tokens that an evaluation feeds per row.
        trained: tokens that training feeds, all passes together.
        parameters: of the model; a token takes two operations for each.
    """
    allowed = max(EVALUATION_WORK * trained, FREE_OPERATIONS / (2 * parameters)) / row
    left = allowed - sum(there[kind] * times[kind] for kind in asked)
    wanted = sum(there[kind] * times[kind] for kind in there if kind not in asked)
    share = min(1.0, max(0.0, left) / max(wanted, 1))
    fewer = {kind: min(count, max(FEWEST_ROWS, int(count * share))) for kind, count in there.items()}
    return {kind: count if kind in asked else fewer[kind] for kind, count in there.items()}


def loads_of(batch: Batch) -> list[Load]:
    """The load of a batch, call by call."""
    found = []
    for joined in JoinedParts.of(batch.parts or (batch,)):
        read = sum(len(call.rows) for call in joined.parts)  # the last of them goes through the head for all
        for call in joined.parts:
            rows, columns = call.input_ids.shape
            found.append(Load(rows, columns, read if call is joined.parts[-1] else 0))
    return found


def mean_load(batches: Sequence[Sequence[Load]]) -> Load:
    """Rows, length, tokens read and calls of a mean batch, from the calls of some."""
    count, loads = len(batches), [load for calls in batches for load in calls]
    rows = max(1, round(sum(load.rows for load in loads) / count))
    tokens = sum(load.tokens for load in loads) / count
    read = round(sum(load.read for load in loads) / count)
    return Load(rows, max(1, round(tokens / rows)), read, round(len(loads) / count))
