"""Rebuild the weights of any step from the run log: no data, no forward pass, and the bits of the run.

The steps are taken again by the same optimizer, whose closures give the logged losses. In float32 perturbed in place, a run
leaves the roundings of its perturbations behind, so these are repeated too; as nothing reads the weights meanwhile, many steps
are made in one traversal. The bits do not depend on the noise backend, nor, but for directions of low rank, on the number of
threads.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from l2l.arguments import Arguments
from l2l.methods import method_names
from l2l.methods.base import Method
from l2l.methods.registry import AROUND, build_method
from l2l.methods.wrappers import wrapper_names
from l2l.models import load
from l2l.models.saving import save_model
from l2l.optim import StepReport, ZOOptimizer
from l2l.report import run_directory
from l2l.train import runlog
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import weights_digests
from l2l.train.trainer import fitting_tuner, setup_scheme
from l2l.tuners import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_log(source: str | Path, revision: str | None = None) -> Path:
    """The file of a run log: of a run's directory, a path, or an id of the hub, where it is fetched.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / runlog.NAME
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        if not path.is_file():
            raise FileNotFoundError(f"no run log {str(path)!r}: give a run's directory, its {runlog.NAME}, or an id of the hub")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), runlog.NAME, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"run log {str(source)!r} is neither here nor to be fetched from the hub: {first}") from error


def steps_to(log: runlog.Log, to: str | int | None) -> int:
    """How many steps lead to ``to``: a number of steps, ``last``, or ``best``; None: the best of a run that has ended, else the
    last.

    Raises:
        ValueError: the log does not tell, or ends before.
    """
    last = len(log.steps)
    if to is None:
        return last if log.best is None else log.best
    if to == "best" and log.best is None:
        raise ValueError("to='best', but the run has not ended: give a number of steps, or last")
    wanted = {"best": log.best, "last": last}.get(str(to), to)
    try:
        number = int(wanted)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"to={to!r} must be a number of steps, best or last") from error
    if not 0 <= number <= last:
        raise ValueError(f"to={number}, but the log has {last} steps: give 0 to {last}")
    return number


_BUILT = (
    *("lr", "step_fraction", "curvature_every", "weight_decay", "on_bad_loss", "scheme", "scheme_args", "freeze"),
    *("train_layers", "quantize", "dtype", "head", "tuner", "match"),
)
"""Fields of a header's configuration that model and optimizer are made by."""


def rebuild(
    log: runlog.Log,
    model: "PreTrainedModel | str | Path | None" = None,
    to: str | int | None = None,
    tuner: Tuner | str | None = None,
    method: Method[Any] | None = None,
    **options: Any,
) -> "PreTrainedModel":
    """The model as it was after some steps of a run.

    Args:
        to: see :func:`steps_to`.
        model, tuner, method, options: see :func:`begin`.

    Raises:
        ValueError, FileNotFoundError: as :func:`begin`.
    """
    number = steps_to(log, to)
    found, optimizer = begin(log, model, tuner, method, **options)
    replay(log, optimizer, number)
    return found


