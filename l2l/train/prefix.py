"""The prefix cache of a run: whether there is one, of which rows, where it lies; filled when a row is first met.

The rows are those of the first epoch's batches and of the evaluations, computed in these batches, so that a run that is resumed
computes the same. On disk, or where the layers below are not in memory, all are computed before the first step. A batch that
brings another row (laid out in another way, or fed by an objective of the user's) is run whole.
"""

import errno
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final, get_args

import torch

from l2l.estimators import finite_loss
from l2l.models import prefix
from l2l.models.heads import TokenQuery, output_embedding
from l2l.models.load import context_length
from l2l.models.streaming import LayerFiles
from l2l.params import PerturbedParameters
from l2l.report import run_directory
from l2l.report.console import Advance, Bars
from l2l.report.memory import available_bytes
from l2l.tasks.base import Row
from l2l.tasks.evaluate import evaluation_batches
from l2l.train.config import CompleteConfig
from l2l.train.inputs import Closures, RunInputs
from l2l.train.objectives import LOSS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FILE = "prefix_cache.safetensors"
"""In the run's directory, while the run is not finished."""
REPORTED = b"reported train"
"""The namespace of the train rows that are evaluated: in batches of their own, long before the steps come to most of them."""
SHARE = 0.5
"""Of the memory, or disk, that is free: at most so much is taken without being asked for. The rest is the steps'."""

Place: TypeAlias = Literal["memory", "pinned", "disk"]
"""The model's device, the host's page-locked memory, or a file that is mapped."""


@final
@dataclass
class RunPrefix:
    """A cache, what to fill it with, and what that took."""

    cache: prefix.PrefixCache
    trace: prefix.LayerTrace
    fills: list[prefix.Fill]
    place: Place
    context: int
    """Most tokens of a row."""
    files: LayerFiles | None
    """Of lower layers that are not in memory."""
    pass_seconds: float
    """Of the forward pass over the first step's batch with which the cache was tried; 0 where it could not be."""
    fill_seconds: float = 0.0
    """Of computing the states of that batch."""
    built_seconds: float = 0.0
    """Of building the cache before the first step."""

    @property
    def size(self) -> int:
        """Bytes of the states of all rows."""
        return states_bytes(self.fills, self.trace)

    @property
    def seconds(self) -> float:
        """Of computing states, before the first step and within steps and evaluations."""
        return self.built_seconds + self.cache.seconds

    @contextmanager
    def reported(self) -> Iterator[None]:
        """While train rows are evaluated: their batches have states of their own."""
        self.cache.namespace = REPORTED
        try:
            yield
        finally:
            self.cache.namespace = b""

    def build(self, inputs: RunInputs, closures: Closures, steps: int, folder: run_directory.RunDirectory, bars: Bars) -> None:
        """Plan the rows, which are computed when they are met; or compute them now where the layers below are in files, or the
        states go to disk, or map those that this run wrote there before it was interrupted. The cache must be attached.

        Args:
            inputs: whose splits are those that are evaluated.
            steps: that the run may take; rows of later ones are computed whole, unless they come again.

        What the run left there is named in a line, and computed anew, where it is gone, damaged, or of other rows, weights or
        settings.

        Raises:
            ValueError: the disk is full.
        """
        began, cache, target = time.perf_counter(), self.cache, folder.path / FILE
        if self.files is None and self.place != "disk":
            self.plan(inputs, closures, inputs.config.steps)
            return
        # Without the lower layers a row that is not kept cannot be computed; and what fits into max_seconds is a measurement,
        # which a run that is broken off before its first checkpoint makes anew: its file would be of other rows.
        if self.files is None and inputs.config.max_seconds is None:  # else the rows of the first epoch
            self.fills = _planned(inputs, closures, steps)
        with bars.phase("prefix cache", len(self.fills), 0.0) as advance:
            if self.place == "disk":
                read = None if self.files is None else self.files.tensor
                identity = prefix.prefix_identity(cache.model, self.trace, cache.lowest, self.fills, self.context, read)
                if not ((folder.resumed or target.exists()) and self._read(target, identity)):
                    self._write(target, identity, advance)
                    cache.rows = read_rows(target, identity)
            else:
                for fill, states in self._computed(advance):
                    cache.keep(fill, states.cpu().pin_memory() if self.place == "pinned" else states)
        self.built_seconds += time.perf_counter() - began

    def plan(self, inputs: RunInputs, closures: Closures, steps: int | None) -> None:
        """Plan the rows of so many steps, for a cache in memory that computes them when they are met."""
        self.fills = _planned(inputs, closures, steps)
        self.cache.pinned = self.place == "pinned"
        self.cache.plan(self.fills)

    def _computed(self, advance: Advance) -> Iterator[tuple[prefix.Fill, torch.Tensor]]:
        """Rows with their states behind the lower layers: pass by pass, or where these are in files, layer by layer."""
        device: Any = self.cache.model.device
        if self.files is None:
            for fill in self.fills:
                yield fill, self.cache.compute(fill)
                advance()
            return
        for index in range(self.cache.lowest):
            with self.files.resident(index, device):
                for fill in self.fills:
                    self.cache.keep(fill, self.cache.compute(fill, index, index + 1))
                    advance(1 / self.cache.lowest)
        yield from ((fill, torch.cat([self.cache.rows[key] for key in fill.keys])) for fill in self.fills)

    def _read(self, target: Path, identity: dict[str, str]) -> bool:
        try:
            self.cache.rows = read_rows(target, identity)
        except ValueError as error:
            logger.warning("prefix cache %s; it is computed anew", error)
            return False
        return True

    def _write(self, target: Path, identity: dict[str, str], advance: Advance) -> None:
        states = (found for _, found in self._computed(advance))
        try:
            run_directory.write_whole(target, lambda path: write_rows(path, self.fills, states, self.trace, identity))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ValueError(
                f"the disk of {target.parent} is full: the prefix cache takes {self.size:,} bytes there; choose an --out on "
                "another disk, fewer rows, or prefix_cache memory or off, or make room"
            ) from error

    def costs(self) -> dict[str, Any]:
        """For :func:`l2l.costs.expect`: the layers that steps leave out, and bytes of memory on the model's device."""
        layers = self.trace.layers[: self.cache.lowest]
        return {"below": layers, "prefix": self.size if self.place == "memory" else 0}

    def figures(self) -> dict[str, Any]:
        """For the summary."""
        found = {"place": self.place, "lowest_layer": self.cache.lowest, "layers": len(self.trace.layers)}
        return found | {"rows": len(self.cache.rows), "bytes": self.size}


