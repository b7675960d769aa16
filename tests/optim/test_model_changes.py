"""A step that would not see its model, or would move the wrong tensors, is refused; one that sees nothing is warned of.

The kind of fault (A3 of the issue): the optimizer's view of the model was taken once. Each change below is made to a model
under an optimizer: the next step is refused, in place of drifting or moving frozen and forgotten tensors, and the way out that
the refusal names, ``rebind``, goes on. Situations from public trackers, in our words: huggingface/transformers#3532 (embeddings
resized after the optimizer was made), pytorch/pytorch#188346 (``load_state_dict(assign=True)`` unties weights),
huggingface/transformers#4450 (a model moved to its device after the optimizer was made), mohammadbashiri/fitgabor#1 (a closure
that returns a loss computed before), ZO-Bench/ZO-LLM#13 (a loss that no longer changes).
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, same_bits, weights
from torch import Tensor, nn

import l2l
from l2l.methods.sgd import SGD
from l2l.optim import FLAT_STEPS, ZOOptimizer


def copied(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone())


def freeze(model: Any) -> None:
    model.attention.out.weight.requires_grad_(False)


def untie(model: Any) -> None:
    model.head.weight = copied(model.head.weight)


def untie_memory(model: Any) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.detach())  # tied by memory alone


def resize(model: Any) -> None:
    model.embed.weight.data = torch.zeros(30, 8)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "freezing": (freeze, "requires_grad of 'attention.out.weight' was True and is False"),
    "casting": (lambda model: model.bfloat16(), "dtype of 'embed.weight' was torch.float32 and is torch.bfloat16"),
    "widening": (lambda model: model.double(), "dtype of 'embed.weight' was torch.float32 and is torch.float64"),
    "assigning a state": (lambda m: m.load_state_dict(TiedLM().state_dict(), assign=True), "'embed.weight' has been replaced"),
    "replacing a module": (lambda model: setattr(model, "norm", nn.LayerNorm(8)), "'norm' has been replaced"),
    "untying": (untie, "'head.weight' has been replaced"),
    "parametrizing": (
        lambda m: nn.utils.parametrizations.weight_norm(m.attention.out),
        "'attention.out.weight' has been removed",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_has_changed_is_refused_and_rebinding_goes_on(name: str):
    change, message = CHANGES[name]
    model = TiedLM()
    optimizer = l2l.MeZO(model, lr=1e-2, seed=4)
    optimizer.step(model)
    change(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match=rf"the model is not as it was .*: {message}.*Call optimizer.rebind\(model\)"):
        optimizer.step(lambda: pytest.fail("evaluated"))
    assert same_bits(before, weights(model))
    optimizer.rebind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step(lambda: model().float())
    assert (optimizer.seed, optimizer.steps_done) == (4, 4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(value, before[name]) != (name in trained) for name, value in weights(model).items())


def test_a_refused_model_is_taken_by_a_new_optimizer_as_well():
    model = TiedLM()
    optimizer = l2l.MeZO(model)
    freeze(model)
    with pytest.raises(RuntimeError, match="or make a new optimizer"):
        optimizer.step(model)
    assert "attention.out.weight" not in l2l.MeZO(model).blocks.names


def test_a_shape_a_device_and_ties_of_memory_are_seen():
    model = TiedLM()
    optimizer = l2l.MeZO(model)
    resize(model)
    with pytest.raises(RuntimeError, match=r"shape of 'embed.weight' was .*24, 8.* and is .*30, 8"):
        optimizer.step(model)
    model = nn.Linear(4, 4)
    optimizer = l2l.MeZO(model)
    model.to("meta")
    with pytest.raises(RuntimeError, match=r"'weight' has been replaced|device of 'weight' was cpu and is meta"):
        optimizer.step(lambda: 0.0)
    model = TiedLM()
    untie_memory(model)
    optimizer = l2l.MeZO(model)
    assert "head.weight" not in optimizer.blocks.names
    model.head.weight.data = model.head.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"'head.weight' and 'embed.weight' no longer share one tensor"):
        optimizer.step(model)
    optimizer.rebind(model)
    assert "head.weight" in optimizer.blocks.names
    model.head.weight.data = model.embed.weight.data
    with pytest.raises(RuntimeError, match=r"'head.weight' and 'embed.weight' now share one tensor"):
        optimizer.step(model)


@pytest.mark.parametrize("options", [{}, {"perturb": "functional"}, {"sparse_embeddings": True}], ids=str)
def test_other_memory_and_other_values_are_followed(options: dict[str, Any]):
    """``p.data = ...`` and ``load_state_dict`` change values, which is no change of the model."""
    ends = []
    for moved in (False, True):
        model = TiedLM()
        untie(model)
        if "sparse_embeddings" in options:
            model.head.weight.requires_grad_(False)
        optimizer = l2l.MeZO(model, lr=0.1, **options)
        for _ in range(3):
            optimizer.step(model)
            if moved:
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
        optimizer.theta.assign({block.name: 0.5 * block.tensor.detach() for block in optimizer.blocks})
        optimizer.step(model)
        ends.append(weights(model))
    assert same_bits(*ends)


def test_rebinding_keeps_the_state_of_the_same_blocks_in_the_precision_that_they_have_now():
    model = TiedLM()
    optimizer = l2l.Momentum(model, lr=1e-3)
    optimizer.step(model)
    kept = copy.deepcopy(optimizer.method_state).buffer
    model.double()
    optimizer.rebind(model)
    taken = optimizer.method_state.buffer
    assert all(b.dtype == torch.float64 and torch.equal(a.double(), b) for a, b in zip(kept, taken, strict=True))
    optimizer.step(model)
    freeze(model)
    optimizer.rebind(model)
    assert len(optimizer.method_state.buffer) == len(optimizer.blocks) == len(kept) - 1
    optimizer.step(model)


def test_rebinding_to_a_model_that_a_group_has_no_block_of_changes_nothing():
    model = TiedLM()
    optimizer = ZOOptimizer(model, l2l.MeZO(model).method, groups=[{"match": "norm", "lr": 0.5}])
    model.norm.requires_grad_(False)
    with pytest.raises(ValueError, match="match='norm' takes no block"):
        optimizer.rebind(model)
    model.norm.requires_grad_(True)
    optimizer.step(model)


def test_a_schedule_goes_on_after_rebinding():
    model = TiedLM()
    optimizer = l2l.MeZO(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step(model)
    scheduler.step()
    optimizer.rebind(copy.deepcopy(model).double())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 / 4


# Adapters and embeddings of the libraries themselves.


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def loss_of(model: Any) -> Callable[[], Tensor]:
    rows = torch.arange(24).reshape(2, 12)
    return lambda: model(input_ids=rows, labels=rows).loss


def with_adapters() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    model.add_adapter("second", config)
    model.set_adapter("default")
    return model


def delete_default(model: Any) -> None:
    model.set_adapter("second")
    model.delete_adapter("default")


of_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@of_peft
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.set_adapter("second"), "requires_grad of .*lora_A.default.weight' was True and is False"),
        (lambda model: model.merge_and_unload(), "has been (replaced|removed)"),
        (lambda model: delete_default(model), "has been removed"),
    ],
    ids=["set_adapter", "merge_and_unload", "delete_adapter"],
)
def test_an_adapter_that_is_not_what_runs_is_refused(change: Callable[[Any], Any], message: str):
    model = with_adapters()
    optimizer = l2l.MeZO(model, lr=1e-2)
    optimizer.step(loss_of(model))
    found = change(model)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(loss_of(model))
    if found is not None:  # merged: the weights below are trained
        model = found.requires_grad_(True)
    optimizer.rebind(model)
    before = weights(model)
    optimizer.step(loss_of(model))
    assert not same_bits(before, weights(model))
    assert optimizer.report is not None and optimizer.report.projected_gradient


def test_embeddings_that_were_resized_are_refused_and_then_trained():
    model = llama()
    optimizer = l2l.MeZO(model, lr=1e-2)
    optimizer.step(loss_of(model))
    model.resize_token_embeddings(48)
    with pytest.raises(RuntimeError, match="'lm_head' has been replaced"):
        optimizer.step(loss_of(model))
    optimizer.rebind(model)
    optimizer.step(loss_of(model))
    assert optimizer.blocks[0].tensor.shape == (48, 16)


# Steps that see nothing.


def flat(optimizer: ZOOptimizer, closure: Callable[[], Any], **more: Any) -> None:
    """The warning comes with step FLAT_STEPS, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(FLAT_STEPS - 1):
            optimizer.step(closure, **more)
        with pytest.warns(UserWarning, match=f"for {FLAT_STEPS} steps in a row.*of the model that the optimizer"):
            optimizer.step(closure, **more)
        for _ in range(FLAT_STEPS):
            optimizer.step(closure, **more)


