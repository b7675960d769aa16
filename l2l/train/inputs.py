"""Inputs of a run: model, tokenizer, task, rows, the batches of each step and the closures that an optimizer evaluates.

Which examples a step gets is a pure function of (rows, batch size, seed, step), so that resuming needs no state.
"""

import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from l2l.estimators import Closure, MicroBatched
from l2l.methods.base import FirstOrder, Method
from l2l.models.batching import Grouping
from l2l.models.heads import TokenQuery
from l2l.models.load import DTYPES, check_device, load_model, load_tokenizer, loading_bar
from l2l.models.offload import offload_layers, stream_of
from l2l.models.prefix import StepStates
from l2l.models.streaming import LayerFiles, load_streamed
from l2l.noise import Key
from l2l.plugins import load_module
from l2l.tasks import BatchLogits, Row, Splits, Task, batch_loss, get_task, load_splits
from l2l.tasks.base import FileData, HubData
from l2l.tasks.encode import Batch, Encoded, Form, collate
from l2l.tasks.evaluate import Scores, evaluate
from l2l.train.config import DEV_ROWS, TEST_ROWS, CompleteConfig, FineTuneConfig
from l2l.train.objectives import AT_ONCE, LOSS, Objective, find_objective
from l2l.train.rewards import GivenReward, Reward, RewardLoss, load_reward, prompts_task
from l2l.train.sampling import TransformersSampler
from l2l.tuners import normalize, schedule
from l2l.tuners.model import TunerModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FURTHER = 1
"""Word of the seed that sets the stream of further batches apart from the permutations of epochs."""


@dataclass(frozen=True)
class RunInputs:
    """What a run works on, whether it trains or only measures."""

    config: CompleteConfig
    model: "PreTrainedModel"
    """In eval mode: with dropout, two losses of one batch would differ."""
    tokenizer: "PreTrainedTokenizerBase"
    task: Task
    splits: Splits
    reported: int
    """Most train rows on which losses are reported: as many as test rows were asked for."""
    reward: Reward | None = field(default=None, kw_only=True)
    """What is maximised, in place of the task's loss."""
    files: LayerFiles | None = field(default=None, kw_only=True)
    """Of the layers below those that are trained, where these are not in memory."""

    @property
    def reported_train(self) -> list[Row]:
        """The train rows on which losses are reported."""
        return self.splits.train[: self.reported]

    @property
    def sampler(self) -> TransformersSampler:
        """Completes prompts with the model, for a reward.

        Raises:
            ValueError: the model writes no texts.
        """
        config = self.config
        rows = config.micro_batch or max(config.batch_size, AT_ONCE)
        return TransformersSampler(self.model, self.tokenizer, config.max_new_tokens, config.temperature, rows)

    def score(
        self, rows: Sequence[Row], grouping: Grouping, task: Task | None = None, advance: Callable[[int], None] | None = None
    ) -> Scores:
        """Loss and metric of the model on rows of the run's task, or of ``task``; see :func:`l2l.tasks.evaluate.evaluate`, and
        for a reward :meth:`l2l.train.rewards.Reward.scores`."""
        if self.reward is not None:
            told = self.config.eval_samples, self.config.seed, advance
            return self.reward.scores(self.sampler, self.tokenizer, rows, *told)
        limits: dict[str, Any] = {"max_length": self.config.max_length, "max_new_tokens": self.config.max_new_tokens}
        return evaluate(self.model, self.tokenizer, task or self.task, rows, grouping=grouping, advance=advance, **limits)