def begin(
    log: runlog.Log,
    model: "PreTrainedModel | str | Path | None" = None,
    tuner: Tuner | str | None = None,
    method: Method[Any] | None = None,
    **options: Any,
) -> "tuple[PreTrainedModel, ZOOptimizer]":
    """The model and the optimizer of a run, as they were before its first step.

    Args:
        model: the base model, or what :func:`l2l.load_model` takes; None: where the run had it from. An object is changed in
            place.
        tuner: of a run that has one; None: where the run had it from.
        method: of a run with a method that is not of l2l.
        options: of :func:`l2l.load_model`; those that the log tells are taken from it where they are not given.

    Raises:
        ValueError: the log cannot rebuild weights; or model, tuner or method are not those of the run.
        FileNotFoundError: model or tuner are not there.
    """
    header = log.header
    if header["not_replayable"]:
        raise ValueError(f"a run of method {header['method']!r} cannot be rebuilt from its log: {header['not_replayable']}")
    if "first" in header:
        raise ValueError(f"this log begins at step {header['first']}, since an earlier one was lost: it rebuilds no weights")
    known, told = {field.name for field in fields(FineTuneConfig)}, header["config"]
    built = {name: told[name] for name in _BUILT if name in known & told.keys()}
    config = FineTuneConfig(seed=header["seed"], **built).completed()
    if model is None or isinstance(model, str | Path):
        given: dict[str, Any] = {name: getattr(config, name) for name in ("dtype", "head", "quantize", "seed")}
        given |= {"num_labels": header["labels"], "revision": told["revision"] if model in (None, told["model"]) else None}
        model = load.load_model(model or told["model"], **given | options)
    model = setup_scheme(model, config).eval()
    source = (tuner or config.tuner) if header["tuner"] else None
    own = method or _method(header, fitting_tuner(source, model, config.scheme, config.match), model)
    modes = {name: getattr(config, name) for name in ("on_bad_loss",) if hasattr(config, name)}
    modes |= {"perturb": header["perturb"], "update": header["update"] or "auto", "curvature_lr": config.curvature_lr()}
    optimizer = ZOOptimizer(model, own, config.lr, config.seed, config.weight_decay, **modes)
    _check(header, optimizer, model)
    return model, optimizer


def _method(header: dict[str, Any], tuner: Tuner | None, model: "PreTrainedModel") -> Any:
    foreign = [part for part in header["method"].split(AROUND) if part not in {*method_names(), *wrapper_names()}]
    if foreign:
        raise ValueError(f"the run's method {foreign[0]!r} is not one of l2l's: call l2l.train.replay.rebuild with method=")
    return build_method(header["method"], header["epsilon"], header["method_args"], tuner, model)


def _check(header: dict[str, Any], optimizer: ZOOptimizer, model: "PreTrainedModel") -> None:
    """Raise ValueError where model or tuner are not those that the run began with."""
    weights = weights_digests(model, [block.tensor for block in optimizer.blocks])
    now = runlog.run_identity(optimizer, model, weights)
    base, differs = header["config"]["model"], {name for name, value in now.items() if header[name] not in (value, None)}
    if "tuner" in differs:
        raise ValueError("this tuner is another than the run's: its weights have another hash")
    if "blocks" in differs:
        raise ValueError(f"the run trained {header['blocks'].split()[0]} blocks of {base!r}, and this model has other ones")
    if "frozen" in differs or ("trained" in differs and header["config"]["scheme"] == "full"):
        raise ValueError(f"this is another base model than the run's, {base!r}: its weights have another hash")
    if "trained" in differs:
        raise ValueError(f"the adapter begins with other values than the run's, which was made with torch {header['torch']}")


def replay(
    log: runlog.Log,
    optimizer: ZOOptimizer,
    steps: int,
    at_once: bool = False,
    each: Callable[[StepReport], object] = lambda report: None,
) -> None:
    """Take the first ``steps`` of a run again; theta must be where the run began.

    Args:
        at_once: write the parameters in every step, so that the optimizer may take other steps afterwards.
        each: called with the report of every step.

    Raises:
        ValueError: a step comes out otherwise than its record says: the optimizer is not the run's.
    """
    theta = optimizer.theta
    if not at_once:
        theta.defer_writes()
    population = runlog.of_population(log.header)
    with theta.fused_steps():
        for number, step in enumerate(log.steps[:steps]):
            each(runlog.take_again(optimizer, step, number, population))


def load_model(
    name_or_path: str | Path, *args: Any, log: str | Path | None = None, to: str | int | None = None, **options: Any
) -> "PreTrainedModel":
    """Load a language model; with ``log``, as a run has fine-tuned it.

    Args:
        name_or_path: and all further arguments: as of :func:`l2l.models.load.load_model`. The dtype and the like of a
            fine-tuned model are the run's where they are not given.
        log: a run's directory, its run log, or the id of a hub repository that holds one. ``name_or_path`` is then the base
            model of the run, whose weights are checked.
        to: how many steps of the run, ``last``, or ``best``; None: its best step, as the run would have saved it.

    Raises:
        FileNotFoundError: no such model or log.
        ValueError: the model cannot be loaded; the log is damaged, of another base, has not ended, or rebuilds no weights.
    """
    if log is None:
        return load.load_model(name_or_path, *args, **options)
    path = find_log(log)
    found = runlog.read_log(path)
    if found.best is None and to is None:
        raise ValueError(
            f"the run of log {str(path)!r} has not ended, or its end is lost: give to='last', or a number of steps"
        )
    given = dict(zip(list(signature(load.load_model).parameters)[1:], args, strict=False))
    return rebuild(found, name_or_path, to, **given | options)


