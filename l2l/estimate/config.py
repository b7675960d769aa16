"""What an estimate is told: the fields of ``l2l estimate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from l2l.methods.base import check_counts


@dataclass(frozen=True)
class EstimateConfig:
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
    """``mezo``, ``dizo``, ``learned``, or the path of a module that defines a method without memory of its own."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method, e.g. ``{interval: 100}`` for dizo or ``{draws: 4}``."""
    perturb: Literal["auto", "in_place", "exact"] = "auto"
    """``in_place`` perturbs the stored weights (float32 only), ``exact`` transient copies; ``auto``: by dtype."""
    update: Literal["auto", "master", "stochastic"] = "auto"
    """Half precision: updates to a float32 ``master`` copy, or rounded ``stochastic``; ``auto``: the master if it
    fits."""
    steps: int = 2000
    """Steps of the run whose passes and hours are told."""
    device: str | None = None
    """Torch device; None: the CPU."""
    revision: str | None = None
    """Revision of a hub model."""
    out: str | None = None
    """Directory for ``config.yaml`` and ``summary.json``; None: nothing is written."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""

    def __post_init__(self) -> None:
        answer = 1 if self.answer_tokens is None else self.answer_tokens
        check_counts(batch_size=self.batch_size, length=self.length, steps=self.steps, answer_tokens=answer)
        if answer > self.length:
            raise ValueError(f"answer_tokens={answer} is more than length={self.length}: a row has no more tokens")
