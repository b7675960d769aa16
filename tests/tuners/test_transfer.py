"""Which model a tuner fits: six answers, the mapping of blocks, and what each level of ``--match`` allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from l2l.params import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics
from l2l.tuners.fingerprint import Fingerprint, ties_of, weights_hash
from l2l.tuners.normalize import CurvatureNormalizer
from l2l.tuners.schedule import BlockSchedule
from l2l.tuners.transfer import classify, identified


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)


class Model(nn.Module):
    """Embedding, layers, a head that is tied to the embedding or not."""

    def __init__(self, width: int = 4, layers: int = 2, tied: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 11, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if tied:
            self.head.weight = self.embed.weight


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base = inner


class Adapted(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.base_layer = inner
        self.lora = nn.ModuleDict({"default": nn.Linear(inner.in_features, 2, bias=False)})


def adapted(freeze: str) -> nn.Module:
    model = Model()
    for layer in model.layers:
        layer.q = Adapted(layer.get_submodule("q"))  # pyright: ignore[reportArgumentType]
    wrapped = Wrapped(model)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(("lora" in name) != (freeze == "adapters"))
    return wrapped


def fingerprint(model: nn.Module) -> Fingerprint:
    return Fingerprint.of(model, identity=True)


@pytest.fixture
def tuner() -> Tuner:
    made = Tuner.for_model(Model(), seed=3, hidden=8)
    return identified(made, Model())


def sigma(tuner: Tuner, model: nn.Module) -> dict[str, float]:
    blocks = Blocks.of(model)
    found = tuner.sigma(tuner.features(RunStatistics.start(blocks)), blocks.names)
    return dict(zip(blocks.names, found.tolist(), strict=True))


CASES = [
    (Model(), "exact", "exact", "names, shapes and weights are the same"),
    (Model(seed=1), "derivative", "exact", "the weights are others, as after fine-tuning: see with `l2l tuners test`"),
    (Wrapped(Model()), "renamed", "shape", "same under other names: 'embed.weight' is 'base.embed.weight'"),
    (adapted("adapters"), "subset", "shape", "11 blocks are the same; 2 not in the tuner: 'base.layers.0.q.lora"),
    (Model(tied=False), "subset", "shape", "'head.weight' was tied to 'embed.weight' in the tuner's model"),
    (Model().layers, "subset", "shape", "10 blocks are the same; 1 missing in the model: 'embed.weight'"),
    (Model(layers=3), "subset", "shape", "5 not in the tuner: 'layers.2"),
    (Model(width=8), "other size", "kind", "the blocks have the same roles in other shapes or numbers"),
    (nn.Sequential(nn.Linear(9, 9)), "other family", "kind", "the blocks have other names and shapes"),
]


@pytest.mark.parametrize(("model", "kind", "needed", "message"), CASES, ids=[f"{c[1]} {i}" for i, c in enumerate(CASES)])
def test_every_relation_has_its_name_its_level_and_its_message(
    tuner: Tuner, model: nn.Module, kind: str, needed: str, message: str
):
    found = classify(tuner.fingerprint, fingerprint(model))
    assert (found.kind, found.needed) == (kind, needed)
    assert message in found.message


@pytest.mark.parametrize("level", ["exact", "shape"])
def test_a_model_less_like_it_than_asked_is_refused_with_the_level_that_would_do(tuner: Tuner, level: str):
    for model, kind, needed, _ in CASES:
        if needed != "exact" and (level, needed) != ("shape", "shape"):
            with pytest.raises(ValueError, match=rf"does not fit this model \({kind}\).*try --match ({needed}|kind)"):
                tuner.matched(model, level)  # pyright: ignore[reportArgumentType]


def test_an_exact_match_or_a_derivative_is_the_tuner_itself(tuner: Tuner):
    assert tuner.matched(Model()) is tuner
    assert tuner.matched(Model(seed=1)) is tuner


def test_renamed_blocks_keep_their_sigma_bit_for_bit(tuner: Tuner):
    wrapped = Wrapped(Model())
    found = tuner.matched(wrapped, "shape")
    found.check(wrapped)
    theirs = sigma(found, wrapped)
    assert {name.removeprefix("base."): value for name, value in theirs.items()} == sigma(tuner, Model())


def test_blocks_in_another_order_keep_their_sigma(tuner: Tuner):
    shuffled = nn.Module()
    for name, child in reversed(list(Model().named_children())):
        shuffled.add_module(name, child)
    found = classify(tuner.fingerprint, fingerprint(shuffled))
    assert found.kind == "renamed"
    assert found.mapping["head.weight"] == "embed.weight"  # the tied tensor goes by the name that comes first
    theirs = sigma(tuner.matched(shuffled, "shape"), shuffled)
    assert theirs.pop("head.weight") == sigma(tuner, Model())["embed.weight"]
    assert theirs.items() <= sigma(tuner, Model()).items()


def test_frozen_blocks_do_not_matter(tuner: Tuner):
    model = Model()
    model.embed.weight.requires_grad_(False)
    found = tuner.matched(model)
    assert sigma(found, model) == {n: s for n, s in sigma(tuner, Model()).items() if n != "embed.weight"}


def test_a_base_under_frozen_adapters_keeps_its_sigma(tuner: Tuner):
    model = adapted("adapters")
    found = tuner.matched(model, "shape")
    found.check(model)
    theirs = {name.removeprefix("base.").replace("base_layer.", ""): s for name, s in sigma(found, model).items()}
    assert theirs == sigma(tuner, Model())


def test_trainable_adapters_are_refused_by_shape_and_served_by_kind(tuner: Tuner):
    model = adapted("base")
    with pytest.raises(ValueError, match=r"knows 0 of the 2 blocks that are trained, but not 'base.layers.0.q.lora"):
        tuner.matched(model, "shape")
    assert set(sigma(tuner.matched(model, "kind"), model)) == set(Blocks.of(model).names)


def test_another_size_takes_the_rows_of_the_same_role_nearest_in_depth(tuner: Tuner):
    model = Model(width=8, layers=4)
    own, theirs = sigma(tuner, Model()), sigma(tuner.matched(model, "kind"), model)
    for layer, source in ((0, 0), (1, 0), (2, 1), (3, 1)):
        assert (
            tuner.matched(model, "kind").network.get_parameter("second_bias")[list(theirs).index(f"layers.{layer}.up.bias")]
            == tuner.network.get_parameter("second_bias")[list(own).index(f"layers.{source}.up.bias")]
        )


def test_a_model_with_kinds_of_which_the_tuner_has_none_is_refused(tuner: Tuner):
    vectors = Tuner.for_model(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="the tuner has no matrix, so nothing to take for block 'weight'"):
        vectors.matched(nn.Linear(2, 2, bias=False), "kind")


def test_what_was_measured_on_blocks_is_renamed_but_not_resized():
    model = Model()
    blocks = Blocks.of(model, trainable=False)
    traces = CurvatureNormalizer({name: float(i + 1) for i, name in enumerate(blocks.names)})
    tuner = Tuner.for_model(
        model, "table", normalizer=traces, block_schedule=BlockSchedule.by_role(blocks), values=[2.0] * len(blocks)
    )
    wrapped = Wrapped(Model())
    found = tuner.matched(wrapped, "shape")
    assert isinstance(found.normalizer, CurvatureNormalizer)
    assert found.normalizer.traces == {f"base.{name}": trace for name, trace in traces.traces.items()}
    assert found.block_schedule == BlockSchedule.by_role(Blocks.of(wrapped))
    with pytest.raises(ValueError, match="has curvature traces measured on blocks of its own model"):
        tuner.matched(Model(width=8), "kind")


def test_turns_follow_the_blocks_that_rows_are_taken_from():
    tuner = Tuner.for_model(Model(), "table", block_schedule=BlockSchedule.by_role(Blocks.of(Model())))
    model = Model(width=8, layers=3)
    found = tuner.matched(model, "kind")
    assert found.block_schedule is not None
    assert sorted(name for group in found.block_schedule.groups for name in group) == sorted(Blocks.of(model).names)


def test_a_size_free_tuner_serves_any_model_at_every_level():
    tuner = Tuner.for_model(Model(), "shared_mlp", features="standard")
    model = nn.Sequential(nn.Linear(3, 3))
    assert set(sigma(tuner.matched(model), model)) == {"0.weight", "0.bias"}


def test_an_unknown_level_is_refused(tuner: Tuner):
    with pytest.raises(ValueError, match="match is 'loose'; use one of exact, shape, kind"):
        tuner.matched(Model(), "loose")  # pyright: ignore[reportArgumentType]


def test_a_matched_tuner_is_saved_and_says_where_it_comes_from(tuner: Tuner, tmp_path: Path):
    wrapped = Wrapped(Model())
    found = tuner.matched(wrapped, "shape")
    loaded = Tuner.from_pretrained(found.save_pretrained(tmp_path))
    assert sigma(loaded, wrapped) == sigma(found, wrapped)
    assert loaded.provenance.recipe["matched"] == {"from": "Model", "kind": "renamed"}


def test_identity_is_written_only_where_it_was_looked_at_and_comes_back(tuner: Tuner, tmp_path: Path):
    loaded = Tuner.from_pretrained(tuner.save_pretrained(tmp_path / "with"))
    assert loaded.fingerprint.ties == (("embed.weight", "head.weight"),)
    assert loaded.fingerprint.weights == tuner.fingerprint.weights
    plain = replace(tuner.fingerprint, ties=None, weights=None)
    assert plain == tuner.fingerprint  # the same blocks
    bare = Tuner.for_model(Model()).save_pretrained(tmp_path / "without")
    assert '"fingerprint"' not in (bare / "config.json").read_text()
    assert Tuner.from_pretrained(bare).fingerprint.identity() == {}


def test_the_hash_of_weights_does_not_depend_on_dtype_names_or_order_but_on_every_weight():
    model = Model().to(torch.bfloat16)
    blocks = Blocks.of(model)
    found = weights_hash(blocks)
    assert found == weights_hash(Blocks.of(Wrapped(model))) == weights_hash(Blocks(reversed(blocks)))
    assert found == weights_hash(Blocks.of(model.float()))
    with torch.no_grad():
        model.layers[0].get_parameter("norm.bias")[1] *= 1.01
    assert found != weights_hash(Blocks.of(model))


def test_a_model_without_weights_has_no_hash_but_ties():
    with torch.device("meta"):
        model = Model.__new__(Model)
        nn.Module.__init__(model)
        model.embed = nn.Embedding(3, 2)
        model.head = nn.Linear(2, 3, bias=False)
        model.head.weight = model.embed.weight
    assert weights_hash(Blocks.of(model)) is None
    assert ties_of(model) == (("embed.weight", "head.weight"),)