def load_run_inputs(
    config: FineTuneConfig,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    given: GivenReward | None = None,
) -> RunInputs:
    """Load task and rows, or a reward and its prompts, and model and tokenizer where they are not given.

    Args:
        given: a reward and prompts that are objects, of which the configuration has names.

    Raises:
        ValueError, FileNotFoundError: one of them cannot be loaded; the message says which.
    """
    check_device(config.device)
    reward, prompts, places = load_reward(config.reward, config.prompts, given)
    task = get_task(config.task) if reward is None else prompts_task(prompts)
    dev, test = config.dev_size or DEV_ROWS, config.test_size or TEST_ROWS
    splits = load_splits(task, config.data_dir, config.train_size, dev, test, config.seed)
    files = None
    if config.stream_layers:
        if model is not None:
            raise ValueError("stream_layers reads a model from its files, and one in memory is given: give its directory")
        if task.generates:
            raise ValueError(f"task {task.name!r} generates answers, which takes all layers: leave stream_layers off")
        options = {"dtype": DTYPES[config.dtype], "device": config.device, "attn_implementation": config.attn_implementation}
        model, files = load_streamed(config.model, config.completed().train_layers, **options)
    if model is None:
        labels = None if reward is not None else len(task.example(splits.train[0]).options)
        names = "dtype device device_map revision head attn_implementation trust_remote_code seed quantize offload"
        options = {name: getattr(config, name) for name in names.split()}
        with loading_bar(config.progress):
            model = load_model(config.model, num_labels=labels, **options)
    if config.offload and stream_of(model) is None:
        offload_layers(model, config.device or "cpu")
    if tokenizer is None:
        source = model.config._name_or_path or config.model
        tokenizer = load_tokenizer(source, config.revision, config.trust_remote_code)
    model.eval()
    if reward is not None:
        reward = reward.encoded(prompts, places, model, tokenizer, config.max_new_tokens, config.max_length)
    return RunInputs(config.completed(), model, tokenizer, task, splits, test, reward=reward, files=files)


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, epoch)).permutation(rows).tolist())


