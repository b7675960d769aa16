"""How transformers' Trainer is used, by its documentation and its own tests, with a ZOTrainer in its place.

``docs/trainer.md`` lists the patterns: a test of this file for each row of its table.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional
from trainers import VOCABULARY, Steps, arguments, logged, model, rows, same, weights
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    TrainerCallback,
    get_linear_schedule_with_warmup,
)

import l2l
from l2l.integrations import ZOArguments, ZOTrainer

pytestmark = pytest.mark.in_turn

PAGE = Path(__file__).parent.parent.parent / "docs/trainer.md"


def trainer(folder: Path, zo: ZOArguments | None = None, kind: Any = ZOTrainer, **given: Any) -> Any:
    """A trainer of the tiny model; what is no argument of a trainer is one of ``TrainingArguments``."""
    own = {"model", "train_dataset", "eval_dataset", "callbacks", "data_collator", "compute_metrics", "model_init"}
    own |= {"compute_loss_func", "preprocess_logits_for_metrics", "optimizers", "processing_class"}
    passed = {name: given.pop(name) for name in list(given) if name in own}
    if "model_init" not in passed:
        passed.setdefault("model", model())
    passed.setdefault("train_dataset", rows())
    return kind(args=arguments(folder, **given), zo=zo, **passed)


def test_epochs(tmp_path: Path):
    """``num_train_epochs`` over a data set whose last batch is short."""
    found = trainer(tmp_path, max_steps=-1, num_train_epochs=2, train_dataset=rows(10))
    out = found.train()
    assert out.global_step == 6
    assert out.training_loss == pytest.approx(np.mean(logged(found)))
    assert found.state.epoch == 2


def test_datasets(tmp_path: Path):
    """A data set of ``datasets``, whose columns that the model does not take are left out."""
    plain, data = Steps(), Steps()
    trainer(tmp_path, callbacks=[plain]).train()
    columns = {name: [row[name] for row in rows()] for name in ("input_ids", "labels")} | {"title": ["a"] * 16}
    trainer(tmp_path, callbacks=[data], train_dataset=Dataset.from_dict(columns)).train()
    assert data.losses == plain.losses


def test_data_collators(tmp_path: Path):
    """A collator of transformers that pads rows of unequal lengths and makes the labels."""
    tokenizer, seen = l2l.load_tokenizer("l2l/tiny"), Steps()
    texts = ["the lamp is in the kitchen .", "the rope is in the old cellar .", "the cup is here .", "a plow ."] * 2
    data = [dict(tokenizer(text)) for text in texts]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trained = model().__class__(model().config)
    trained.resize_token_embeddings(len(tokenizer))
    trainer(tmp_path, model=trained, data_collator=collator, train_dataset=data, callbacks=[seen]).train()
    assert len(set(seen.losses)) == 4


def test_streams(tmp_path: Path):
    """An iterable data set without a length, ended by ``max_steps``."""

    class Stream(torch.utils.data.IterableDataset[dict[str, list[int]]]):
        def __iter__(self) -> Any:
            return iter(rows(12))

    found = trainer(tmp_path, train_dataset=Stream(), max_steps=5)
    assert found.train().global_step == 5
    assert found.zo_optimizer.steps_done == 5


def test_seeds(tmp_path: Path):
    """Two runs of one seed are the same to the last bit; another seed has other directions and another order."""
    runs = [Steps() for _ in range(3)]
    for seed, seen in zip((1, 1, 2), runs, strict=True):
        trainer(tmp_path, seed=seed, callbacks=[seen]).train()
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_schedules(tmp_path: Path):
    """Warm-up and decay by ``lr_scheduler_type``: the rates logged are those of the steps."""
    seen = Steps()
    found = trainer(tmp_path, callbacks=[seen], lr_scheduler_type="linear", warmup_steps=2, max_steps=6)
    found.train()
    assert seen.lr == pytest.approx([0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025])
    assert logged(found, "learning_rate") == seen.lr


def test_plateaus(tmp_path: Path):
    """``reduce_lr_on_plateau`` reads the evaluations."""
    seen = Steps()
    own = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.9}}
    own |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "learning_rate": 1e-6}
    trainer(tmp_path, callbacks=[seen], eval_dataset=rows(4), **own).train()
    assert seen.lr == [1e-6, 1e-6, 5e-7, 2.5e-7]


def test_own_optimizers_and_schedulers(tmp_path: Path):
    """``optimizers=(optimizer, scheduler)``, with an optimizer of l2l."""
    trained, seen = model(), Steps()
    optimizer = l2l.MeZO(trained, lr=1e-2, seed=42)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, 4)
    trainer(tmp_path, model=trained, optimizers=(optimizer, scheduler), callbacks=[seen]).train()
    assert seen.lr == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    other = Steps()
    trainer(tmp_path, callbacks=[other], lr_scheduler_type="linear").train()
    assert seen.losses == other.losses


def test_evaluation(tmp_path: Path):
    """``eval_strategy``, ``evaluate`` and ``predict`` read the weights between steps, and change no step."""
    seen, plain = Steps(), Steps()
    found = trainer(tmp_path, callbacks=[seen], eval_dataset=rows(6), eval_strategy="steps", eval_steps=2)
    found.train()
    trainer(tmp_path, callbacks=[plain]).train()
    assert seen.losses == plain.losses
    assert len(logged(found, "eval_loss")) == 2
    assert found.evaluate()["eval_loss"] == logged(found, "eval_loss")[1]
    assert found.predict(rows(6)).predictions.shape == (6, 6, VOCABULARY)


def test_metrics(tmp_path: Path):
    """``compute_metrics`` on logits that ``preprocess_logits_for_metrics`` has reduced."""

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions[:, :-1] == found.label_ids[:, 1:]).mean())}

    own = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    found = trainer(tmp_path, eval_dataset=rows(6), **own)
    found.train()
    assert 0 <= found.evaluate()["eval_accuracy"] <= 1


def test_callbacks(tmp_path: Path):
    """Events come in the order of any trainer, once per step, and a callback may end the run."""
    events: list[str] = []

    class Listening(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            if name in ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"):
                return lambda *_, **__: events.append(name)
            return super().__getattribute__(name)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append("on_step_end")
            control.should_training_stop = state.global_step == 2

    found = trainer(tmp_path, callbacks=[Listening()], gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert found.train().global_step == 2
    whole = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    assert events == whole * 2


def test_early_stopping(tmp_path: Path):
    """``EarlyStoppingCallback`` ends a run whose evaluations do not get better."""
    own = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    own |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-3}
    stop = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0)
    found = trainer(tmp_path, callbacks=[stop], eval_dataset=rows(4), **own)
    assert found.train().global_step == 3


def test_checkpoints(tmp_path: Path):
    """``save_steps`` and ``save_total_limit``; what is saved loads anywhere."""
    found = trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    found.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"), found.model)
    found.save_model(str(tmp_path / "final"))
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), found.model)


def test_resuming(tmp_path: Path):
    """``train(resume_from_checkpoint=True)`` continues from the last checkpoint, within an epoch, to the same bits."""
    own = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    own |= {"lr_scheduler_type": "cosine", "max_steps": 7}
    whole = trainer(tmp_path, **own)
    whole.train()
    last = weights(whole.model)
    for later in tmp_path.glob("checkpoint-[67]"):
        shutil.rmtree(later)
    rest = trainer(tmp_path, **own)
    assert rest.train(resume_from_checkpoint=True).global_step == 7
    assert same(last, rest.model)


def test_the_best_model(tmp_path: Path):
    """``load_best_model_at_end`` brings back the weights of the best evaluation."""
    own = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    found = trainer(tmp_path, eval_dataset=rows(6), learning_rate=0.5, **own)
    found.train()
    losses = logged(found, "eval_loss")
    best = int(np.argmin(losses))
    assert best < 3  # so large a step makes the last weights worse
    assert Path(found.state.best_model_checkpoint).name == f"checkpoint-{best + 1}"
    assert found.evaluate()["eval_loss"] == losses[best]


def test_model_init(tmp_path: Path):
    """``model_init`` makes a model, and an optimizer, for each run of one trainer."""
    found = trainer(tmp_path, model_init=lambda: model())
    found.train()
    first, optimizer = weights(found.model), found.zo_optimizer
    found.train()
    assert same(first, found.model)
    assert found.zo_optimizer is not optimizer


def test_training_goes_on(tmp_path: Path):
    """A second ``train()`` goes on with model and optimizer as they are, as with any optimizer."""
    seen = Steps()
    found = trainer(tmp_path, callbacks=[seen])
    found.train()
    found.train()
    assert [report.key.step for report in seen.reports] == list(range(8))


def test_own_losses(tmp_path: Path):
    """``compute_loss`` of a subclass, ``compute_loss_func`` and ``label_smoothing_factor``."""

    class Smoothing(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = smoothed(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    def smoothed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
        return functional.cross_entropy(logits, labels[:, 1:].reshape(-1), label_smoothing=0.1)

    seen = [Steps() for _ in range(3)]
    trainer(tmp_path, kind=Smoothing, callbacks=[seen[0]]).train()
    trainer(tmp_path, compute_loss_func=smoothed, callbacks=[seen[1]]).train()
    trainer(tmp_path, label_smoothing_factor=0.1, callbacks=[seen[2]]).train()
    assert seen[0].losses == seen[1].losses
    assert seen[2].losses == pytest.approx(seen[0].losses, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_adapters(tmp_path: Path):
    """A PEFT model: the adapter alone moves and is saved, and a run resumes from it."""

    def adapted() -> Any:
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model(), lora)

    own = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    found = trainer(tmp_path, model=adapted(), **own)
    before = weights(found.model)
    found.train()
    moved = {name for name, tensor in weights(found.model).items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert {path.name for path in (tmp_path / "checkpoint-4").glob("*.safetensors")} == {"adapter_model.safetensors"}
    rest = trainer(tmp_path, model=adapted(), **own)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(found.model, rest.model)


def test_frozen_parameters(tmp_path: Path):
    """What does not require gradients does not move."""
    trained = model()
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_("mlp" in name)
    before = weights(trained)
    trainer(tmp_path, model=trained).train()
    assert {name for name, tensor in weights(trained).items() if not torch.equal(tensor, before[name])} == {
        name for name in before if "mlp" in name
    }


def test_modules_that_are_no_language_models(tmp_path: Path):
    """Any module whose output begins with a loss."""

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.linear(x)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    draw = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    data = [{"x": x, "labels": int(x[0] > 0)} for x in draw]
    found = trainer(tmp_path, model=Classifier(), train_dataset=data, eval_dataset=data, max_steps=60, learning_rate=0.5)
    before = found.evaluate()["eval_loss"]
    found.train()
    assert found.evaluate()["eval_loss"] < 0.8 * before


def test_reports(tmp_path: Path):
    """``report_to="tensorboard"`` gets every log."""
    found = trainer(tmp_path / "out", report_to=["tensorboard"])
    found.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged(found))


def test_samplers(tmp_path: Path):
    """Rows grouped by length, and a loader of one's own by ``get_train_dataloader``."""

    class Backwards(ZOTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset[::-1], batch_size=4, collate_fn=self.data_collator)

    own, ordered = Steps(), Steps()
    trainer(tmp_path, kind=Backwards, callbacks=[own]).train()
    trainer(tmp_path, train_dataset=rows()[::-1], train_sampling_strategy="sequential", callbacks=[ordered]).train()
    assert own.losses == ordered.losses
    assert trainer(tmp_path, train_sampling_strategy="group_by_length").train().global_step == 4


