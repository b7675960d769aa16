"""What a benchmark is told: the fields of ``l2l bench``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from l2l.methods.base import check_counts
from l2l.models.load import DTYPES


@dataclass(frozen=True)
class BenchConfig:
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
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_counts(
            batch_size=self.batch_size,
            warmup=self.warmup,
            repeats=self.repeats,
            threads=1 if self.threads is None else self.threads,
            answer_tokens=1 if self.answer_tokens is None else self.answer_tokens,
        )
        if self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2: the first token of a row is not predicted")
        if self.answer_tokens is not None and self.answer_tokens >= self.length:
            raise ValueError(f"answer_tokens={self.answer_tokens} must be below length={self.length}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")
        check_device(self.device)

    @property
    def torch_device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.device or "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return DTYPES[self.dtype]

    @property
    def half(self) -> bool:
        """Whether the weights are of half precision."""
        return torch.finfo(self.torch_dtype).bits < 32


def check_device(name: str | None) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: torch knows no such device, or CUDA is asked for where there is none.
    """
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown to torch; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not measured; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there (CUDA devices found: {torch.cuda.device_count()}); use cpu")
