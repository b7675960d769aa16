"""Wrappers change the names of parameters and nothing else: directions, states and tuners are those of the model itself.

The kind of fault (A11 of the issue): noise was keyed by names that a wrapper changes. Situations from public trackers, in our
words: karpathy/nanoGPT#325 (the prefix of a compiled model in a checkpoint), huggingface/pytorch-image-models#2003 (both
prefixes, in either order), FareedKhan-dev/train-llm-from-scratch#36 (one prefix stripped, the other left).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import TiedLM, same_bits, weights
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import l2l
from l2l.params import Blocks
from l2l.params.blocks import named_parameters
from l2l.tuners.fingerprint import Fingerprint, ties_of


def inserted(part: str) -> Callable[[nn.Module], nn.Module]:
    """A module that holds another under a name, as FSDP does."""

    class Holder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.add_module(part, inner)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, *args: Any) -> Any:
            return self.get_submodule(part)(*args)

    return Holder


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: Any) -> nn.Module:
        model.attention = wrap(model.attention)
        return model

    return wrapped


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model),
    "fsdp": inserted("_fsdp_wrapped_module"),
    "Fabric": inserted("_forward_module"),
    "compiled, then parallel": lambda model: nn.DataParallel(compiled(model)),
    "parallel, then compiled": lambda model: compiled(nn.DataParallel(model)),
    "a compiled part": inside(compiled),
    "a checkpointed part": inside(checkpoint_wrapper),
    "a part of fsdp": inside(inserted("_fsdp_wrapped_module")),
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


@every_wrapper
def test_blocks_ties_and_fingerprint_of_a_wrapped_model_are_those_of_the_model(name: str):
    plain, wrapped = TiedLM(), WRAPPERS[name](TiedLM())
    names = [name for name, _ in plain.named_parameters()]
    assert list(Blocks.of(wrapped).names) == names
    assert Fingerprint.of(wrapped, identity=True) == Fingerprint.of(plain, identity=True)
    assert ties_of(wrapped) == ties_of(plain) == (("embed.weight", "head.weight"),)


@every_wrapper
def test_steps_of_a_wrapped_model_are_those_of_the_model_and_states_load_both_ways(name: str):
    plain, inner = TiedLM(), TiedLM()
    wrapped = WRAPPERS[name](inner)
    one, other = l2l.Momentum(plain, lr=1e-3), l2l.Momentum(wrapped, lr=1e-3)
    for _ in range(3):
        one.step(plain), other.step(wrapped)
    assert same_bits(weights(plain), dict(named(wrapped)))
    fresh, again = l2l.Momentum(plain, lr=0.5, seed=9), l2l.Momentum(wrapped, lr=0.5, seed=9)
    fresh.load_state_dict(other.state_dict())
    again.load_state_dict(one.state_dict())
    for _ in range(2):
        fresh.step(plain), again.step(wrapped)
    assert same_bits(weights(plain), dict(named(wrapped)))


def named(model: nn.Module) -> Any:
    return ((name, parameter.detach().clone()) for name, parameter in named_parameters(model))


@every_wrapper
def test_a_tuner_of_the_model_serves_the_wrapped_one_and_the_other_way_round(name: str):
    plain, wrapped = TiedLM(), WRAPPERS[name](TiedLM())
    for tuner in (l2l.Tuner.for_model(plain), l2l.Tuner.for_model(wrapped)):
        l2l.ZOFineTuner(plain, tuner), l2l.ZOFineTuner(wrapped, tuner)


def test_masters_of_half_precision_load_from_a_wrapped_model():
    plain, wrapped = TiedLM().bfloat16(), nn.DataParallel(TiedLM().bfloat16())
    one, other = (l2l.MeZO(model, lr=1e-3, update="master") for model in (plain, wrapped))
    other.step(wrapped)
    plain.load_state_dict(wrapped.module.state_dict())
    one.load_state_dict(other.state_dict())
    one.step(plain), other.step(wrapped)
    assert same_bits(weights(plain), weights(wrapped.module))


def test_wrapping_a_model_under_an_optimizer_changes_nothing():
    ends = []
    for wrap in (lambda model: model, nn.DataParallel, compiled):
        model = TiedLM()
        optimizer = l2l.MeZO(model, lr=1e-3)
        wrapped = wrap(model)
        for _ in range(3):
            optimizer.step(wrapped)
        ends.append(weights(model))
    assert same_bits(ends[0], ends[1]) and same_bits(ends[0], ends[2])


def test_a_part_of_the_model_that_is_called_module_keeps_its_name():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(()))

    assert Blocks.of(Own()).names[0] == "module.weight"
    assert Blocks.of(Scaled()).names == ("scale", "module.weight", "module.bias")


def test_names_and_order_of_a_model_without_wrappers_are_torchs():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    for model in (TiedLM(), BertForMaskedLM(BertConfig(**sizes))):
        for unique in (True, False):
            own, torchs = named_parameters(model, unique), model.named_parameters(remove_duplicate=unique)
            assert [(name, id(p)) for name, p in own] == [(name, id(p)) for name, p in torchs]
