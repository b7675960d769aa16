"""ZOTrainer: the losses and bits of ``l2l.fine_tune``, resuming, what a step is, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from trainers import Steps, arguments, logged, model, rows, same, weights
from transformers import HfArgumentParser, Trainer, TrainingArguments

import l2l
from l2l import integrations
from l2l.integrations import ZOArguments, ZOTrainer
from l2l.integrations import trainer as subject
from l2l.tasks import batch_loss
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import batch_indices
from l2l.train.runlog import NAME, read_log
from l2l.train.trainer import prepare_fine_tuning

pytestmark = pytest.mark.in_turn

SIZES: dict[str, Any] = {"task": "world_topic", "batch_size": 4, "train_size": 24, "dev_size": 4, "test_size": 4}
STEPS = 8
SAME: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 1e-3, "seed": 3, "train_sampling_strategy": "sequential"}


class StepNumbers(torch.utils.data.Dataset[dict[str, int]]):
    """What a step reads is decided by its number, as in ``l2l.fine_tune``."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> dict[str, int]:
        return {"step": step}


class TaskTrainer(ZOTrainer):
    """Computes the loss of a task as ``l2l.fine_tune`` does."""

    batcher: Any

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        return batch_loss(model, self.batcher.at(int(inputs["step"])), self.batcher.form)


@pytest.mark.parametrize("perturb", ["in_place", "functional"])
def test_losses_and_weights_are_those_of_fine_tune_to_the_last_bit(tmp_path: Path, perturb: Any):
    options = {**SIZES, "method": "mezo", "lr": 1e-3, "epsilon": 1e-3, "seed": 3, "steps": STEPS, "perturb": perturb}
    l2l.fine_tune("l2l/tiny", out=str(tmp_path / "run"), save="log", progress=False, **options)
    context, seen = prepare_fine_tuning(FineTuneConfig(**options)), Steps()
    args = arguments(tmp_path / "trainer", **SAME, per_device_train_batch_size=1, remove_unused_columns=False)
    zo = ZOArguments(method="mezo", epsilon=1e-3, perturb=perturb)
    trainer = TaskTrainer(model=context.model, args=args, zo=zo, train_dataset=StepNumbers(), callbacks=[seen])
    trainer.batcher = context.closures.batcher
    trainer.train()
    steps = read_log(tmp_path / "run" / NAME).steps
    assert [report.evaluations for report in seen.reports] == [step.losses for step in steps]
    assert len(set(seen.losses)) == STEPS
    assert logged(trainer) == [torch.tensor(loss).item() for loss in seen.losses]
    assert same(l2l.load_model("l2l/tiny", log=tmp_path / "run", to="last"), context.model)


OBJECTIVE = '''
def own_loss(model, tokenizer, rows):
    """The loss that the model itself computes of the texts, as a transformers Trainer asks for it."""
    ids = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    count = labels[:, 1:].ne(-100).sum()
    batch = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels}
    return model(**batch, num_items_in_batch=count).loss.item()
'''


def test_the_models_own_loss_gives_the_bits_of_fine_tune_with_that_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_objective.py").write_text(OBJECTIVE)
    monkeypatch.syspath_prepend(tmp_path)
    options = {**SIZES, "method": "mezo", "lr": 1e-3, "epsilon": 1e-3, "seed": 3, "steps": STEPS}
    objective = "own_objective:own_loss"
    l2l.fine_tune("l2l/tiny", out=str(tmp_path / "run"), save="log", progress=False, objective=objective, **options)
    context, seen = prepare_fine_tuning(FineTuneConfig(**options)), Steps()
    train, tokenizer = context.splits.train, context.tokenizer
    order = [i for step in range(STEPS) for i in batch_indices(len(train), 4, 3, step)]

    def collate(texts: list[Any]) -> dict[str, torch.Tensor]:
        found = tokenizer([row["text"] for row in texts], return_tensors="pt", padding=True)
        labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": labels}

    args = arguments(tmp_path / "trainer", **SAME, remove_unused_columns=False)
    data: Any = [dict(train[i]) for i in order]
    own = {"data_collator": collate, "train_dataset": data, "callbacks": [seen]}
    ZOTrainer(model=context.model, args=args, zo=ZOArguments(epsilon=1e-3), **own).train()
    steps = read_log(tmp_path / "run" / NAME).steps
    assert [report.evaluations for report in seen.reports] == [step.losses for step in steps]


