"""``l2l estimate``: what a run would need, from a config and a short measurement."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from l2l.blocks import Blocks
from l2l.estimate.config import EstimateConfig
from l2l.estimate.memory import Load, Plan, inference_bytes
from l2l.estimate.predict import Prediction, advice, make_plan, named_method_costs, predict
from l2l.estimate.shape import ModelShape, config_of, meta_model, model_shape
from l2l.estimate.time import forward_flops
from l2l.models.load import DTYPES
from l2l.noise import active_backend
from l2l.report.memory import available_bytes, current_bytes
from l2l.report.rundir import RunDirectory


def run_estimate(config: EstimateConfig) -> dict[str, Any]:
    """Predict; the figures, written to ``out`` where one is given. Nothing but a config is read.

    Raises:
        ValueError, FileNotFoundError: bad input, named.
    """
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    folder = RunDirectory(config.out, asdict(config), config.overwrite) if config.out else None
    device, dtype = _device(config.device), DTYPES[config.dtype]
    model = meta_model(config_of(config.model, config.revision))
    _check_length(model, config.length)
    blocks, shape = Blocks.of(model), model_shape(model)
    load = Load(config.batch_size, config.length, config.batch_size * (config.answer_tokens or config.length))
    costs = named_method_costs(config.method, config.method_args, model, blocks)
    room = available_bytes(device)
    plan = make_plan(shape, dtype, config.perturb, config.update, costs, room)
    found = predict(shape, load, load, plan, costs, device)
    process = current_bytes(device)  # with the libraries that a step loads: the measurement has used them
    summary = _summary(config, shape, load, plan, found, process, room)
    if folder is not None:
        folder.create().finish(summary)
    return summary


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown: use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not there: torch sees no CUDA device; leave --device out for the CPU")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} cannot be measured: use cpu or cuda")
    return device


def _check_length(model: Any, length: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise ValueError(f"length {length} is more than the {most} positions of the model")


def _summary(
    config: EstimateConfig, shape: ModelShape, load: Load, plan: Plan, found: Prediction, process: int, room: int
) -> dict[str, Any]:
    seconds = found.seconds_per_step or 0.0
    return {
        "model": config.model,
        "parameters": shape.parameters,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "method": config.method,
        "walk": plan.perturb,
        "update": plan.update,
        "backend": active_backend(_device(config.device), plan.dtype),
        "threads": torch.get_num_threads(),
        "bytes": {"process": process, **found.parts},
        "peak_bytes": process + found.bytes,
        "peak_over_inference": found.bytes / inference_bytes(found.parts),
        "available_bytes": room,
        "fits": found.bytes <= room,
        "advice": advice(shape, load, plan, room),
        "flops_per_forward": sum(forward_flops(shape, load).values()),
        "seconds_per_forward": found.seconds_per_forward,
        "seconds_per_step": seconds,
        "step_over_forwards": seconds / (found.passes * (found.seconds_per_forward or seconds)),
        "steps_per_hour": 3600 / seconds,
        "passes_per_step": found.passes,
        "steps": config.steps,
        "passes": round(config.steps * found.passes),
        "hours": config.steps * seconds / 3600,
        "config": asdict(config),
    }
