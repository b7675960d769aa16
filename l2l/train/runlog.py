"""The run log ``steps.l2l``: what rebuilds the weights of each step from the base model, some 20 bytes a step.

A step is a function of the weights, the method's state, its key and the losses that its evaluations gave; everything else
follows: projected gradients, directions, lengths, the next state. So a record holds the losses in the order in which they were
evaluated, the learning rate, what the method has read beside losses (``readings``), and a hash of the batch's rows. Losses are
kept in float32 where that holds them exactly, else in float64: a replay has the bits of the run.

The file (little endian): MAGIC, length and text of a JSON header, checksum; records; and after a run that has ended, its best
step. A record: flags, sections as the flags say, and the CRC-32 of all that stands before it, so that a record that is changed,
missing or in another's place is found at its step. A record that a crash cut short is at the end, and is left out.
"""

import hashlib
import json
import logging
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch

from l2l.methods.registry import AROUND, method_name
from l2l.optim import Logged, StepReport, ZOOptimizer
from l2l.report.run_directory import write_whole
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import tuner_fingerprint
from l2l.tuners import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

NAME, TEXT = "steps.l2l", "steps.jsonl"
"""Of the log in a run's directory; and what earlier versions wrote."""
MAGIC, VERSION = b"l2l log\n", 1
ROWS = 3
"""Bytes of the hash of a batch's rows."""
LR, WIDE, COUNT, RATE, READINGS, ESTIMATES, COSTS, RESTORED = (1 << bit for bit in range(8))
"""Flags, and sections in their order: another learning rate than before; losses in float64; another number of losses than
before; the rate that was used under ``auto``; readings; estimates that do not follow from pairs of losses; passes that are not
their number, and curvature; whether something has read the weights before the step, where that is within its roundings."""
END = 0xFFFF
"""In place of the number of losses: the run has ended."""
NAN = float("nan")
KEPT = ("run", "seed", "epsilon", "method", "method_args", "perturb", "update", "tuner", "blocks")
"""Of the header: what must not change while a run is continued; ``run`` is the identity of the run and of what it reads."""

RECORDED = (
    *("model", "revision", "task", "steps", "lr", "step_fraction", "curvature_every", "schedule", "schedule_end", "batch_size"),
    *("objective", "weight_decay", "on_bad_loss", "scheme", "scheme_args", "freeze", "train_layers", "sparse_embeddings"),
    *("quantize", "dtype", "head", "tuner", "match", "parallel"),
)
"""Fields of the configuration that a header holds."""
POPULATION = "population"
"""Value of ``parallel`` under which records say which directions were left out."""
Side: TypeAlias = float | None


def run_header(
    config: FineTuneConfig, optimizer: ZOOptimizer, model: "PreTrainedModel", weights: Mapping[str, str]
) -> dict[str, Any]:
    """What rebuilding the weights needs beside the records, in values of JSON; the model is as before the first step.

    Args:
        weights: of :func:`l2l.train.inputs.weights_digests`.
    """
    method = optimizer.method
    found = {"library": version("l2l"), "torch": torch.__version__, "seed": config.seed}
    found |= {"epsilon": getattr(method, "epsilon", None), "method": method_name(method), "method_args": method_args(method)}
    found |= {"perturb": optimizer.theta.mode, "update": optimizer.theta.update, "labels": model.config.num_labels}
    found |= run_identity(optimizer, model, weights)
    config_fields = {name: getattr(config, name) for name in RECORDED if hasattr(config, name)}
    config_fields["dtype"] = str(model.dtype).removeprefix("torch.")
    return json.loads(json.dumps(found | {"not_replayable": why_not(config, method), "config": config_fields}, default=repr))


def run_identity(optimizer: ZOOptimizer, model: torch.nn.Module, weights: Mapping[str, str]) -> dict[str, str | None]:
    """Digests of the tuner, the blocks' names, the trained weights and the frozen ones; None where some are not in memory."""
    tuner, missing = tuner_of(optimizer.method), any(parameter.is_meta for parameter in model.parameters())
    found = {"tuner": None if tuner is None else tuner_fingerprint(tuner), "blocks": names_hash(optimizer.blocks.names)}
    return found | {"trained": weights["trained"], "frozen": None if missing else weights["frozen"]}