@dataclass(frozen=True)
class ReplayConfig(Arguments):
    """Rebuild the weights of a step of a run from its log; or say where two runs part."""

    run: str
    """A run's directory, its run log, or the id of a hub repository that holds one."""
    to: str | None = None
    """How many steps of the run; ``last``, or ``best`` by dev. None: the best of a run that has ended, else the last."""
    undo: int | None = None
    """Instead: the weights as they were before the last so many steps."""
    out: str | None = None
    """Directory that the model is written to. None: it is rebuilt and compared with the log alone."""
    diff: str | None = None
    """Instead: another run, whose log is compared with this one."""
    model: str | None = None
    """The base model; None: where the run had it from."""
    tuner: str | None = None
    """The tuner of a run that has one; None: where the run had it from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [name for name in ("to", "undo", "diff") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]} and {chosen[1]} are both given: leave one out")
        if self.diff is not None and self.out is not None:
            raise ValueError("diff compares two logs and writes nothing: leave out out, or diff")
        if self.undo is not None and self.undo < 0:
            raise ValueError(f"undo={self.undo} must be a number of steps, at least 0")


def replay_command(config: ReplayConfig) -> None:
    """Replay a run, or compare two, and print the result."""
    path = find_log(config.run)
    if config.diff is not None:
        print("\n".join(differences(path, find_log(config.diff))))
        return
    target = None if config.out is None else Path(config.out)
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory: choose another --out")
    to: str | int | None = config.to
    log = runlog.read_log(path, int(to) if to and to.isdigit() else None)  # what follows that step may be damaged
    if config.undo is not None:
        to = len(log.steps) - config.undo
        if to < 0:
            raise ValueError(f"undo={config.undo}, but the log has {len(log.steps)} steps")
    if log.torn:
        logger.warning("%s: the last record was cut short and is left out", path)
    began, base = time.perf_counter(), config.model or log.header["config"]["model"]
    model = rebuild(log, base, to, config.tuner)
    seconds = time.perf_counter() - began
    print(f"rebuilt the weights after {steps_to(log, to)} steps in {seconds:.1f} s, model included")
    if target is not None:
        tokenizer = load.load_tokenizer(base)
        with TemporaryDirectory(dir=_made(target.parent), prefix=run_directory.UNFINISHED) as folder:
            save_model(model, tokenizer, Path(folder) / target.name)
            run_directory.share_as_usual(Path(folder) / target.name)
            (Path(folder) / target.name).replace(target)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def differences(one: Path, other: Path) -> list[str]:
    """What two run logs differ in: fields of their headers, and the first step and its fields at which they part."""
    logs = runlog.read_log(one), runlog.read_log(other)
    first, second = logs
    found = [f"{name}: {a!r} / {b!r}" for name, a, b in runlog.header_differences(first.header, second.header)]
    for number, (a, b) in enumerate(zip_longest(first.steps, second.steps)):
        if a is None or b is None:
            lengths = [f"{len(log.steps)} steps{'' if log.best is None else ', ended'}" for log in logs]
            return [*found, f"equal to step {number - 1}, where one log ends: {' / '.join(lengths)}"]
        if repr(a) != repr(b):
            names = [name for name in vars(a) if repr(getattr(a, name)) != repr(getattr(b, name))]
            return [*found, *(f"step {number}, {name}: {getattr(a, name)!r} / {getattr(b, name)!r}" for name in names)]
    if first.best != second.best:
        found.append(f"best step: {first.best} / {second.best}")
    return found or [f"no difference in {len(first.steps)} steps"]