@pytest.mark.parametrize(
    ("dtype", "zo"),
    [
        ("float32", {"method": "mezo"}),
        ("float32", {"method": "hizoo"}),
        ("float32", {"lr": "auto"}),
        ("bfloat16", {"update": "master"}),
        ("bfloat16", {"update": "stochastic"}),
    ],
    ids=str,
)
def test_a_run_resumes_from_a_checkpoint_to_the_same_bits(tmp_path: Path, dtype: str, zo: dict[str, Any]):
    own: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "lr_scheduler_type": "linear"}
    own["learning_rate"] = 1e-3

    def trainer(seen: Steps) -> ZOTrainer:
        trained = model().to(getattr(torch, dtype))
        args = arguments(tmp_path / "out", **own)
        return ZOTrainer(model=trained, args=args, zo=ZOArguments(**zo), train_dataset=rows(), callbacks=[seen])

    whole = trainer(all_steps := Steps())
    whole.train()
    rest = trainer(last_steps := Steps())
    rest.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert last_steps.losses == all_steps.losses[3:]
    assert last_steps.lr == all_steps.lr[3:]
    assert same(whole.model, rest.model)
    assert rest.zo_optimizer.steps_done == 6


def test_accumulated_batches_are_the_micro_batches_of_one_evaluation(tmp_path: Path):
    found = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        seen, trained = Steps(), model()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        args = arguments(tmp_path, train_sampling_strategy="sequential", **sizes)
        ZOTrainer(model=trained, args=args, zo=ZOArguments(), train_dataset=rows(), callbacks=[seen]).train()
        assert [report.passes for report in seen.reports] == [2] * 4
        found.append(seen.losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


class Regression(torch.nn.Module):
    """A model whose forward takes no further keywords: its loss is a mean over the batch, whatever is accumulated."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5, -1.0]))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x @ self.weight
        return functional.mse_loss(y, labels), y


def points(count: int = 16) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    return [{"x": (x := draw.normal(size=2).astype("float32")), "labels": np.float32(x @ (2, 3))} for _ in range(count)]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_step_is_that_of_the_optimizer_alone_on_the_same_batches(tmp_path: Path, accumulated: int):
    """17 rows in batches of 2: the epoch's last batch has one row, and its last accumulation may be short."""
    data, seen, trained, alone = points(17), Steps(), Regression(), Regression()
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulated}
    args = arguments(tmp_path, **sizes, max_steps=-1, num_train_epochs=2, train_sampling_strategy="sequential", seed=9)
    ZOTrainer(model=trained, args=args, zo=ZOArguments(), train_dataset=data, callbacks=[seen]).train()

    x, y = (torch.tensor(np.stack([row[name] for row in data])) for name in ("x", "labels"))
    optimizer, losses = l2l.MeZO(alone, lr=1e-2, seed=9), []
    batches = list(zip(x.split(2), y.split(2), strict=True))
    groups = [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)]
    for group in [*groups, *groups]:
        losses.append(optimizer.step(lambda group=group: sum(alone(a, b)[0] / len(group) for a, b in group)))
    assert seen.losses == losses
    assert torch.equal(trained.weight, alone.weight)


def test_batches_of_an_accumulation_that_an_epoch_cut_short_are_dropped(tmp_path: Path):
    """A stream of five batches where six were promised: the last two wait for a third, and the next epoch begins anew."""

    class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            return iter(points(5))

    counted: list[int] = []

    class Counting(ZOTrainer):
        def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
            loss = super().training_step(*given, **named)
            counted.append(len(self._pieces))
            return loss

    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 2}
    Counting(model=Regression(), args=arguments(tmp_path, **sizes), train_dataset=Stream()).train()
    assert counted[:5] == [1, 2, 0, 1, 2]
    assert counted[5:] in ([], [1, 2, 0])