def why_not(config: FineTuneConfig, method: Any) -> str:
    """Why the log does not rebuild the weights; empty where it does."""
    if config.sparse_embeddings:
        return "sparse_embeddings moves the rows that a batch looks up, and batches are not kept"
    return method.not_replayable


def tuner_of(method: Any) -> Tuner | None:
    """The tuner of a method, or of one around it."""
    found, inner = getattr(method, "tuner", None), getattr(method, "inner", None)
    if isinstance(found, Tuner):
        return found
    return None if inner is None else tuner_of(inner)


def method_args(method: Any) -> dict[str, Any]:
    """The fields of a method as :func:`l2l.methods.registry.build_method` takes them: by part where it is composed."""
    known = [field.name for field in fields(method) if field.init] if is_dataclass(type(method)) else []
    own: dict[str, Any] = {name: getattr(method, name) for name in known}
    inner = own.pop("inner", None)
    own.pop("tuner", None)
    if inner is None:
        return own
    name, nested = method_name(inner), method_args(inner)
    return {method_name(method).split(AROUND)[0]: own, **(nested if AROUND in name else {name: nested})}


def names_hash(names: Sequence[str]) -> str:
    """How many names there are, and their hash."""
    return f"{len(names)} {hashlib.blake2b(chr(10).join(names).encode(), digest_size=16).hexdigest()}"


@dataclass(frozen=True)
class StepRecord:
    """What a step was told."""

    losses: tuple[float, ...]
    """In the order in which they were evaluated."""
    lr: float
    """Of the optimizer's groups; under ``auto`` the step fraction."""
    rows: bytes
    """Hash of the batch's rows, ROWS bytes."""
    passes: int
    estimates: tuple[tuple[float, float, Side], ...]
    """Projected gradient, and losses on both sides, of each direction; none of a first-order step, or of one left out."""
    rate: float
    """Learning rate as it was used."""
    readings: tuple[tuple[float, ...], ...] = ()
    curvature: float | None = None
    restored: bool = False
    """Whether the weights were brought back between the step before and this one, and that may have rounded otherwise."""

    @staticmethod
    def of(report: StepReport, lr: float, rows: bytes, restored: bool = False) -> "StepRecord":
        """The record of a step that was taken."""
        estimates = tuple((e.projected_gradient, e.loss_plus, e.loss_minus) for e in report.estimates)
        told = report.evaluations, lr, rows, report.passes, estimates, report.lr[0]
        return StepRecord(*told, report.readings, report.curvature, restored)


@dataclass(frozen=True)
class Log:
    """A log that was read."""

    header: dict[str, Any]
    steps: list[StepRecord]
    best: int | None
    """Steps to the weights that the run has kept as its best; None: it has not ended."""
    ends: list[int]
    """Bytes up to the end of the header, and of each record."""
    checksum: int
    """Of the last record read."""
    torn: int = 0
    """Bytes of a last record that a crash cut short."""


def implied(losses: Sequence[float], epsilon: float | None) -> tuple[tuple[float, float, Side], ...]:
    """The estimates of a step that evaluates both sides of each direction in turn, and nothing else."""
    if epsilon is None or len(losses) % 2:
        return ()
    pairs = zip(losses[::2], losses[1::2], strict=True)
    return tuple(((plus - minus) / (2 * epsilon), plus, minus) for plus, minus in pairs)


def _narrow(losses: Sequence[float]) -> bool:
    """Whether float32 holds the losses."""
    try:
        return struct.unpack(f"<{len(losses)}f", struct.pack(f"<{len(losses)}f", *losses)) == tuple(losses)
    except OverflowError:
        return False


