"""``l2l estimate``: peak memory and time per step of a run, from a model's config and a short measurement."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from l2l import costs
from l2l.arguments import Arguments
from l2l.methods.base import check_counts
from l2l.methods.registry import declared_method
from l2l.models.load import DTYPES, check_measured
from l2l.models.prefix import check_train_layers, trace_layers, train_only
from l2l.noise import active_backend
from l2l.params import Blocks
from l2l.report.console import print_table
from l2l.report.memory import available_bytes, current_bytes
from l2l.report.run_directory import RunDirectory
from l2l.tools import devices


@dataclass(frozen=True)
class EstimateConfig(Arguments):
    """Predict peak memory and time per step of fine-tuning a model, without loading its weights."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory, a hub id, or a named shape such as ``opt-1.3b-shape``; only its config is
    read."""
    dtype: str = "float32"
    """Dtype of the weights: fp32, bf16 or fp16, or the long names."""
    batch_size: int = 16
    """Rows fed per forward pass. In a classification task an example brings a row per option of several tokens."""
    length: int = 64
    """Tokens per row, padding included."""
    answer_tokens: int | None = 1
    """Tokens per row whose logits the loss reads; null: every token."""
    method: str = "mezo"
    """Name of a method, alone or in wrappers (``learned+lozo``), or the path of a module that defines one."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method, e.g. ``{interval: 100}`` for dizo; of a composed name by part."""
    perturb: Literal["auto", "in_place", "functional"] = "auto"
    """``in_place`` perturbs the stored weights (float32 only), ``functional`` transient copies; ``auto``: by dtype."""
    update: Literal["auto", "master", "stochastic"] = "auto"
    """Half precision: updates to a float32 ``master`` copy, or rounded ``stochastic``; ``auto``: the master if it
    fits."""
    train_layers: str | int | list[int] = "all"
    """Layers to train, as ``l2l fine-tune`` takes them: ``top:5``, ``top:1/3``, ``25,26``, ``all``."""
    prefix_cache: Literal["auto", "off", "memory", "disk"] = "auto"
    """Whether the hidden states below these layers are kept, so that a pass leaves out what lies below; on disk they take no
    memory."""
    cached_rows: int = 1700
    """Rows whose states are kept: those of training and of evaluations."""
    steps: int = 2000
    """Steps of the run, for its passes and hours."""
    device: str | None = None
    """Torch device; None: the CPU."""
    revision: str | None = None
    """Revision of a hub model."""
    devices: bool = False
    """Say instead which means of fine-tuning fit on devices of 8 to 141 GB: with gradients, and with forward passes alone. Read
    are model, batch_size, length and answer_tokens."""
    out: str | None = None
    """Directory for ``config.yaml`` and ``summary.json``; None: nothing is written."""
    overwrite: bool = False
    """Remove the files of an earlier run in ``out``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        answer = 1 if self.answer_tokens is None else self.answer_tokens
        counts = {name: getattr(self, name) for name in ("batch_size", "length", "steps", "cached_rows")}
        check_counts(**counts, answer_tokens=answer)
        check_train_layers(self.train_layers)
        if answer > self.length:
            raise ValueError(f"answer_tokens={answer} is more than length={self.length}: a row has no more tokens")


def run_estimate(config: EstimateConfig) -> dict[str, Any]:
    """The figures; written to ``out`` where one is given. Of the model only its config is read.

    Raises:
        ValueError, FileNotFoundError: bad input, named.
    """
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    folder = RunDirectory(config.out, asdict(config), config.overwrite) if config.out else None
    check_measured(config.device)
    device, dtype = torch.device(config.device or "cpu"), DTYPES[config.dtype]
    model = costs.meta_model(costs.config_of(config.model, config.revision), dtype)
    most: Any = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and config.length > most:
        raise ValueError(f"length {config.length} is more than the {most} positions of the model")
    below = _frozen_layers(model, config)
    blocks = Blocks.of(model)
    shape = costs.model_shape(model, blocks, below)
    kept = config.cached_rows * config.length * shape.width * dtype.itemsize if below else 0
    load = costs.Load(config.batch_size, config.length, config.batch_size * (config.answer_tokens or config.length))
    method = declared_method(config.method, config.method_args, model)
    room = available_bytes(device)
    left, master = room - shape.parameters * dtype.itemsize, shape.trained * costs.LOSS_BYTES
    update = costs.choose_update(dtype, config.update, left, master)
    plan = costs.Plan.of(dtype, costs.choose_perturb_mode(dtype, config.perturb), update, method, blocks)
    plan = replace(plan, prefix=0 if config.prefix_cache == "disk" else kept)
    found = costs.predict(shape, load, load, plan, device)
    process = current_bytes(device)  # with the libraries that a step loads: the measurement has used them
    seconds = found.seconds_per_step or 0.0
    summary = {
        "model": config.model,
        "parameters": shape.parameters,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "method": config.method,
        "perturb": plan.perturb,
        "update": plan.update,
        "backend": active_backend(device, plan.dtype),
        "threads": torch.get_num_threads(),
        "bytes": {"process": process, **found.parts},
        "peak_bytes": process + found.bytes,
        "peak_over_inference": found.bytes / costs.inference_bytes(found.parts),
        "available_bytes": room,
        "fits": found.bytes <= room,
        "advice": costs.advice(shape, load, plan, room),
        "flops_per_forward": sum(costs.forward_flops(shape, load).values()),
        "seconds_per_forward": found.seconds_per_forward,
        "seconds_per_step": seconds,
        "step_over_forwards": seconds / (found.work * (found.seconds_per_forward or seconds)),
        "steps_per_hour": 3600 / seconds,
        "passes_per_step": found.passes,
        "trained_parameters": shape.trained,
        "layers_per_pass": shape.layers,
        "prefix_cache_bytes": kept,
        "steps": config.steps,
        "passes": round(config.steps * found.passes),
        "hours": config.steps * seconds / 3600,
        "config": asdict(config),
    }
    if folder is not None:
        folder.create().finish(summary)
    return summary


def _frozen_layers(model: Any, config: EstimateConfig) -> Sequence[torch.nn.Module]:
    """Freeze what is not trained; the layers that a pass then leaves out."""
    if config.train_layers == "all":
        return ()
    train_only(model, config.train_layers)
    trace = trace_layers(model)
    return () if config.prefix_cache == "off" else trace.layers[: trace.lowest_trained(model)]


def run_devices(config: EstimateConfig) -> dict[str, Any]:
    """Bytes that each means takes on a device, and the first that fits on each; written to ``out`` where one is given.

    Raises:
        ValueError, FileNotFoundError: bad input, named.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite) if config.out else None
    load = costs.Load(config.batch_size, config.length, config.batch_size * (config.answer_tokens or config.length))
    needs = devices.needs_of(costs.config_of(config.model, config.revision), load)
    found = {"model": config.model, "bytes": needs, "first": devices.choices(needs), "config": asdict(config)}
    if folder is not None:
        folder.create().finish(found)
    return found


def estimate_command(config: EstimateConfig) -> None:
    """Predict, and print the figures and the bytes by kind; or what fits on which device."""
    if config.devices:
        found = run_devices(config)
        print_table(f"{config.model}: what fits", devices.rows_of(found["bytes"]))
        pairs = found["first"].items()
        print_table("first that fits", [{"device": name, "gradients": a, "forward passes": b} for name, (a, b) in pairs])
        return
    found = run_estimate(config)
    print_table("estimate", [{name: value for name, value in found.items() if isinstance(value, str | int | float)}])
    print_table("bytes", [found["bytes"]])