def test_batch_sizes_that_fit(tmp_path: Path):
    """``auto_find_batch_size`` begins again with smaller batches after an allocation has failed."""
    sizes: list[int] = []

    class Full(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, **named)

    before = model()
    found = trainer(tmp_path, kind=Full, auto_find_batch_size=True, max_steps=2)
    assert found.train().global_step == 2
    assert sizes[0] == 4
    assert set(sizes[-4:]) <= {1, 2, 3}
    assert not same(before, found.model)


@pytest.mark.slow
def test_compiling(tmp_path: Path):
    """``torch_compile`` compiles the forward pass once; it reads the weights as they are perturbed."""
    seen, plain = Steps(), Steps()
    trainer(tmp_path, callbacks=[seen], torch_compile=True, torch_compile_backend="eager").train()
    trainer(tmp_path, callbacks=[plain]).train()
    assert seen.losses == pytest.approx(plain.losses, rel=1e-5)
    assert len(set(seen.losses)) == 4


def test_token_counts(tmp_path: Path):
    """``include_num_input_tokens_seen`` counts each row once, however often a step evaluates it."""
    found = trainer(tmp_path, include_num_input_tokens_seen="all")
    found.train()
    assert found.state.num_input_tokens_seen == 4 * 4 * 6


def test_methods_of_l2l(tmp_path: Path):
    """Any method, with its own estimator, directions and arguments, and a tuner's sigma."""
    for zo in (
        ZOArguments(method="adam", method_args={"beta1": 0.8}),
        ZOArguments(method="fzoo", num_directions=3),
        ZOArguments(estimator="one_sided", num_directions=4),
    ):
        found = trainer(tmp_path, zo, learning_rate=1e-4)
        found.train()
        assert found.zo_optimizer.steps_done == 4
    tuned = trainer(tmp_path, ZOArguments(tuner="l2l-tiny"), model=l2l.load_model("l2l/tiny"), learning_rate=1e-4)
    tuned.train()
    assert type(tuned.zo_optimizer.method).__name__ == "Learned"


def test_the_page_lists_a_pattern_for_each_test_of_this_file():
    named = re.findall(r"\| `(test_\w+)` \|", PAGE.read_text())
    assert sorted(named) == sorted(PATTERNS)
    assert len(named) >= 20


PATTERNS = [name for name, value in list(globals().items()) if name.startswith("test_") and "pattern" not in name]