def test_dropout_is_off_and_the_model_still_says_that_it_trains(tmp_path: Path):
    flags: list[tuple[bool, bool]] = []

    class Watching(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
            flags.append((self.model.training, self.model.model.training))
            return super().compute_loss(model, inputs, **named)

    losses = []
    for dropout in (0.0, 0.5):
        seen = Steps()
        trained = model(attention_dropout=dropout)
        Watching(model=trained, args=arguments(tmp_path), train_dataset=rows(), callbacks=[seen]).train()
        losses.append(seen.losses)
    assert losses[0] == losses[1]
    assert set(flags) == {(True, False)}


@pytest.mark.parametrize(
    ("flag", "dtype", "device"),
    [("bf16", torch.bfloat16, "cpu"), pytest.param("fp16", torch.float16, "cuda", marks=pytest.mark.gpu)],
)
def test_flags_of_half_precision_compute_in_it_and_write_no_weight_within_a_step(
    tmp_path: Path, flag: str, dtype: torch.dtype, device: str
):
    seen: set[tuple[int, ...]] = set()
    dtypes: set[torch.dtype] = set()

    class Watching(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
            handle = self.model.model.layers[0].mlp.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
            found = super().compute_loss(model, inputs, **named)
            handle.remove()
            seen.add(tuple(parameter._version for parameter in self.model.parameters()))
            return found

    before, steps = weights(trained := model()), Steps()
    args = arguments(tmp_path, max_steps=1, use_cpu=device == "cpu", **{flag: True})
    trainer = Watching(model=trained, args=args, train_dataset=rows(), callbacks=[steps])
    trainer.train()
    assert trainer.zo_optimizer.theta.mode == "functional"
    assert dtypes == {dtype}
    assert len(seen) == 1  # each write would have counted the versions up
    assert steps.reports[0].projected_gradient != 0
    assert not same(before, trained.cpu())
    assert {tensor.dtype for tensor in trained.parameters()} == {torch.float32}


def test_a_disabled_scaler_takes_the_place_of_the_one_of_fp16(tmp_path: Path):
    """accelerate makes one on a GPU; it would look for gradients."""
    trainer = ZOTrainer(
        model=model(), args=arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), train_dataset=rows()
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    seen = Steps()
    trainer.add_callback(seen)
    trainer.train()
    assert len(set(seen.losses)) == 2
    again = ZOTrainer(model=model(), args=trainer.args, train_dataset=rows())
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(trainer.model, again.model)


def test_a_bad_loss_follows_the_policy(tmp_path: Path):
    class Bad(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
            return super().compute_loss(model, inputs, **named) * (torch.nan if self.state.global_step == 1 else 1.0)

    before = weights(trained := model())
    with pytest.raises(FloatingPointError):
        Bad(model=trained, args=arguments(tmp_path, max_steps=3), train_dataset=rows()).train()
    assert not same(before, trained)
    seen = Steps()
    skipping = Bad(model=model(), args=arguments(tmp_path), zo=ZOArguments(on_bad_loss="skip"), train_dataset=rows())
    skipping.add_callback(seen)
    skipping.train()
    assert [bool(report.dropped) for report in seen.reports] == [False, True, False, False]


# What is refused, ignored and passed on.


def test_a_plain_trainer_with_an_optimizer_of_l2l_is_told_of_the_mixin(tmp_path: Path):
    trained = model()
    trainer = Trainer(model=trained, args=arguments(tmp_path), train_dataset=rows(), optimizers=(l2l.MeZO(trained), None))
    with pytest.raises(TypeError, match=r"l2l.integrations.ZOTrainer, or ZOTrainerMixin before the trainer's class"):
        trainer.train()


SETTINGS: dict[str, Any] = {
    "optim": "sgd",
    "optim_args": "a=1",
    "optim_target_modules": "all-linear",
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "neftune_noise_alpha": 5.0,
}
"""A value of each field of REFUSED that a machine without its package can set."""


@pytest.mark.parametrize("name", subject.REFUSED)
def test_training_arguments_of_backpropagation_are_refused_by_name(tmp_path: Path, name: str):
    args = arguments(tmp_path, **({name: SETTINGS[name]} if name in SETTINGS else {}))
    if name not in SETTINGS:  # deepspeed, fsdp and parallelism_config need their packages, or several processes
        setattr(args, name, {"set": True})
    with pytest.raises(ValueError, match=rf"^TrainingArguments\({name}=.* leave it out"):
        ZOTrainer(model=model(), args=args, train_dataset=rows())
    assert name in {field.name for field in fields(TrainingArguments)}


def test_values_that_switch_off_and_defaults_are_not_refused(tmp_path: Path):
    off = {"max_grad_norm": 0.0, "neftune_noise_alpha": None, "optim_args": None, "fsdp": ""}
    ZOTrainer(model=model(), args=arguments(tmp_path, **off), train_dataset=rows())
    ZOTrainer(model=model(), args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), train_dataset=rows())


def test_what_has_nothing_to_do_without_a_backward_pass_is_ignored_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in vars(arguments(tmp_path)))
    given = {name: True, "torch_empty_cache_steps": 4}
    seen, plain = Steps(), Steps()
    trainer = ZOTrainer(model=model(), args=arguments(tmp_path, **given), train_dataset=rows(), callbacks=[seen])
    assert [record.message for record in caplog.records if record.name.startswith("l2l")] == [
        "ignored, as there is no backward pass: " + ", ".join(sorted({*given, "gradient_checkpointing"}))
    ]
    trainer.train()
    ZOTrainer(model=model(), args=arguments(tmp_path), train_dataset=rows(), callbacks=[plain]).train()
    assert seen.losses == plain.losses


def test_several_devices_in_one_process_are_refused(tmp_path: Path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="set CUDA_VISIBLE_DEVICES to one of them"):
        ZOTrainer(model=model(), args=args, train_dataset=rows())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zo": ZOArguments(method="adamw")}, "goes backward: use transformers' own Trainer"),
        ({"zo": ZOArguments(method="learned")}, "needs a tuner"),
        ({"zo": ZOArguments(method_args={"rank": 2})}, "has no argument 'rank'"),
    ],
    ids=str,
)
def test_a_method_that_cannot_step_is_refused_before_the_first_step(tmp_path: Path, given: Any, message: str):
    trainer = ZOTrainer(model=model(), args=arguments(tmp_path), train_dataset=rows(), **given)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_compiling_needs_weights_that_are_perturbed_in_place(tmp_path: Path):
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer = ZOTrainer(model=model(), args=args, zo=ZOArguments(perturb="functional"), train_dataset=rows())
    with pytest.raises(ValueError, match="Leave torch_compile out"):
        trainer.train()