def packed(step: StepRecord, before: StepRecord | None, epsilon: float | None) -> bytes:
    """The record without its checksum; ``before``: that of the step before."""
    flags, body = 0, []

    def section(flag: int, *parts: bytes) -> None:
        nonlocal flags
        flags |= flag
        body.extend(parts)

    if before is None or struct.pack("<d", before.lr) != struct.pack("<d", step.lr):
        section(LR, struct.pack("<d", step.lr))
    if before is None or len(before.losses) != len(step.losses):
        section(COUNT, struct.pack("<H", len(step.losses)))
    narrow = _narrow(step.losses)
    section(0 if narrow else WIDE, struct.pack(f"<{len(step.losses)}{'f' if narrow else 'd'}", *step.losses))
    if step.rate != step.lr:
        section(RATE, struct.pack("<d", step.rate))
    if step.readings:
        groups = (struct.pack(f"<H{len(group)}d", len(group), *group) for group in step.readings)
        section(READINGS, struct.pack("<H", len(step.readings)), *groups)
    if step.estimates != implied(step.losses, epsilon):
        values = [NAN if value is None else value for estimate in step.estimates for value in estimate]
        section(ESTIMATES, struct.pack(f"<H{len(values)}d", len(step.estimates), *values))
    if step.curvature is not None or step.passes != len(step.losses):
        section(COSTS, struct.pack("<Id", step.passes, NAN if step.curvature is None else step.curvature))
    return bytes([flags | (RESTORED if step.restored else 0)]) + b"".join(body) + step.rows


@final
class _Bytes:
    """Reads a file from a place on; EOFError where it ends too early."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at

    def take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if self.at + size > len(self.content):
            raise EOFError
        self.at += size
        return struct.unpack_from(form, self.content, self.at - size)


def _parsed(found: _Bytes, before: StepRecord | None, epsilon: float | None) -> StepRecord | int:
    """The next record, or the best step where the run has ended."""
    (flags,) = found.take("<B")
    lr = found.take("<d")[0] if flags & LR else before.lr if before else NAN
    count = found.take("<H")[0] if flags & COUNT else len(before.losses) if before else 0
    if count == END:
        return found.take("<q")[0]
    losses = found.take(f"<{count}{'d' if flags & WIDE else 'f'}")
    rate = found.take("<d")[0] if flags & RATE else lr
    readings: list[tuple[float, ...]] = []
    for _ in range(found.take("<H")[0] if flags & READINGS else 0):
        readings.append(found.take(f"<{found.take('<H')[0]}d"))
    estimates = implied(losses, epsilon)
    if flags & ESTIMATES:
        values = found.take(f"<{3 * found.take('<H')[0]}d")
        triples = zip(values[::3], values[1::3], values[2::3], strict=True)
        estimates = tuple((g, plus, None if minus != minus else minus) for g, plus, minus in triples)
    passes, curvature = found.take("<Id") if flags & COSTS else (count, NAN)
    (rows,) = found.take(f"<{ROWS}s")
    bend = None if math.isnan(curvature) else curvature
    return StepRecord(losses, lr, rows, passes, estimates, rate, tuple(readings), bend, bool(flags & RESTORED))


def parse_record(content: bytes, before: StepRecord | None, epsilon: float | None) -> StepRecord:
    """One record by itself, as :class:`RunLog` tells it; its checksum belongs to the chain of the whole log."""
    record = _parsed(_Bytes(content, 0), before, epsilon)
    assert isinstance(record, StepRecord), "the end of a run is not told"
    return record


def read_log(path: Path, steps: int | None = None) -> Log:
    """A log, verified; ``steps``: only so many of its records, and what follows is not looked at.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no log, of a later version, or damaged: the message names the step.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no run log {str(path)!r}: give a run's directory, or its {NAME}")
    return parse_log(path.read_bytes(), path, steps)


