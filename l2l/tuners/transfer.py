"""A tuner on a model that is not the one it was made for: the same network, its rows dealt to that model's blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

from torch import nn

from l2l.blocks import Blocks
from l2l.tuners.base import TunerNetwork
from l2l.tuners.build import build_network
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.match import Level, Match, check_level, classify, representatives
from l2l.tuners.normalise import CurvatureNormalizer, Normalizer
from l2l.tuners.tuner import Tuner
from l2l.tuners.turns import BlockSchedule


def compare(tuner: Tuner, model: nn.Module) -> Match:
    """What a model is to a tuner. Weights are looked at only where the tuner knows those it was made for."""
    return classify(tuner.fingerprint, Fingerprint.of(model, identity=tuner.fingerprint.weights is not None))


def identified(tuner: Tuner, model: nn.Module) -> Tuner:
    """The same tuner, which knows ties and weights of the model that it was made for.

    Raises:
        ValueError: it was not made for this model.
    """
    tuner.check(model)
    found = copy(tuner)
    found.fingerprint = tuner.fingerprint.identified(model)
    return found


def matched(tuner: Tuner, model: nn.Module, match: Level = "exact") -> Tuner:
    """A tuner bound to the model's blocks.

    With the same names and shapes it is the tuner itself. Renamed blocks keep their rows, basis and turns. Blocks that the
    tuner does not know must be frozen, or with ``kind`` take the rows of the most similar block. A size-free tuner serves
    every model and ignores ``match``.

    Raises:
        ValueError: the model is less like the tuner's than ``match`` asks; or what the tuner has cannot be transferred.
    """
    check_level(match)
    if tuner.size_free:
        tuner.check(model)
        return tuner.with_basis(tuner.basis, model)
    prints = Fingerprint.of(model)  # with other weights it would be bound just the same: they are not looked at
    found, base = classify(tuner.fingerprint, prints), tuner.provenance.base_model
    if not found.accepted(match):
        raise ValueError(
            f"the tuner was made for {base!r} and does not fit this model ({found.kind}): {found.message}. Use a tuner of "
            f"this model, learn one with `l2l meta-train`, or try --match {_level_for(found, model)} and judge it with "
            "`l2l tuners test`"
        )
    if found.needed == "exact":
        return tuner
    if found.kind == "subset" and match == "shape":
        _check_frozen(found, model, base)
    if found.needed == "kind":
        _check_free_of_blocks(tuner, base)
    dealt = _assign_rows(tuner, found, prints)
    dealt.normalizer.counts(Blocks.of(model), dealt.basis or ())  # refuses blocks that nothing was measured on
    return dealt


def _unknown(found: Match, moving: Collection[str]) -> list[str]:
    """Blocks that the tuner lacks and that are trained."""
    return [name for name in found.extra if name in moving]


def _level_for(found: Match, model: nn.Module) -> Level:
    """The strictest level that serves the model as it is to be trained."""
    return "kind" if _unknown(found, Blocks.of(model).names) else found.needed


def _check_frozen(found: Match, model: nn.Module, base: str) -> None:
    moving = Blocks.of(model).names
    if unknown := _unknown(found, moving):
        raise ValueError(
            f"the tuner for {base!r} knows {len(moving) - len(unknown)} of the {len(moving)} blocks that are trained, but "
            f"not {format_names(unknown)}: freeze these, or give them the sigma of similar blocks with --match kind"
        )


def _check_free_of_blocks(tuner: Tuner, base: str) -> None:
    if tuner.basis is not None or isinstance(tuner.normalizer, CurvatureNormalizer):
        what = "a basis" if tuner.basis is not None else "curvature traces"
        raise ValueError(
            f"the tuner for {base!r} has {what} measured on blocks of its own model: it cannot go to one of other shapes; "
            "learn a tuner for this model"
        )


def _assign_rows(tuner: Tuner, found: Match, prints: Fingerprint) -> Tuner:
    """The tuner whose blocks are those of ``prints``."""
    sources = dict(found.mapping)
    if found.extra:
        sources = representatives(tuner.fingerprint, prints) | sources
    origin = {"from": tuner.provenance.base_model, "kind": found.kind}
    network, args = _network(tuner, [sources[name] for name in prints.names])
    return Tuner(
        network,
        prints,
        _normaliser(tuner.normalizer, found.mapping),
        tuner.architecture,
        args,
        provenance=replace(tuner.provenance, recipe=tuner.provenance.recipe | {"matched": origin}),
        features=tuner.feature_set,
        basis=_renamed(tuner.basis or {}, found.mapping) or None,
        turns=_turns(tuner.block_schedule, sources),
    )


def _network(tuner: Tuner, names: list[str]) -> tuple[TunerNetwork, dict[str, Any]]:
    """A network whose rows are those of these blocks, and what it is built from."""
    rows, count = tuner.rows(names), len(tuner.fingerprint.names)
    args = {
        name: [value[row] for row in rows] if isinstance(value, list) and len(value) == count else value
        for name, value in tuner.architecture_args.items()
    } | {"blocks": len(rows)}
    network = build_network(tuner.architecture, args)
    shared, learned = tuner.network.shared, tuner.network.state_dict()
    network.load_state_dict({name: value if name in shared else value[rows] for name, value in learned.items()})
    return network, args


def _renamed(values: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    return {name: values[source] for name, source in mapping.items() if source in values}


def _normaliser(normalizer: Normalizer, mapping: Mapping[str, str]) -> Normalizer:
    if not isinstance(normalizer, CurvatureNormalizer):
        return normalizer
    return CurvatureNormalizer(_renamed(normalizer.traces, mapping), _renamed(normalizer.basis_traces, mapping))


def _turns(turns: BlockSchedule | None, sources: Mapping[str, str]) -> BlockSchedule | None:
    """Every block moves with the group of the block it takes after; groups of which nothing is left have no turn."""
    if turns is None:
        return None
    groups = [tuple(name for name, source in sources.items() if source in group) for group in map(set, turns.groups)]
    left = [(group, share) for group, share in zip(groups, turns.shares, strict=True) if group]
    return BlockSchedule(tuple(group for group, _ in left), tuple(share for _, share in left))