def write_rows(
    path: Path,
    fills: Sequence[prefix.Fill],
    states: Iterable[torch.Tensor],
    trace: prefix.LayerTrace,
    made_from: Mapping[str, str],
) -> None:
    """Write keys, lengths and states [tokens, D] of rows; states are given fill by fill, so that no more than those of one fill
    are in memory. The metadata says what they were made from."""
    lengths = torch.tensor([length for fill in fills for length in fill.lengths])
    keys = torch.frombuffer(bytearray(b"".join(key for fill in fills for key in fill.keys)), dtype=torch.uint8)
    shapes = {
        "lengths": (lengths.dtype, list(lengths.shape)),  # first: each begins at a multiple of its item's size
        "states": (trace.dtype, [int(lengths.sum()), trace.width]),
        "keys": (keys.dtype, [len(lengths), prefix.KEY_BYTES]),
    }
    run_directory.write_sealed(path, shapes, chain((lengths,), states, (keys,)), made_from)


def read_rows(path: Path, made_from: Mapping[str, str]) -> dict[bytes, torch.Tensor]:
    """Rows of a file, mapped into memory: what is read of them is loaded then, and may be let go again.

    Raises:
        ValueError: the file is not readable, changed in any bit, or was made from something else; the message says what.
    """
    tensors, found = run_directory.read_sealed(path)
    pairs = ((name, found.get(name), value) for name, value in made_from.items())
    changed = [f"{name} ({there} there, {now} now)" for name, there, now in pairs if there != now]
    if changed:
        raise ValueError(f"{path} was made from something else: {', '.join(changed)}")
    rows = tensors["states"].split(tensors["lengths"].tolist())
    return {key.numpy().tobytes(): states for key, states in zip(tensors["keys"], rows, strict=True)}


