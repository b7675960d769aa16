"""``l2l evaluate``: how good a model is on a task as it stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from l2l.methods.base import check_counts
from l2l.models.heads import compile_decoder
from l2l.models.load import load_model, load_tokenizer
from l2l.report.rundir import RunDirectory
from l2l.tasks import get_task
from l2l.tasks.evaluate import evaluate
from l2l.tasks.rows import load_splits


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss and metric of a model on the rows of a task."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory (such as the ``model`` folder of a fine-tuning run), or a hub id."""
    task: str = "world_topic"
    """Name of a task."""
    split: Literal["dev", "test"] = "test"
    """``test``: rows of the validation split; ``dev``: rows split off the train rows."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; without it rows come from the hub."""
    rows: int = 500
    """Most rows to score."""
    batch_size: int = 32
    """Examples per forward pass."""
    seed: int = 0
    """Seed of the dev split."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    compile: bool = False
    """Compile the decoder with torch.compile. The first batches take half a minute or more; on the CPU a C++ compiler is
    needed."""
    dtype: str = "float32"
    """Dtype the weights are loaded in."""
    device: str | None = None
    """Torch device; None: the CPU."""
    revision: str | None = None
    """Revision of a hub model."""
    out: str | None = None
    """Directory for ``config.yaml`` and ``summary.json``; None: print only."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_counts(rows=self.rows, batch_size=self.batch_size)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; the figures, written to ``out`` where one is given.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite) if config.out else None
    task = get_task(config.task)
    wanted = {"train": config.rows, "dev": config.rows, "test": 0} if config.split == "dev" else {}
    splits = load_splits(
        task, config.data_dir, **(wanted or {"train": 0, "dev": 0, "test": config.rows}), seed=config.seed
    )
    model = load_model(config.model, config.dtype, config.device, config.revision)
    if config.compile:
        compile_decoder(model)
    tokenizer = load_tokenizer(config.model, config.revision)
    rows = splits.dev if config.split == "dev" else splits.test
    scores = evaluate(model, tokenizer, task, rows, config.batch_size, config.max_length, config.progress)
    found = {"task": f"{task.name}@{task.version}", "split": config.split, "rows": scores.n, "loss": scores.loss}
    found[scores.metric] = scores.value
    if folder is not None:
        folder.create()
        folder.finish(found | {"config": asdict(config)})
    return found