def parse_log(content: bytes, path: Path | str, steps: int | None = None) -> Log:
    """A log from the content of its file, verified; ``path``: its name in errors, which are those of :func:`read_log`."""
    found = _Bytes(content, len(MAGIC))
    if not found.content.startswith(MAGIC):
        raise ValueError(f"{str(path)!r} is not a run log of l2l")
    try:
        (text,) = found.take(f"<{found.take('<I')[0]}s")
        checksum = zlib.crc32(found.content[: found.at])
        whole = found.take("<I")[0] == checksum
    except EOFError:
        text, checksum, whole = b"", 0, False
    if not whole:
        raise ValueError(f"the header of run log {str(path)!r} is damaged (its checksum differs): get the file again")
    header = json.loads(text)
    if header["version"] != VERSION:
        raise ValueError(f"run log {str(path)!r} has version {header['version']}, this l2l reads {VERSION}: install another")
    records, ends, best, epsilon = list[StepRecord](), [found.at], None, header["epsilon"]
    while found.at < len(found.content) and (steps is None or len(records) < steps) and best is None:
        try:
            record = _parsed(found, records[-1] if records else None, epsilon)
            checksum = zlib.crc32(found.content[ends[-1] : found.at], checksum)
            same = found.take("<I")[0] == checksum
        except EOFError:
            break
        if not same:
            raise ValueError(
                f"run log {str(path)!r} is damaged at step {len(records)} (its checksum differs, or a record is missing): get "
                f"the file again, or replay --to {len(records)} or less"
            )
        if isinstance(record, int):
            best = record
        else:
            records.append(record)
        ends.append(found.at)
    rest = 0 if steps is not None and len(records) >= steps else len(found.content) - ends[-1]
    if rest and best is not None:
        raise ValueError(f"run log {str(path)!r} is damaged: {rest} bytes follow the end of its run: get the file again")
    return Log(header, records, best, ends, checksum, rest)


def header_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, its two values) where two headers differ, fields of fields one by one."""
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*one, *other} - {"version", "first"}):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [(f"{name}.{inner}", *values) for inner, *values in header_differences(a, b)]
        elif a != b:
            found.append((name, a, b))
    return found


def check_log(folder: Path, header: Mapping[str, Any], steps: int) -> tuple[Log, int] | None:
    """The log of an interrupted run, and how many of its records lead to step ``steps``; None where there is none, or one that
    begins later. What follows is not looked at.

    Raises:
        ValueError: it is damaged up to there, too short, or that of a run with another header.
    """
    path, way_out = folder / NAME, "move it away to go on without it"
    if not path.exists():
        return None
    try:
        kept = steps - read_log(path, 0).header.get("first", 0)
        log = read_log(path, max(kept, 0))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {way_out}") from error
    changed = [name for name, *_ in header_differences(header, log.header) if name.split(".")[0] in KEPT]
    if changed or len(log.steps) < kept:
        what = f"its {changed[0]!r} differs" if changed else f"it ends at step {steps - kept + len(log.steps)}, too early"
        raise ValueError(f"run log {str(path)!r} is not that of this run: {what}; {way_out}")
    return None if kept < 0 else (log, kept)


@final
class RunLog:
    """Appends a record per step.

    Args:
        header: what the run is, in values of JSON, ``epsilon`` among them.
        steps: keep so many records of the log of an interrupted run; None starts a new one.
        tell: gets what the log holds in the beginning, then each record, as they are in the file.

    Raises:
        ValueError: see :func:`check_log`.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        steps: int | None = None,
        tell: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        path, self._epsilon, self._tell = folder / NAME, header["epsilon"], tell
        found = check_log(folder, header, steps) if steps else None
        if steps and found is None:
            logger.warning("%s is gone: a new one begins at step %d, and rebuilds no weights", path, steps)
            header = {**header, "first": steps}
        if found is None:
            text = json.dumps({"version": VERSION, **header}, separators=(",", ":")).encode()
            start = MAGIC + struct.pack("<I", len(text)) + text
            self._checksum, self._before = zlib.crc32(start), None
            start += struct.pack("<I", self._checksum)
            write_whole(path, lambda target: target.write_bytes(start))
            tell(start)
            self._file = path.open("ab")
            return
        log, kept = found
        try:
            read_log(path)
        except ValueError as error:
            logger.warning("%s; the steps from %d on are taken again and written anew", error, steps)
        self._checksum, self._before = log.checksum, log.steps[-1] if log.steps else None
        with path.open("rb+") as file:
            file.truncate(log.ends[kept])
        tell(path.read_bytes())
        self._file = path.open("ab")

    def append(self, step: StepRecord) -> None:
        """Append one step."""
        self._tell(self._write(packed(step, self._before, self._epsilon)))
        self._before = step

    def end(self, best: int) -> None:
        """The run has ended: ``best`` is the number of steps to the weights that it has kept."""
        self._write(struct.pack("<BHq", COUNT, END, best))
        self.flush()

    def _write(self, record: bytes) -> bytes:
        self._checksum = zlib.crc32(record, self._checksum)
        whole = record + struct.pack("<I", self._checksum)
        self._file.write(whole)
        return whole

    def flush(self) -> None:
        """Write what was appended to disk: a checkpoint must not be ahead of its log."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def of_population(header: Mapping[str, Any]) -> bool:
    """Whether workers share the directions of a run's steps, so that its records may name some that are left out."""
    return header.get("config", {}).get("parallel") == POPULATION


