"""``l2l evaluate``: loss and metric of a model on a task."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from l2l.arguments import Arguments
from l2l.methods.base import check_counts
from l2l.models import Head, compile_decoder
from l2l.models.load import Quantize, load_model, load_tokenizer
from l2l.report.console import Bars, print_table
from l2l.report.run_directory import RunDirectory
from l2l.tasks import get_task, load_splits
from l2l.tasks.evaluate import evaluate, visits


@dataclass(frozen=True)
class EvaluateConfig(Arguments):
    """Loss and metric of a model on the rows of a task."""

    model: str = "l2l/tiny"
    """``l2l/tiny`` (embedded), a directory (such as the ``model`` folder of a fine-tuning run), or a hub id."""
    task: str = "world_topic"
    """Name of a task, or the path of a task file (docs/your-task.md)."""
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
    """Compile the decoder; the first batches take half a minute or more. On the CPU this needs a C++ compiler."""
    calibrate: bool = False
    """Score options by what the prompt adds to them: less their score behind a prompt without the input."""
    dtype: str = "float32"
    """Dtype the weights are loaded in."""
    device: str | None = None
    """Torch device; None: the CPU."""
    device_map: str | None = None
    """As transformers has it, e.g. ``auto``; None: all on ``device``."""
    revision: str | None = None
    """Revision of a hub model."""
    head: Head = "auto"
    """What the model is used as: ``causal``, ``masked``, ``seq2seq`` or ``classifier``; ``auto``: what it was saved as."""
    num_labels: int | None = None
    """Classes of a classifier; None: what its config says."""
    attn_implementation: str | None = None
    """``eager``, ``sdpa``, … as transformers names them; None lets it choose."""
    trust_remote_code: bool = False
    """Whether code that comes with a checkpoint may run."""
    quantize: Quantize = "none"
    """Load the weights in 8 or 4 bits: see docs/schemes.md."""
    out: str | None = None
    """Directory for ``config.yaml`` and ``summary.json``; None: print only."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(rows=self.rows, batch_size=self.batch_size)


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; the figures, written to ``out`` where one is given. ``interval`` is the metric's, at 95 %.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite) if config.out else None
    task, is_dev = get_task(config.task), config.split == "dev"
    # Dev rows are split off the train rows, so that some have to be train rows.
    train, dev, test = (config.rows, config.rows, 0) if is_dev else (0, 0, config.rows)
    splits = load_splits(task, config.data_dir, train, dev, test, config.seed)
    names = "dtype device device_map revision head num_labels attn_implementation trust_remote_code quantize"
    model = load_model(config.model, **{name: getattr(config, name) for name in names.split()})
    if config.compile:
        compile_decoder(model)
    tokenizer = load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    rows, limits = splits.dev if is_dev else splits.test, (config.batch_size, config.max_length)
    with Bars(visible=config.progress) as bars, bars.phase(f"evaluate {task.name}", visits(task, rows)) as advance:
        scores = evaluate(model, tokenizer, task, rows, *limits, advance, calibrate=config.calibrate)
    found = {"task": task.label, "split": config.split, "rows": scores.n, "loss": scores.loss}
    found |= {scores.metric: scores.value, "interval": list(scores.interval)}
    found |= {f"official_{name}": value for name, value in scores.official.items()}
    if folder is not None:
        folder.create()
        folder.finish(found | {"config": asdict(config)})
    return found


def evaluate_command(config: EvaluateConfig) -> None:
    """Evaluate, and print the figures."""
    print_table("evaluate", [run_evaluation(config)])