def prepare_prefix(inputs: RunInputs, closures: Closures, loss: float | None) -> RunPrefix | None:
    """The cache of a run, not yet built; None where it has none. Nothing is written.

    Args:
        loss: of the first step's batch, by a whole forward pass: the cache must give the same. None: there is none to compare
            with, because the lower layers are not in memory.

    Raises:
        ValueError: the configuration asks for a cache that is impossible, or that does not fit.
    """
    config, model = inputs.config, inputs.model
    if config.prefix_cache == "off":
        return None
    try:
        trace, lowest = _traced(model, config)
        cache = prefix.PrefixCache(model, trace, lowest)
        seconds = (0.0, 0.0) if loss is None else _probe(cache, closures, loss, trace.dtype)
        fills = _planned(inputs, closures, config.steps)
        place = choose_place(config.prefix_cache, states_bytes(fills, trace), model.device, Path(config.out))
    except prefix.NoPrefixError as error:
        if config.prefix_cache != "auto" or inputs.files is not None:
            raise ValueError(
                f"prefix_cache={config.prefix_cache!r}, but {error}: train the top of the model (train_layers top:5), or leave "
                "prefix_cache at auto"
            ) from error
        if config.train_layers != "all":
            logger.warning("no prefix cache: %s; every pass runs all layers", error)
        return None
    return RunPrefix(cache, trace, fills, place, context_length(model, config.max_length), inputs.files, *seconds)


def _traced(model: "PreTrainedModel", config: CompleteConfig) -> tuple[prefix.LayerTrace, int]:
    """The structure, and the lowest trained layer, which is at least 1."""
    if config.compile:
        raise prefix.NoPrefixError("a compiled decoder cannot leave layers out")
    layers = prefix.layer_list(model)
    if layers is None or not any(parameter.requires_grad for parameter in layers[0].parameters()):
        trace = prefix.trace_layers(model)
        if lowest := trace.lowest_trained(model):
            return trace, lowest
    raise prefix.NoPrefixError("something below layer 1 is trained")


def trace_top(model: "PreTrainedModel", config: CompleteConfig) -> tuple[prefix.LayerTrace, tuple[str, ...]]:
    """The structure, and the names of the trained parameters of the last layer and of what follows it.

    Raises:
        ValueError: there are none, or a pass over them alone is not possible.
    """
    way_out = "leave top_directions at 0"
    if config.objective != LOSS or config.reward is not None:
        raise ValueError(f"top_directions share passes over the task's loss, and objective is {config.objective!r}: {way_out}")
    if config.compile:
        raise ValueError(f"top_directions leave layers out, which a compiled decoder cannot: leave compile off, or {way_out}")
    try:
        trace = prefix.trace_layers(model)
    except prefix.NoPrefixError as error:
        raise ValueError(f"top_directions are those of the last layer, but {error}: {way_out}") from error
    last = max(1, len(trace.layers) - 1)
    trained = [(name, trace.places.get(id(p), 0)) for name, p in model.named_parameters() if p.requires_grad]
    names = tuple(name for name, place in trained if place >= last)
    if not names:
        raise ValueError(f"top_directions are those of the last layer, and nothing of it is trained: {way_out}")
    return trace, names


def share_step(closures: Closures, trace: prefix.LayerTrace, theta: PerturbedParameters, top_blocks: Sequence[str]) -> Closures:
    """Closures whose passes within a step share what lies below the lowest layer of these blocks wherever nothing of it is
    displaced, and with it a trained head that is the embedding."""
    model = closures.model
    places = {name: trace.places.get(id(parameter), 0) for name, parameter in model.named_parameters()}
    lowest = max(1, min(place for name, place in places.items() if name in top_blocks))
    below = [index for index, block in enumerate(theta.blocks) if places[block.name] < lowest]
    head = output_embedding(model)
    of_head = [] if head is None else [parameter for parameter in head.parameters() if parameter.requires_grad]
    shares_head = bool(of_head) and all(trace.places.get(id(parameter), 0) < lowest for parameter in of_head)

    def displaced() -> bool:
        at = theta.displacement
        scales = () if at.direction is None or not at.distance else (at.direction.sigma, at.direction.basis_sigma)
        return any(own[index] for own in scales if own for index in below)

    states = prefix.StepStates(model, trace, lowest, displaced)
    return replace(closures, states=states, head_displaced=displaced if shares_head else None)