def take_again(optimizer: ZOOptimizer, step: StepRecord, number: int, population: bool) -> StepReport:
    """Take step ``number`` of a run again, by its record and without any evaluation; theta must be where that step began.
    Gives its report.

    Args:
        population: whether the run's steps may leave out directions, so that records say which.

    Raises:
        ValueError: the step comes out otherwise than its record says: the optimizer is not the run's.
    """
    if step.restored:
        optimizer.theta.restore()
    for group in optimizer.param_groups:
        group["lr"] = step.lr
    closure = Logged(step.losses, step.readings)
    optimizer.step(closure, lambda _: closure, tuple if population else None)
    report = optimizer.report
    assert report is not None, "a step leaves a report"
    now = StepRecord.of(report, step.lr, step.rows)
    same = repr((now.estimates, now.rate)) == repr((step.estimates, step.rate))  # a NaN is equal to a NaN here
    if not same or not closure.spent:
        raise ValueError(
            f"step {number} comes out otherwise than the log says: it is of another method, tuner or version of l2l"
        )
    return report


def read_run_log(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and steps of a run's log as plain values: ``step``, ``lr``, ``passes``, ``directions`` (projected gradient, and
    the losses on both sides, of each), ``curvature`` where it was measured, and of a step without directions ``loss``. A step
    whose update ``on_bad_loss`` left out has ``dropped``: True, and as ``loss`` the bad one. A step of a population without all
    its directions has ``left_out``: their numbers.

    Logs of earlier versions (``steps.jsonl``) are read without a last line that a crash cut short.
    """
    if not (folder / NAME).exists() and (folder / TEXT).exists():
        lines = [line for line in (folder / TEXT).read_text().splitlines(keepends=True) if line.endswith("\n")]
        head, *steps = [json.loads(line) for line in lines]
        return head, [{"directions" if key == "draws" else key: value for key, value in step.items()} for step in steps]
    log = read_log(folder / NAME)
    first_order = log.header["epsilon"] is None
    found = [_plain(number, step, first_order) for number, step in enumerate(log.steps, log.header.get("first", 0))]
    if of_population(log.header):
        for plain, step in zip(found, log.steps, strict=True):
            plain |= {"left_out": list(map(int, step.readings[0]))} if step.readings and step.readings[0] else {}
    return log.header, found


def step_curve(folder: Path) -> list[tuple[float, float]]:
    """(passes spent, mean of the losses along the step's directions) of each step of a run."""
    steps, curve = read_run_log(folder)[1], list[tuple[float, float]]()
    for passes, step in zip(accumulate(step["passes"] for step in steps), steps, strict=True):
        losses = [loss for _, *sides in step["directions"] for loss in sides if loss is not None]
        curve.append((float(passes), sum(losses) / len(losses) if losses else float(step["loss"])))
    return curve


def _plain(number: int, step: StepRecord, first_order: bool) -> dict[str, Any]:
    found = {"step": number, "lr": step.rate, "passes": step.passes, "directions": [list(e) for e in step.estimates]}
    bad = [loss for loss in step.losses if not math.isfinite(loss)] or [max(step.losses, default=NAN)]
    found |= {} if step.estimates else {"loss": bad[0]}
    found |= {"dropped": True} if not step.estimates and not (first_order and step.losses) else {}
    return found | ({} if step.curvature is None else {"curvature": step.curvature})
