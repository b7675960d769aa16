"""``l2l bench``: build, warm up, take turns, and say what a step costs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from l2l.bench.config import BenchConfig
from l2l.bench.contenders import FORWARDS, LEARNED, PLAIN, STEP, TEXTBOOK, causal_loss, contenders, tokens
from l2l.bench.hardware import hardware
from l2l.bench.measure import checksum, peaks, ratio, rounds
from l2l.bench.shapes import build
from l2l.blocks import Blocks
from l2l.estimators.base import Closure, finite_loss
from l2l.estimators.two_point import two_point
from l2l.finetune.optimizer import ZOOptimizer
from l2l.methods.base import FirstOrder
from l2l.methods.mezo import MeZO
from l2l.noise import Key, active_backend
from l2l.perturb import Direction
from l2l.report.files import write_json
from l2l.report.memory import current_bytes
from l2l.report.progress import progress_bar
from l2l.report.rundir import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULT = "bench.json"
LOOKS = 3
"""Steps without an update after which half-precision weights must be what they were, bit for bit."""

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

logger = logging.getLogger("l2l")


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, and leave ``bench.json``, ``config.yaml`` and ``summary.json`` in ``out``; the figures.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    found = measure(config)
    folder.create()
    write_json(folder.path / RESULT, found)
    folder.finish(found | {"config": asdict(config)})
    return found


def measure(config: BenchConfig) -> dict[str, Any]:
    """The figures, written nowhere: ratios, medians in seconds, peaks in bytes, and what they were measured on.

    A ratio of times is the median over rounds of the ratios within a round. Peaks count the weights, but not what the
    process holds beside them after a first forward pass: interpreter, libraries, tokens.

    Raises:
        ValueError, FileNotFoundError: as :func:`l2l.bench.shapes.build`.
    """
    machine = hardware()
    if machine["noisy"]:
        logger.warning("load %.1f on %d cores: times are noisy", machine["load_average"], machine["cores"])
    with _threads(config.threads):
        model = build(config.model, config.dtype, config.torch_device, config.seed, config.length)
        return _head(config, model) | _figures(config, model) | machine


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """So many threads inside, as many as before afterwards."""
    earlier = torch.get_num_threads()
    try:
        torch.set_num_threads(wanted or earlier)
        yield
    finally:
        torch.set_num_threads(earlier)


def _head(config: BenchConfig, model: PreTrainedModel) -> dict[str, Any]:
    """What was measured."""
    blocks = Blocks.of(model, trainable=False)
    sizes = [block.numel * block.tensor.element_size() for block in blocks]
    return {
        "shape": config.model,
        "dtype": SHORT[config.torch_dtype],
        "device": str(config.torch_device),
        "backend": active_backend(config.torch_device, config.torch_dtype),
        "threads": torch.get_num_threads(),
        "batch_size": config.batch_size,
        "length": config.length,
        "answer_tokens": config.answer_tokens,
        "parameters": blocks.numel,
        "weight_bytes": sum(sizes),
        "largest_block_bytes": max(sizes),
    }


def _figures(config: BenchConfig, model: PreTrainedModel) -> dict[str, Any]:
    device = config.torch_device
    closure = causal_loss(model, tokens(config, model.config.get_text_config().vocab_size), config.answer_tokens)
    beside = _beside_weights(model, closure, device)
    found = contenders(model, closure, config)
    with progress_bar("bench", len(found) * (config.repeats + 1), visible=config.progress) as advance:
        used = {name: peak - beside for name, peak in peaks(found, device, config.warmup, advance).items()}
        seconds = rounds(found, device, config.repeats, advance)
    step = median(seconds[STEP])
    optimizer = ZOOptimizer(model, MeZO(), seed=config.seed, update=config.update)
    return {
        "step_over_two_forwards": ratio(seconds, STEP, FORWARDS),
        "plain_step_over_two_forwards": ratio(seconds, PLAIN, FORWARDS),
        "reference_over_two_forwards": ratio(seconds, TEXTBOOK, FORWARDS),
        "reference_over_ours": ratio(seconds, TEXTBOOK, STEP),
        "learned_over_mezo": ratio(seconds, LEARNED, STEP),
        "peak_over_inference": _share(used, STEP),
        "learned_peak_over_inference": _share(used, LEARNED),
        "reference_peak_over_inference": _share(used, TEXTBOOK),
        "tokens_per_second": config.batch_size * config.length / step,
        "update": optimizer.theta.update,
        "restore_bit_identical": restored(optimizer, closure) if config.half else None,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "samples": seconds,
        "peak_bytes": used,
        "bytes_beside_weights": beside,
    }


def _beside_weights(model: PreTrainedModel, closure: Closure, device: torch.device) -> int:
    """Bytes in use that are not weights; measured after a forward pass, which loads libraries."""
    finite_loss(closure)
    weights = sum(block.numel * block.tensor.element_size() for block in Blocks.of(model, trainable=False))
    return current_bytes(device) - weights


def _share(used: Mapping[str, int], name: str) -> float | None:
    """Peak of a contender over that of inference; None where there is nothing to compare."""
    return used[name] / used[FORWARDS] if name in used and used[FORWARDS] > 0 else None


def restored(optimizer: ZOOptimizer, closure: Closure) -> bool:
    """Whether steps that look but do not move leave every bit of the weights as it was."""
    weights, method = [block.tensor for block in optimizer.blocks], optimizer.method
    if isinstance(method, FirstOrder):
        return True  # it looks nowhere
    before = checksum(weights)
    for number in range(LOOKS):
        with optimizer.theta.step():
            direction = Direction(Key(optimizer.seed, number), (1.0,) * len(weights))
            two_point(closure, optimizer.theta, direction, method.epsilon)
    return checksum(weights) == before