def check_shared(closures: Closures, loss: float, dtype: torch.dtype) -> None:
    """Raise ValueError where a pass that begins at the top layers gives another loss than a whole one, which is computed."""
    whole = finite_loss(replace(closures, states=None).at(0))
    if not _same(loss, whole, dtype):
        name = type(closures.model).__name__
        raise ValueError(
            f"top_directions are those of the last layer, but {name} gives other losses without its lower layers ({loss:g}, "
            f"not {whole:g}): leave top_directions at 0"
        )


def _same(found: float, loss: float, dtype: torch.dtype) -> bool:
    """Whether two losses differ by rounding alone."""
    return abs(found - loss) <= math.sqrt(torch.finfo(dtype).eps) * max(1.0, abs(loss))


def _probe(cache: prefix.PrefixCache, closures: Closures, loss: float, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a pass over the first batch without the lower layers, and of these; NoPrefixError where its loss
    is another one."""
    with cache.attached():
        fills, began = prefix.plan_fills(cache.model, closures.fed(0)), time.perf_counter()
        for fill in fills:
            cache.keep(fill, cache.compute(fill))
        between = time.perf_counter()
        found = finite_loss(closures.at(0))
        seconds = time.perf_counter() - between, between - began
    cache.rows = {}
    if not _same(found, loss, dtype):
        name = type(cache.model).__name__
        raise prefix.NoPrefixError(f"{name} gives other losses without its lower layers ({found:g}, not {loss:g})")
    return seconds


def _planned(inputs: RunInputs, closures: Closures, steps: int | None) -> list[prefix.Fill]:
    """Of what the model is fed in the first epoch, or in so many steps where these are fewer, and in evaluations."""
    config, splits, batcher, model = inputs.config, inputs.splits, closures.batcher, inputs.model

    def evaluated(rows: Sequence[Row]) -> Iterator[TokenQuery]:
        return evaluation_batches(model, inputs.tokenizer, inputs.task, rows, config.max_length, batcher.grouping)

    epoch = -(-len(batcher.examples) // config.batch_size)
    if closures.objective is None:
        trained = chain.from_iterable(map(closures.fed, range(min(epoch, steps or epoch))))
    else:  # scores options as evaluations do, or feeds rows of its own
        trained = evaluated(splits.train)
    found = prefix.plan_fills(model, chain(trained, evaluated(splits.dev), evaluated(splits.test)))
    return found + prefix.plan_fills(model, evaluated(inputs.reported_train), REPORTED)


def states_bytes(fills: list[prefix.Fill], trace: prefix.LayerTrace) -> int:
    """Size of the states of these rows."""
    return sum(sum(fill.lengths) for fill in fills) * trace.width * trace.dtype.itemsize


def choose_place(asked: str, size: int, device: torch.device, out: Path) -> Place:
    """Where so many bytes go: what is asked for, or under ``auto`` the first place in which they take up to half of what is
    free. A file that an interrupted run has left is used.

    Raises:
        prefix.NoPrefixError: under ``auto``, they fit nowhere.
        ValueError: they do not fit where they are asked to.
    """
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    free = {"memory": available_bytes(device), "disk": shutil.disk_usage(folder).free}
    if device.type == "cuda":
        free = {"memory": free["memory"], "pinned": available_bytes("cpu"), "disk": free["disk"]}
    if asked == "auto":
        if (out / FILE).exists():
            return "disk"
        for place in get_args(Place):
            if size <= SHARE * free.get(place, -1):
                return place
        raise prefix.NoPrefixError(f"its {size:,} bytes fit neither in memory nor on disk")
    if size > free[asked] and not (out / FILE).exists():
        other = "disk, or auto" if asked == "memory" else "memory, or an --out on another disk"
        raise ValueError(f"prefix_cache={asked!r} takes {size:,} bytes, but {free[asked]:,} are free: use {other}, fewer rows")
    return "disk" if asked == "disk" else "memory"