def test_optimizers_of_another_kind_are_refused_by_name(tmp_path: Path):
    trained = model()
    own = {"model": trained, "args": arguments(tmp_path), "train_dataset": rows()}
    with pytest.raises(TypeError, match="optimizers holds SGD, which needs gradients"):
        ZOTrainer(**own, optimizers=(torch.optim.SGD(trained.parameters()), None))
    with pytest.raises(ValueError, match="both optimizers and zo"):
        ZOTrainer(**own, optimizers=(l2l.MeZO(trained), None), zo=ZOArguments())
    with pytest.raises(TypeError, match="optimizer_cls_and_kwargs makes a first-order optimizer"):
        ZOTrainer(**own, optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    with pytest.raises(RuntimeError, match="there is no optimizer yet"):
        _ = ZOTrainer(**own).zo_optimizer


def test_a_loop_that_steps_without_a_training_step_is_told_so():
    optimizer = subject.SteppedOptimizer(l2l.MeZO(trained := Regression()))
    x, y = torch.ones(1, 2), torch.ones(1)
    with pytest.raises(TypeError, match="given no closure"):
        optimizer.step()
    optimizer.step(lambda: trained(x, y)[0])
    assert optimizer.step() is None
    with pytest.raises(TypeError, match="given no closure"):
        optimizer.step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"lr": "fast"}, "lr='fast' must be 'auto' or left out"),
        ({"step_fraction": 0.1}, "means nothing without lr='auto'"),
        ({"method_args": "{"}, "is no JSON"),
        ({"method": "mzo"}, "mzo"),
        ({"match": "near"}, "near"),
        ({"on_bad_loss": "pray"}, "pray"),
        ({"num_directions": 0}, "num_directions=0"),
        ({"curvature_every": 0}, "curvature_every=0"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_where_they_are_made(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ZOArguments(**given)


def test_zo_arguments_are_a_command_line_with_help(capsys: pytest.CaptureFixture[str]):
    parser = HfArgumentParser((TrainingArguments, ZOArguments))  # pyright: ignore[reportArgumentType]
    line = [
        "--output_dir",
        "out",
        "--method",
        "fzoo",
        "--epsilon",
        "1e-2",
        "--lr",
        "auto",
        "--method_args",
        '{"num_directions": 4}',
    ]
    args, zo = parser.parse_args_into_dataclasses(line)
    assert (args.output_dir, zo.method, zo.epsilon, zo.lr, zo.method_args) == (
        "out",
        "fzoo",
        1e-2,
        "auto",
        {"num_directions": 4},
    )
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(ZOArguments):
        assert f"--{field.name}" in text
        assert len(field.metadata["help"]) > 30


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(integrations, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ZOTrainer needs accelerate, .* pip install 'l2l\[trainer\]'"):
        _ = integrations.ZOTrainer
    with pytest.raises(ImportError, match=r"ZOSFTTrainer needs trl, .* pip install 'l2l\[trl\]'"):
        _ = integrations.ZOSFTTrainer
    with pytest.raises(AttributeError, match="ZOTrayner"):
        _ = integrations.ZOTrayner
    assert set(integrations.__all__) < set(dir(integrations))


def test_only_a_step_and_the_making_of_its_optimizer_are_replaced():
    own = {name for name, value in vars(subject.ZOTrainerMixin).items() if callable(value) and hasattr(Trainer, name)}
    assert own - {"__init__"} == {"training_step", "create_optimizer"}
    assert {name for name in vars(ZOTrainer) if not name.startswith("__")} <= {"_abc_impl"}


def test_the_page_lists_what_is_refused_and_what_is_ignored():
    page = (Path(__file__).parent.parent.parent / "docs/trainer.md").read_text()
    for name, words in (subject.REFUSED | subject.IGNORED).items():
        assert f"| `{name}` | {words} |" in page


def test_the_ways_out_of_what_is_refused_lead_out(tmp_path: Path):
    """What a message advises trains: an argument left out, and the one of ``ZOArguments`` that stands for it."""
    trained, data = Regression(), points()

    def train(zo: ZOArguments | None = None, **options: Any) -> None:
        ZOTrainer(model=trained, args=arguments(tmp_path, max_steps=1, **options), zo=zo, train_dataset=data).train()

    train()  # every argument left out
    train(ZOArguments(method="lozo"))
    train(ZOArguments(method_args={"num_directions": 2}))
    train(ZOArguments(method="adam", method_args={"beta1": 0.8, "beta2": 0.9, "eps": 1e-6}))
    train(ZOArguments(on_bad_loss="clip"))
    train(ZOArguments(lr="auto", step_fraction=0.1))
    train(ZOArguments(perturb="in_place"), bf16=True)
    own: dict[str, Any] = {"model": trained, "args": arguments(tmp_path, max_steps=1), "train_dataset": data}
    ZOTrainer(**own, optimizers=(l2l.MeZO(trained, lr=1e-3), None)).train()
    made = ZOTrainer(**own)
    made.create_optimizer()
    assert made.zo_optimizer.steps_done == 0
    Trainer(**own).train()  # which a method that goes backward is for