def batch_indices(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of a step's batch: each epoch is a permutation of its own, and batches continue across epochs."""
    wanted = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(rows, seed, i // rows)[i % rows] for i in wanted]


@final
@dataclass(frozen=True)
class Batcher:
    """Batches of encoded examples by step."""

    examples: Sequence[Encoded]
    form: Form
    pad_id: int
    batch_size: int
    seed: int
    device: torch.device | str = "cpu"
    grouping: Grouping = field(default_factory=Grouping)
    """How rows are laid out and split into forward passes; which examples a step gets does not depend on it."""

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        return self.batch(self.indices(step))

    def further(self, step: int, number: int) -> Batch:
        """The ``number``-th further batch of a step, for methods that search on other batches than the step's."""
        return self.batch(self.indices(step, number))

    def indices(self, step: int, further: int | None = None) -> list[int]:
        """Indices of the examples of a step's batch, or of one of its further batches."""
        rows = len(self.examples)
        if further is None:
            return batch_indices(rows, self.batch_size, self.seed, step)
        generator = np.random.default_rng((self.seed, step, further, _FURTHER))
        return generator.choice(rows, size=self.batch_size, replace=rows < self.batch_size).tolist()

    def batch(self, indices: Sequence[int]) -> Batch:
        """These examples as one batch."""
        batch = collate([self.examples[i] for i in indices], self.form, self.pad_id, grouping=self.grouping)
        return replace(batch, parts=self.grouping.split(batch)).to(self.device)


@final
@dataclass(frozen=True)
class Closures:
    """The closures of a run by step: the objective on the step's examples, whole or in micro-batches."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    batcher: Batcher
    rows: Sequence[Row]
    """The rows that the batcher's examples were made from, in the same order."""
    objective: Objective | None = None
    """None: the task's loss."""
    micro_batch: int | None = None
    """Most examples per forward pass; None: the whole batch."""
    outputs: bool = False
    """Whether the task's loss is returned as logits and targets (:class:`l2l.tasks.BatchLogits`)."""
    near: bool = False
    """Whether a step's evaluations lie near its first one, at theta: what the rest of the vocabulary adds is linear then."""
    in_pieces: bool = False
    """Whether an objective is the mean over its micro-batches, too, as ranks that share a batch need it; else it feeds them by
    itself."""
    rewarded: RewardLoss | None = None
    """In place of an objective, minus the rewards of a batch [b]."""
    states: StepStates | None = None
    """Shares hidden states between a step's passes over the task's loss; None: each runs all layers that it needs."""
    head_displaced: Callable[[], bool] | None = None
    """Whether the head may have other weights now than at theta; None: a trained one always may."""

    def at(self, step: int) -> Closure:
        """The objective on a step's batch."""
        return self._on(self.batcher.indices(step), Key(self.batcher.seed, step))

    def further(self, step: int, number: int) -> Closure:
        """The objective on a further batch of the same step."""
        return self._on(self.batcher.indices(step, number), Key(self.batcher.seed, step, 1 + number))

    def value(self, rows: Sequence[Row]) -> float | None:
        """The objective on any rows; None where it is the task's loss, which an evaluation computes anyway."""
        return None if self.objective is None else float(self.objective(self.model, self.tokenizer, rows))

    def _on(self, indices: Sequence[int], key: Key) -> Closure:
        """
        Args:
            key: of the noise of what is sampled.
        """
        if self.in_pieces and (self.objective is not None or self.rewarded is not None):
            size = self.micro_batch or len(indices)
            parts = [range(start, min(start + size, len(indices))) for start in range(0, len(indices), size)]
            pieces = tuple(self._piece(indices, part, key) for part in parts)
            return MicroBatched(pieces, tuple(len(part) / len(indices) for part in parts))
        if self.rewarded is not None:
            return partial(self.rewarded, [self.rows[i] for i in indices], key, range(len(indices)))
        if self.objective is not None:
            return self._objective(self.objective, indices)
        if self.micro_batch is None:
            return self._loss(self.batcher.batch(indices))
        chunks = self._chunks(indices)
        # The mean of the task's loss is taken over examples, or over tokens of their gold options.
        weights = [
            len(chunk)
            if self.batcher.form == "classification"
            else sum(len(example.options[example.gold[0]].targets) for example in chunk)
            for chunk in chunks
        ]
        pieces = tuple(self._loss(self._micro_batch(chunk)) for chunk in chunks)
        return MicroBatched(pieces, tuple(weight / sum(weights) for weight in weights))

    def _piece(self, indices: Sequence[int], part: range, key: Key) -> Closure:
        """The mean of the objective over a part of a batch."""
        own, rewarded = [indices[place] for place in part], self.rewarded
        if rewarded is None:
            assert self.objective is not None, "one of them is there"
            return self._objective(self.objective, own)
        rows = [self.rows[i] for i in own]
        return lambda: rewarded(rows, key, part).mean()

    def _objective(self, objective: Objective, indices: Sequence[int]) -> Closure:
        return partial(objective, self.model, self.tokenizer, [self.rows[i] for i in indices])

    def _loss(self, batch: Batch) -> Closure:
        closure: Closure = partial(batch_loss, self.model, batch, self.batcher.form)
        if self.outputs:
            closure = BatchLogits(self.model, batch, self.batcher.form, near=self.near, head_displaced=self.head_displaced)
        return closure if self.states is None else self.states.sharing(closure, batch.parts or (batch,))

    def _chunks(self, indices: Sequence[int]) -> list[list[Encoded]]:
        """Examples of each forward pass of a batch."""
        size = self.micro_batch or len(indices)
        starts = range(0, len(indices), size)
        return [[self.batcher.examples[i] for i in indices[start : start + size]] for start in starts]

    def _micro_batch(self, examples: Sequence[Encoded]) -> Batch:
        # The first batch of a batcher of these examples alone holds all of them.
        return replace(self.batcher, examples=examples, batch_size=len(examples)).at(0)

    def fed(self, step: int) -> list[TokenQuery]:
        """What the task's loss on a step's batch feeds the model, pass by pass."""
        indices = self.batcher.indices(step)
        batches = [self.batcher.batch(indices)] if self.micro_batch is None else map(self._micro_batch, self._chunks(indices))
        return [part for batch in batches for part in batch.parts or (batch,)]


def make_closures(inputs: RunInputs, method: object, batcher: Batcher) -> Closures:
    """The closures of the configured objective on the train rows.

    Raises:
        ValueError: no such objective, one that the task has no answers or options for, or one without a gradient for a
            method that needs one.
    """
    config, rows, reward = inputs.config, inputs.splits.train, inputs.reward
    if config.objective != LOSS and (isinstance(method, FirstOrder) or getattr(method, "differentiates", False)):
        raise ValueError(
            f"method {config.method!r} needs the gradient of what it minimises, and objective {config.objective!r} has "
            "none: use objective loss, or a method of forward passes"
        )
    shared = config.parallel == "data"
    if reward is not None:
        rewarded = RewardLoss(reward, inputs.sampler, inputs.tokenizer)
        pieces = {"micro_batch": config.micro_batch, "in_pieces": shared}
        return Closures(inputs.model, inputs.tokenizer, batcher, rows, rewarded=rewarded, **pieces)
    limits = config.max_length, config.max_new_tokens, config.micro_batch
    objective = find_objective(config.objective, inputs.task, rows[0], *limits, batcher.grouping)
    outputs = config.lr == "auto" or getattr(method, "reads_outputs", False)
    near = getattr(method, "from_center", False)
    return Closures(inputs.model, inputs.tokenizer, batcher, rows, objective, config.micro_batch, outputs, near, shared)


# What a run has read: fingerprints that are compared where it is continued.

NAMES = frozenset(("model", "revision", "tokenizer", "task", "tasks", "validation_tasks", "tuner", "data_dir", "prompts"))
"""Fields of a configuration that name inputs: what is compared is what they name."""
UNCOMPARED = frozenset(("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"))
"""Settings of a model that depend on how it was loaded or saved, beside those whose names begin with an underscore."""
_CHUNK = 1 << 24
"""Bytes that are hashed at a time."""


def fingerprint(inputs: RunInputs, examples: Sequence[Encoded], method: object, weights: Mapping[str, str]) -> dict[str, Any]:
    """What a run reads, as plain values: of the task and its rows after rendering, the train rows after encoding, the
    tokenizer's vocabulary, the model's weights and settings, and the method with its tuner. Where files lie, and columns that
    no prompt uses, are not in it.

    Args:
        examples: the train rows, encoded.
        weights: of :func:`weights_digests`.
    """
    config, model, splits, task = inputs.config, inputs.model, inputs.splits, inputs.task
    found: dict[str, Any] = {"task": {"label": task.label, "form": task.form, "metric": task.metric}}
    if task.scoring is not None:
        found["task"]["scoring"] = asdict(task.scoring)
    found["train rows"] = examples_fingerprint(examples)
    found |= {f"{kind} rows": rows_fingerprint(task, getattr(splits, kind)) for kind in ("dev", "test")}
    if (own := config.reward or config.objective).count(":"):  # reads what it likes of a row, and is code outside the package
        rows = json.dumps([[dict(row) for row in part] for part in (splits.train, splits.dev)], sort_keys=True, default=str)
        module = own.rpartition(":")[0] if inputs.reward is None else getattr(inputs.reward.function, "__module__", "")
        found["objective"] = {"columns": digest(rows), "source": source_digest(module)}
    found["method"] = method_fingerprint(method)
    return found | model_fingerprint(model, inputs.tokenizer, weights)


def examples_fingerprint(examples: Sequence[Encoded]) -> dict[str, Any]:
    """Number and digests of rows after encoding, their labels apart."""
    texts = digest([(one.options, one.whole, one.pooled) for one in examples])
    return {"number": len(examples), "texts": texts, "labels": digest([one.gold for one in examples])}


def rows_fingerprint(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """Number and digests of rows after rendering, their labels apart."""
    rendered = [task.example(row) for row in rows]
    texts = digest([(example.prompt, example.options, example.answers) for example in rendered])
    return {"number": len(rows), "texts": texts, "labels": digest([example.gold for example in rendered])}


def weights_digests(
    model: torch.nn.Module, trained: Sequence[torch.Tensor] = (), read: Callable[[str], torch.Tensor] | None = None
) -> dict[str, str]:
    """Digests of the trained weights, of the other parameters, and of the buffers.

    Args:
        read: gives the tensors, by name, that are not in memory.
    """
    mine = set(map(id, trained))

    def digest_of(named: Iterable[tuple[str, torch.Tensor]]) -> str:
        return tensors_digest(read(name) if read and value.is_meta else value for name, value in named if id(value) not in mine)

    others = digest_of(model.named_parameters()), digest_of(model.named_buffers())
    return dict(zip(("trained", "frozen", "buffers"), (tensors_digest(trained), *others), strict=True))


def model_fingerprint(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", weights: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Digests of weights and vocabulary, and the settings of the model's configuration.

    Args:
        weights: of :func:`weights_digests`, where they are known.
    """
    settings = {
        name: value
        for name, value in json.loads(json.dumps(model.config.to_dict(), default=str)).items()
        if not name.startswith("_") and name not in UNCOMPARED
    }
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    vocabulary = digest((sorted(tokenizer.get_vocab().items()), special))
    return {"model": {"weights": digest(weights or weights_digests(model)), "settings": settings}, "tokenizer": vocabulary}


def method_fingerprint(method: Any) -> dict[str, Any]:
    """Class and fields of a method, nested; of tuners and tensors a digest; of code outside the package its file's too."""
    kind, found = type(method), {}
    for name in (one.name for one in dataclasses.fields(method)):
        value = getattr(method, name)
        if isinstance(value, TunerModel):
            value = tuner_fingerprint(value)
        elif isinstance(value, Method | FirstOrder):
            value = method_fingerprint(value)
        elif isinstance(value, torch.Tensor):
            value = tensors_digest([value])
        elif name == "horizon" and not _sees_horizon(method):
            continue
        else:
            value = json.loads(json.dumps(value, default=lambda other: type(other).__name__))
        found[name] = value
    outside = {} if kind.__module__.startswith("l2l.") else {"source": source_digest(kind.__module__)}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **found, **outside}


def _sees_horizon(method: Any) -> bool:
    """Whether what a method does depends on the number of steps that it plans for."""
    tuner = getattr(method, "tuner", None)
    return tuner is None or tuner.feature_set != "paper"  # the paper's features have no share of the run


def tuner_fingerprint(tuner: TunerModel) -> str:
    """Digest of all that decides a tuner's sigma."""
    settings = [tuner.architecture, tuner.architecture_args, tuner.feature_set]
    settings += [normalize.normalizer_config(tuner.normalizer), schedule.schedule_config(tuner.block_schedule)]
    named = {**tuner.network.state_dict(), **(tuner.basis or {})}
    return digest((json.dumps(settings, sort_keys=True, default=str), list(named), tensors_digest(named.values())))


def source_digest(module: str) -> str | None:
    """Digest of the file that a module was imported from; None where it has none, as in a notebook."""
    try:
        return digest(Path(inspect.getfile(sys.modules.get(module) or load_module(module, module))).read_bytes())
    except (OSError, TypeError, ValueError):
        return None


def files_fingerprint(task: Task, data_dir: str | None) -> dict[str, str]:
    """Digest of each file that a task's rows come from, by name; empty where they are generated, or of the hub."""
    paths: Iterable[Path] = ()
    if isinstance(task.source, FileData):
        paths = (*task.source.train, *task.source.validation)
    elif isinstance(task.source, HubData) and data_dir is not None:
        paths = sorted((Path(data_dir) / task.name).glob("*.jsonl"))
    return {path.name: digest(path.read_bytes()) for path in paths}


def digest(value: object) -> str:
    """16 digits of bytes, or of the representation of plain values."""
    content = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def tensors_digest(tensors: Iterable[torch.Tensor]) -> str:
    """16 digits of shapes, dtypes and all bits of tensors in their order; tensors that are one are hashed once.

    Unlike :func:`l2l.tuners.fingerprint.weights_hash` it sees the order of the numbers and their last bits, as a run does.
    """
    found, seen = hashlib.blake2b(digest_size=8), set()
    for tensor in tensors:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for plain in _plain_parts(tensor.detach()):
            found.update(f"{plain.dtype} {list(plain.shape)}".encode())
            for chunk in plain.reshape(-1).view(torch.uint8).split(_CHUNK):
                found.update(chunk.cpu().numpy().data)
    return found.hexdigest()


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor, or those that a quantised one is made of; none of one without memory."""
    if tensor.is_meta:
        return []
    if flatten := getattr(tensor, "__tensor_flatten__", None):
        return [part for name in flatten()[0] for part in _plain_parts(getattr(tensor, name))]
    return [tensor.as_subclass(torch.Tensor).contiguous()]
