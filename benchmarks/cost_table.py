"""Memory of fine-tuning and meta-training, from 125 million to 70 billion parameters: a table of docs/learn-a-tuner.md.

python benchmarks/cost_table.py --out docs/learn-a-tuner.md

Computed with the formulas of ``l2l estimate`` from shapes without weights: nothing is measured, nothing is fetched. With
``--out`` the text between the two markers of that file is replaced; without, it is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pages import markdown_table

from l2l.costs import (
    Load,
    ModelShape,
    PerturbMode,
    Plan,
    Update,
    backward_bytes,
    inference_bytes,
    memory_parts,
    meta_model,
    model_shape,
)
from l2l.meta.statistics import WAITING
from l2l.methods.registry import declared_method
from l2l.models.shapes import shape_config
from l2l.params import Blocks
from l2l.report.run_directory import write_whole
from l2l.tuners.api import Tuner
from l2l.tuners.published import known_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BEGIN, END = "<!-- cost table: begin -->", "<!-- cost table: end -->"
ROWS, LENGTH = 8, 256
"""Examples per batch, and tokens per example; the loss reads one token of each."""
LOAD = Load(ROWS, LENGTH, ROWS)
GIB = 2**30
FLOAT = 4


def _model(
    model_type: str, width: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool
) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        model_type,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


MODELS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "OPT-125m": lambda: shape_config("opt-125m-shape"),
    "Qwen2.5-0.5B": lambda: _model("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "Llama-3.2-1B": lambda: known_config("meta-llama/Llama-3.2-1B"),
    "OPT-1.3B": lambda: shape_config("opt-1.3b-shape"),
    "Llama-3.1-8B": lambda: known_config("meta-llama/Llama-3.1-8B"),
    "Qwen2.5-14B": lambda: known_config("Qwen/Qwen2.5-14B"),
    "OPT-30B": lambda: shape_config("opt-30b-shape"),
    "Llama-3.1-70B": lambda: _model("llama", 8192, 28672, 80, 64, 8, 128256, False),
}
"""Name in the table -> config, from the smallest."""


@dataclass(frozen=True)
class Cost:
    """Bytes of the tensors that a run holds at its peak."""

    parameters: int
    blocks: int
    tuner: int
    """Of the file that a tuner with one network per block takes."""
    forward: int
    """Of a mere forward pass, in bfloat16."""
    learned_half: int
    """Fine-tuning with forward passes in bfloat16, a tuner included; updates are rounded stochastically."""
    learned: int
    """The same in float32."""
    adamw: int
    """Fine-tuning by backpropagation with AdamW in float32."""
    meta: int
    """Meta-training with the objective ``one_step_loss`` in float32."""
    ratio: int
    """With the objective ``log_progress_rate``, which holds a gradient of the model as well."""


def cost(config: PreTrainedConfig) -> Cost:
    """The costs of a model of this config."""
    model = meta_model(config)
    shape = model_shape(model)
    half = _parts(model, shape, "learned", torch.bfloat16, "functional", "stochastic")
    meta = meta_bytes(shape)
    return Cost(
        parameters=shape.parameters,
        blocks=len(shape.blocks),
        tuner=sum(parameter.nbytes for parameter in Tuner.for_model(model).network.parameters()),
        forward=inference_bytes(half),
        learned_half=sum(half.values()),
        learned=sum(_parts(model, shape, "learned", torch.float32, "in_place", "direct").values()),
        adamw=sum(_parts(model, shape, "adamw", torch.float32, "in_place", "direct").values()),
        meta=meta,
        ratio=meta + shape.trained * FLOAT,
    )


def _parts(
    model: PreTrainedModel, shape: ModelShape, method: str, dtype: torch.dtype, perturb: PerturbMode, update: Update
) -> dict[str, int]:
    plan = Plan.of(dtype, perturb, update, declared_method(method, {}, model), Blocks.of(model))
    return memory_parts(shape, LOAD, plan)


def meta_bytes(shape: ModelShape, load: Load = LOAD) -> int:
    """Weights, the trajectory's velocity, what a backward pass holds, and the gradients that wait to be used.

    Gradients are handed over and freed block by block: the largest one is held, and one in ``WAITING`` of all others.
    """
    gradients = max(shape.blocks) + shape.trained // WAITING
    return FLOAT * (shape.parameters + shape.trained + gradients) + backward_bytes(shape, load, torch.float32)


def row(name: str, found: Cost) -> dict[str, str]:
    """A row of the table; sizes in GiB, of the tuner in MiB."""
    sizes: dict[str, Any] = {
        "forward pass, bf16": found.forward,
        "MeZO or a tuner, bf16": found.learned_half,
        "MeZO or a tuner, fp32": found.learned,
        "AdamW, fp32": found.adamw,
        "learn a tuner (`one_step_loss`)": found.meta,
        "learn a tuner (`log_progress_rate`)": found.ratio,
    }
    return {
        "model": name,
        "parameters": f"{found.parameters / 1e9:.3g} B",
        "blocks": str(found.blocks),
        "tuner's file, MiB": f"{found.tuner / 2**20:.2f}",
        **{label: f"{size / GIB:,.{1 if size < 100 * GIB else 0}f}" for label, size in sizes.items()},
    }


RESTS_ON = f"""GiB of tensors at the peak, for batches of {ROWS} examples of {LENGTH} tokens, of which the loss reads one each.
**Computed, not measured**: `python benchmarks/cost_table.py --out docs/learn-a-tuner.md` writes this table with the formulas of
`l2l estimate`, from shapes without weights. Interpreter, libraries and the allocator's slack come on top; nothing is recomputed
or offloaded. MeZO needs what a tuner needs, but for the tuner itself. In bf16, weights are perturbed in transient copies, and
updates rounded stochastically. AdamW holds all gradients and two moments. Meta-training holds the weights, a velocity as large
as they are, and gradients block by block; the objective `log_progress_rate` holds one gradient of the whole model as well,
unless `--objective_args '{{keep: false}}'` has it take a third backward pass instead."""


def text() -> str:
    """The table with what it rests on."""
    return f"{markdown_table([row(name, cost(make())) for name, make in MODELS.items()])}\n\n{RESTS_ON}"


def replaced(document: str, new: str) -> str:
    """The document with what stands between the markers replaced.

    Raises:
        ValueError: it does not have each marker once, in order.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before or END in after:
        raise ValueError(f"the file must have the lines {BEGIN!r} and {END!r} once each, in this order")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page between whose markers it goes; default: print")
    options = parser.parse_args()
    found = text()
    if options.out is None:
        print(found)
        return
    try:
        page = replaced(options.out.read_text(encoding="utf-8"), found)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cost_table: {options.out}: {error}") from error
    write_whole(options.out, lambda path: path.write_text(page, encoding="utf-8"))


if __name__ == "__main__":
    main()