def test_a_closure_over_another_model_is_warned_of():
    flat(l2l.MeZO(TiedLM()), TiedLM())


def test_a_loss_computed_before_the_step_is_warned_of():
    model = TiedLM()
    loss = model()
    flat(l2l.MeZO(model), lambda: loss.detach())


def test_an_epsilon_lost_to_rounding_is_warned_of():
    model = TiedLM()
    flat(l2l.MeZO(model, epsilon=1e-13), model)


def test_a_loss_that_a_large_step_made_constant_is_warned_of():
    model = Quadratic()
    optimizer = l2l.MeZO(model, lr=1e3)
    optimizer.step(lambda: torch.tanh(100 + model() * 0))
    flat(l2l.MeZO(model), lambda: torch.tanh(100 + model()))


@of_peft
def test_a_merged_adapter_is_warned_of():
    model = with_adapters()
    model.merge_adapter()
    flat(l2l.MeZO(model), loss_of(model))


@pytest.mark.parametrize("name", ["DiZO", "FZOO", "HiZOO"])
def test_other_estimators_warn_as_well(name: str):
    flat(getattr(l2l, name)(TiedLM()), TiedLM())


def test_a_baseline_whose_loss_reaches_no_block_is_warned_of():
    flat(ZOOptimizer(TiedLM(), SGD(), lr=0.1), TiedLM())


def test_steps_that_see_something_between_start_the_count_again_and_so_does_the_warning():
    model, constant = TiedLM(), TiedLM()
    optimizer = l2l.MeZO(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for _ in range(FLAT_STEPS - 1):
                optimizer.step(constant)
            optimizer.step(model)
    for _ in range(2):
        with pytest.warns(UserWarning, match="in a row"):
            for _ in range(FLAT_STEPS):
                optimizer.step(constant)
        optimizer.step(model)
