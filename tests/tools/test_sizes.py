"""What is read off a model's modules, and what follows from it for memory."""

from __future__ import annotations

import pytest
import torch

from l2l.costs import (
    Load,
    ModelShape,
    Plan,
    activation_bytes,
    choose_perturb_mode,
    choose_update,
    config_of,
    inference_bytes,
    memory_parts,
    meta_model,
    model_shape,
    transient_bytes,
)
from l2l.models.shapes import shape_config, tiny_random
from l2l.params import Blocks

SHAPE = ModelShape(
    parameters=1000,
    blocks=(600, 300, 100),
    whole=(600, 300, 100),
    matrices=400,
    layers=2,
    heads=2,
    width=8,
    expanded=32,
    gates=1,
    vocabulary=75,
    modules=9,
)
LOAD = Load(rows=4, length=16, read=4)


def test_the_sizes_of_a_shape_are_those_of_its_modules():
    shape = model_shape(meta_model(shape_config("opt-125m-shape")))
    assert shape.parameters == shape.trained == 125_239_296
    assert (shape.layers, shape.heads, shape.width, shape.expanded, shape.gates) == (12, 12, 768, 3072, 1)
    assert shape.matrices == 12 * 12 * 768**2
    assert shape.head == 50272 * 768
    # Tied to the head, the token embedding is read whole; positions are only looked up.
    assert sorted(shape.whole)[-2:] == [4 * 768**2, 50272 * 768]


@pytest.mark.parametrize(("family", "gates", "tied"), [("llama", 2, False), ("gpt2", 1, True), ("opt", 1, True)])
def test_other_architectures_are_read_off_as_well(family: str, gates: int, tied: bool):
    model = tiny_random(family)
    shape = model_shape(model)
    assert (shape.layers, shape.width, shape.heads, shape.gates) == (2, 32, 4, gates)
    assert shape.expanded >= 64
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.head in shape.whole) is True
    assert shape.parameters - shape.matrices >= (1 if tied else 2) * shape.head


def test_only_what_is_trained_is_counted_as_moving():
    model = tiny_random("opt")
    some = Blocks(list(Blocks.of(model))[:3])
    shape = model_shape(model, some)
    assert shape.trained == some.numel < shape.parameters


def test_the_embedded_model_is_named_as_everywhere_and_no_weight_is_read():
    model = meta_model(config_of("l2l/tiny"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("opt-9b-shape", ValueError, "unknown shape 'opt-9b-shape'; use one of"),
        ("no/such-model", FileNotFoundError, "no config of 'no/such-model'"),
    ],
)
def test_a_model_that_is_not_there_is_named_in_one_line(name: str, error: type[Exception], words: str):
    with pytest.raises(error, match=words) as caught:
        config_of(name)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        config_of(str(tmp_path))


def test_in_place_in_float32_a_step_needs_no_more_than_a_forward_pass():
    parts = memory_parts(SHAPE, LOAD, Plan(torch.float32, "in_place", "direct"))
    assert parts["weights"] == 4000
    assert sum(parts.values()) == inference_bytes(parts)


def test_functional_perturbing_adds_two_blocks_and_the_master_if_chosen():
    stochastic = memory_parts(SHAPE, LOAD, Plan(torch.bfloat16, "functional", "stochastic"))
    master = memory_parts(SHAPE, LOAD, Plan(torch.bfloat16, "functional", "master"))
    assert stochastic["weights"] == 2000
    assert stochastic["perturb"] == 2 * (600 + 300)
    assert stochastic["master"] == 0
    assert sum(master.values()) - sum(stochastic.values()) == master["master"] == 4000


def test_a_method_adds_its_state_and_what_a_step_holds_for_it():
    plan = Plan(torch.float32, "in_place", "direct", state=428, scratch=10**6)
    parts = memory_parts(SHAPE, LOAD, plan)
    assert (parts["method"], parts["scratch"]) == (428, 10**6)
    assert transient_bytes(parts) == 10**6 + parts["batch"] + parts["activations"]


def test_activations_are_those_of_the_widest_place():
    mlp = 64 * (16 + 64) * 4 + 64 * 16 * 4
    assert activation_bytes(SHAPE, LOAD, torch.float32) == mlp
    every_token = Load(4, 16, 64)
    logits = 64 * 16 * 4 + 64 * 75 * 8 + 64 * 16 * 4
    assert activation_bytes(SHAPE, every_token, torch.float32) == logits > mlp
    half = 64 * 16 * 2 + 64 * 75 * 10 + 64 * 16 * 2
    assert activation_bytes(SHAPE, every_token, torch.bfloat16) == half


def test_choices_left_open_follow_dtype_and_room():
    assert choose_perturb_mode(torch.float32, "auto") == "in_place"
    assert choose_perturb_mode(torch.bfloat16, "auto") == choose_perturb_mode(torch.float32, "functional") == "functional"
    assert choose_update(torch.float32, "auto", 0, 10) == "direct"
    assert choose_update(torch.bfloat16, "auto", 20, 10) == "master"
    assert choose_update(torch.bfloat16, "auto", 19, 10) == "stochastic"
    assert choose_update(torch.bfloat16, "master", 0, 10) == "master"
    assert choose_update(torch.float16, "auto", 0, 10) == "master"


def test_choices_that_do_not_fit_the_dtype_are_refused():
    with pytest.raises(ValueError, match="in_place' needs float32"):
        choose_perturb_mode(torch.bfloat16, "in_place")
    with pytest.raises(ValueError, match="use update='master' or dtype bf16"):
        choose_update(torch.float16, "stochastic", 0, 0)
