"""``l2l simulate``: seconds of a step over many machines, from a model of compute, noise, exchange and waiting.

Three ways to spend R copies of a model on a step are compared. They differ in what travels:

- data parallel, zeroth order: each rank evaluates its share of the batch at the same perturbed weights; 2 losses per direction
  travel, by recursive doubling in log2(R) messages;
- population parallel: each rank evaluates its share of N directions on the whole batch; 2 losses per direction travel, and
  every rank makes the noise of all N directions to take the step: this, not the network, bounds the population;
- backpropagation, data parallel: the gradients travel, by a ring all-reduce (Patarasuk and Yuan 2009) whose bytes per rank,
  2 (R - 1) / R times the gradient, do not fall with R.

The functions are of seconds per copy (:class:`Copy`) and of a network (:class:`Network`), so that they are checked against
processes of one machine (``benchmarks/simulated_ranks.py``) and then asked about clusters, whose figures are assumptions: the
command prints each with its reason. What a step is worth is not part of the model: a zeroth-order step moves along N random
directions, a step of backpropagation along the gradient.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import ceil, log2
from statistics import NormalDist
from typing import Any

from l2l.arguments import Arguments
from l2l.methods.base import check_counts, check_positive
from l2l.report.console import print_table
from l2l.report.run_directory import RunDirectory

LOSS_BYTES = 8
"""Of a loss as it travels: a float64."""
SIDES = 2
"""Losses per direction: at theta + epsilon u and theta - epsilon u."""
FORWARD_FLOPS, BACKWARD = 2, 2
"""Operations per parameter and token of a forward pass (a product and a sum); a backward pass takes twice a forward."""
NOISE_OPERATIONS = 23
"""Integer operations per Gaussian number of :mod:`l2l.noise.reference`: 13 of the hash, 10 to sum its bytes and add them."""


@dataclass(frozen=True)
class Copy:
    """Seconds that one copy of the model takes, on all the devices that hold it."""

    fixed: float
    """Of a forward pass, whatever its tokens."""
    per_token: float
    """Of a forward pass, per token."""
    traversal: float
    """To read and write all weights once."""
    noise: float
    """To make the noise of one direction for all weights."""

    def forward(self, tokens: float) -> float:
        """Of a forward pass."""
        return self.fixed + self.per_token * tokens

    def move(self, directions: int) -> float:
        """To move all weights along so many directions in one traversal: making noise and moving memory overlap."""
        return max(self.traversal, directions * self.noise)


@dataclass(frozen=True)
class Network:
    """What ranks share, and how they differ."""

    latency: float
    """Seconds of a message without content."""
    bandwidth: float
    """Bytes per second of a rank, each way."""
    spread: float = 0.0
    """Standard deviation of a rank's computing time over its mean: some ranks are late."""
    cores: int | None = None
    """Ranks that can compute at the same time, where they share a machine; None: each has its own."""

    def message(self, size: float) -> float:
        """Seconds of a message of so many bytes."""
        return self.latency + size / self.bandwidth

    def crowding(self, ranks: int) -> float:
        """Factor of the computing time where ranks take turns on the cores."""
        return 1.0 if self.cores is None else max(1.0, ranks / self.cores)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by cause."""

    compute: float
    """Forward and backward passes of a rank of mean speed."""
    noise: float
    """Perturbing, and updating: noise and traversals; of backpropagation, the optimizer's traversal."""
    exchange: float
    """Messages that nothing hides."""
    waiting: float
    """For ranks that are late."""
    bytes_sent: float
    """By each rank."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.noise + self.exchange + self.waiting


def expected_place(place: int, ranks: int) -> float:
    """Expected value of the ``place``-th smallest of ``ranks`` standard normal numbers, within 5 % of a standard deviation.

    Blom 1958, Statistical Estimates and Transformed Beta-Variables: the quantile at (k - 3/8) / (n + 1/4).
    """
    return NormalDist().inv_cdf((place - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def waiting(busy: float, network: Network, ranks: int, quorum: float = 1.0) -> float:
    """Seconds beyond the mean ``busy`` until the share ``quorum`` of the ranks is done; at least 0."""
    return max(0.0, network.spread * busy * expected_place(ceil(quorum * ranks), ranks))


def shared_floats(network: Network, ranks: int, values: int) -> tuple[float, float]:
    """(seconds, bytes sent by each rank) until every rank has so many floats summed over all: recursive doubling."""
    rounds, size = ceil(log2(ranks)), values * LOSS_BYTES
    return rounds * network.message(size), float(rounds * size)


def gathered_floats(network: Network, ranks: int, values: int) -> tuple[float, float]:
    """(seconds, bytes sent by each rank) until every rank has the floats of all, ``values`` together: recursive doubling, in
    which what a rank has heard of doubles."""
    rounds = ceil(log2(ranks))
    size = values * LOSS_BYTES * (ranks - 1) / ranks
    return rounds * network.latency + size / network.bandwidth, size


def ring_all_reduce(network: Network, ranks: int, size: float) -> tuple[float, float]:
    """(seconds, bytes sent by each rank) until every rank has the sum of arrays of so many bytes.

    Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69(2): 2 (R - 1) messages of 1 / R of the array.
    """
    messages = 2 * (ranks - 1)
    return messages * network.message(size / ranks), messages * size / ranks


def data_parallel(copy: Copy, network: Network, ranks: int, tokens: float, directions: int = 1) -> StepTime:
    """A zeroth-order step whose batch of ``tokens`` is split over the ranks."""
    busy = directions * SIDES * copy.forward(tokens / ranks) * network.crowding(ranks)
    noise = directions * SIDES * copy.move(1) * network.crowding(ranks)  # the update rides on the second traversal
    exchange, sent = shared_floats(network, ranks, directions * SIDES)
    return StepTime(busy, noise, exchange, waiting(busy + noise, network, ranks), sent)


def population(copy: Copy, network: Network, ranks: int, tokens: float, directions: int, quorum: float = 1.0) -> StepTime:
    """A zeroth-order step whose ``directions`` are split over the ranks, each on the whole batch of ``tokens``.

    Args:
        quorum: share of the ranks that a step waits for.
    """
    own = ceil(directions / ranks)
    busy = own * SIDES * copy.forward(tokens) * network.crowding(ranks)
    perturbing = own * SIDES * copy.move(1) * network.crowding(ranks)
    update = copy.move(directions) * network.crowding(ranks)
    exchange, sent = gathered_floats(network, ranks, directions * SIDES)
    return StepTime(busy, perturbing + update, exchange, waiting(busy + perturbing, network, ranks, quorum), sent)


def backpropagation(
    copy: Copy, network: Network, ranks: int, tokens: float, gradient_bytes: float, state_traversals: float
) -> StepTime:
    """A step of backpropagation whose batch is split over the ranks; the all-reduce hides behind the backward pass.

    Args:
        gradient_bytes: that each device has to reduce with those of the other copies.
        state_traversals: of the optimizer, over the traversal of the weights alone.
    """
    forward = copy.forward(tokens / ranks) * network.crowding(ranks)
    exchange, sent = ring_all_reduce(network, ranks, gradient_bytes)
    busy = (1 + BACKWARD) * forward
    left = max(0.0, exchange - BACKWARD * forward)
    update = state_traversals * copy.traversal * network.crowding(ranks)
    return StepTime(busy, update, left, waiting(busy, network, ranks), sent)


@dataclass(frozen=True)
class SimulateConfig(Arguments):
    """Simulate a step on many GPUs: zeroth order by data or by population, and backpropagation."""

    parameters: list[float] = field(default_factory=lambda: [1e9, 70e9, 1e12])
    """Parameters of the models."""
    gpus: list[int] = field(default_factory=lambda: [8, 64, 512, 4096])
    """Numbers of GPUs."""
    tokens: int = 2**20
    """Tokens of a step's batch by data parallelism, of either kind: 512 rows of 2048."""
    directions: int = 1024
    """Population size N: directions of a step by population parallelism. By data parallelism a step has one."""
    member_tokens: int = 2**14
    """Tokens that each member of the population is evaluated on: 8 rows of 2048."""
    quorum: float = 1.0
    """Share of the ranks that a population step waits for; the members of later ones are left out. 1: all."""
    flops: float = 989e12
    """Operations per second of a GPU, bfloat16 without sparsity: data sheet of the H100 SXM."""
    utilisation: float = 0.4
    """Share of ``flops`` that passes reach, forward and backward: assumed, the same for all; what splitting one copy over GPUs
    costs is within it."""
    memory: float = 80e9
    """Bytes of a GPU: data sheet of the H100 SXM."""
    filled: float = 0.8
    """Share of ``memory`` for weights and training state; the rest is for activations: assumed."""
    memory_bandwidth: float = 3.35e12
    """Bytes per second between a GPU and its memory: data sheet of the H100 SXM."""
    integer_rate: float = 14.8e12
    """Integer operations per second of a GPU: 64 per cycle and multiprocessor, 132 of these, 1.755 GHz, from data sheets. Noise
    takes 23 operations per number, counted in l2l/noise/reference.py."""
    kernel_share: float = 0.5
    """Share of ``memory_bandwidth`` and ``integer_rate`` that noise and traversals reach: assumed, not measured on a GPU."""
    network_bandwidth: float = 50e9
    """Bytes per second and GPU between machines, each way: one port of 400 Gbit/s per GPU."""
    latency: float = 2e-5
    """Seconds of a message between machines without content: assumed for a collective's hop, software included."""
    spread: float = 0.05
    """Standard deviation of a copy's computing time over its mean: assumed."""
    weight_bytes: float = 2.0
    """Bytes per parameter of a zeroth-order run: bfloat16 weights, and no state beside them (updates by stochastic
    rounding)."""
    training_bytes: float = 16.0
    """Bytes per parameter of AdamW in mixed precision: weights and gradients in bfloat16, a copy and two moments in float32."""
    gradient_bytes: float = 2.0
    """Bytes per parameter of the gradients that are reduced: bfloat16."""
    out: str | None = None
    """Directory for ``config.yaml`` and ``summary.json``; None: print only."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {f"gpus[{i}]": value for i, value in enumerate(self.gpus)}
        check_counts(**counts, tokens=self.tokens, directions=self.directions, member_tokens=self.member_tokens)
        check_positive(**{f"parameters[{i}]": value for i, value in enumerate(self.parameters)})
        check_positive(**{name: getattr(self, name) for name in _PHYSICAL})
        for name in ("quorum", "utilisation", "filled", "kernel_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share: above 0, at most 1")
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread={self.spread} must be at least 0 and below 1")


_PHYSICAL = (
    *("flops", "memory", "memory_bandwidth", "integer_rate", "network_bandwidth", "latency"),
    *("weight_bytes", "training_bytes", "gradient_bytes"),
)
_RUN = ("parameters", "gpus", "out", "overwrite")
"""Fields that are no assumptions: rows of the table, and where it goes."""


def copies(config: SimulateConfig, parameters: float, gpus: int, bytes_per_parameter: float) -> tuple[int, int]:
    """(GPUs per copy, copies) where so many bytes per parameter fit; the GPUs of a copy are a power of two. Copies may be 0."""
    least = parameters * bytes_per_parameter / (config.memory * config.filled)
    group = 2 ** max(0, ceil(log2(least)))
    return group, gpus // group


def copy_of(config: SimulateConfig, parameters: float, gpus: int) -> Copy:
    """Seconds of one copy that is spread over so many GPUs."""
    share = parameters / gpus
    traversal = 2 * share * config.weight_bytes / (config.memory_bandwidth * config.kernel_share)
    noise = share * NOISE_OPERATIONS / (config.integer_rate * config.kernel_share)
    return Copy(0.0, FORWARD_FLOPS * share / (config.flops * config.utilisation), traversal, noise)


def simulated(config: SimulateConfig, parameters: float, gpus: int) -> list[dict[str, Any]]:
    """A row for each of the three ways: copies, seconds by cause, and bytes sent by each GPU; ``copies`` 0: it does not fit."""
    network = Network(config.latency, config.network_bandwidth, config.spread)
    rows = []
    for way in ("ZO, data", "ZO, population", "backpropagation"):
        first_order = way == "backpropagation"
        group, number = copies(config, parameters, gpus, config.training_bytes if first_order else config.weight_bytes)
        row: dict[str, Any] = {"parameters": f"{parameters:.0e}", "GPUs": gpus, "way": way, "GPUs per copy": group}
        row["copies"] = number
        found = None
        if number:
            copy = copy_of(config, parameters, group)
            if way == "ZO, data":
                found = data_parallel(copy, network, number, config.tokens)
            elif way == "ZO, population":
                found = population(copy, network, number, config.member_tokens, config.directions, config.quorum)
            else:
                gradient = parameters / group * config.gradient_bytes
                found = backpropagation(copy, network, number, config.tokens, gradient, _state_traversals(config))
        names = [one.name for one in fields(StepTime)]
        row |= {"seconds": found and found.total} | {name: found and getattr(found, name) for name in names}
        rows.append(row)
    return rows


def _state_traversals(config: SimulateConfig) -> float:
    return config.training_bytes / config.weight_bytes


def markdown_table(config: SimulateConfig) -> list[str]:
    """Lines of a table of Markdown, as docs/scale.md has it: a row for each model and number of GPUs."""
    ways = ["copies", "ZO, data", "ZO, population", "of it noise", "copies", "backpropagation", "of it exchange"]
    lines = ["| parameters | GPUs | " + " | ".join(ways) + " |", "|--:" * (2 + len(ways)) + "|"]
    for parameters in config.parameters:
        for gpus in config.gpus:
            data, many, first = simulated(config, parameters, gpus)
            cells = [data["copies"], data["seconds"], many["seconds"], _part(many, "noise")]
            cells += [first["copies"], first["seconds"], _part(first, "exchange")]
            shown = ["-" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
            lines.append(f"| {parameters:.0e} | {gpus} | " + " | ".join(shown) + " |")
    return lines


def _part(row: Mapping[str, Any], name: str) -> str | None:
    return None if row["seconds"] is None else f"{row[name] / row['seconds']:.0%}"


def assumptions(config: SimulateConfig) -> list[dict[str, str]]:
    """Name, value and reason of every number that the table rests on."""
    from docstring_parser import parse_from_object

    reasons = {one.arg_name: " ".join((one.description or "").split()) for one in parse_from_object(SimulateConfig).params}
    names = [one.name for one in fields(config) if one.name not in _RUN]
    return [{"assumption": name, "value": f"{getattr(config, name):g}", "what it is": reasons[name]} for name in names]


def run_simulation(config: SimulateConfig) -> list[dict[str, Any]]:
    """Print the table and its assumptions, and write them to ``out`` where one is given; the rows.

    Raises:
        ValueError: ``out`` holds something else.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite) if config.out else None
    rows = [row for parameters in config.parameters for gpus in config.gpus for row in simulated(config, parameters, gpus)]
    shown = [{name: "-" if value is None else value for name, value in row.items()} for row in rows]
    print_table("simulated seconds per step (nothing here is measured; copies 0: does not fit)", shown)
    print_table("assumptions", assumptions(config))
    print(
        "A data-parallel step has one direction on all tokens, a population step all directions on member_tokens each; a step "
        "of backpropagation moves along the gradient of all tokens. Seconds compare steps, not progress."
    )
    if folder is not None:
        folder.create()
        folder.finish({"rows": rows, "assumptions": assumptions(config), "config": asdict(config)})
    return rows
