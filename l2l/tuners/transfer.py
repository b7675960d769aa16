"""Whether a tuner fits a model, and which block is which: a pure function of two fingerprints.

Six answers. ``exact``: the same names and shapes. ``derivative``: these, but other weights (instruct, fine-tuned).
``renamed``: the same shapes under other names, as a wrapper or another class gives them. ``subset``: one has blocks that
the other lacks (adapters on top, a part left out). ``other size``: blocks of the same roles in other shapes or numbers.
``other family``: nothing in common but kinds of blocks.

A tuner on a model that is not the one it was made for: the same network, its rows dealt to that model's blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from l2l.params.blocks import Blocks
from l2l.tuners.features import depths, kind_of
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.model import Tuner
from l2l.tuners.networks import TunerNetwork, build_network
from l2l.tuners.normalize import CurvatureNormalizer, Normalizer
from l2l.tuners.schedule import BlockSchedule

Level: TypeAlias = Literal["exact", "shape", "kind"]
"""How alike a model must be: names and shapes; shapes; or kinds of blocks alone."""
LEVELS = get_args(Level)
Kind: TypeAlias = Literal["exact", "derivative", "renamed", "subset", "other size", "other family"]
NEEDED: dict[Kind, Level] = {
    "exact": "exact",
    "derivative": "exact",
    "renamed": "shape",
    "subset": "shape",
    "other size": "kind",
    "other family": "kind",
}
"""The strictest level at which each is accepted."""
DEEPEST_PREFIX = 4
"""Parts of a name that may belong to a prefix."""

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """What a model is to a tuner."""

    kind: Kind
    mapping: Mapping[str, str]
    """Block of the model -> block of the tuner that it is, of the same shape."""
    missing: tuple[str, ...]
    """Blocks of the tuner that the model lacks."""
    extra: tuple[str, ...]
    """Blocks of the model that the tuner lacks."""
    message: str
    """One sentence."""

    @property
    def needed(self) -> Level:
        """The strictest ``--match`` that accepts it."""
        return NEEDED[self.kind]

    def accepted(self, level: Level) -> bool:
        """Whether this level allows it."""
        return LEVELS.index(self.needed) <= LEVELS.index(level)


def check_level(level: str) -> None:
    """Raise ValueError unless there is such a level."""
    if level not in LEVELS:
        raise ValueError(f"match is {level!r}; use one of {', '.join(LEVELS)}")


def classify(fingerprint: Fingerprint, other: Fingerprint) -> Match:
    """What the model of fingerprint ``other`` is to a tuner of ``fingerprint``. Order of blocks does not matter."""
    mine, theirs = _shapes(fingerprint), _shapes(other)
    mapping = {name: name for name in mine} if mine == theirs else renaming(mine, theirs)
    for first, *tied in fingerprint.ties or ():  # a shared tensor goes by whichever name the model lists first
        names = [name for name in tied if name not in mapping and theirs.get(name) == mine.get(first)]
        if names and first not in mapping.values():
            mapping[names[0]] = first
    found = set(mapping.values())
    missing = tuple(name for name in mine if name not in found)
    extra = tuple(name for name in theirs if name not in mapping)
    kind = _kind(fingerprint, other, mapping, missing, extra)
    return Match(kind, mapping, missing, extra, _message(kind, fingerprint, other, mapping, missing, extra))


def _shapes(prints: Fingerprint) -> dict[str, Shape]:
    return dict(zip(prints.names, prints.shapes, strict=True))


def _kind(
    mine: Fingerprint, other: Fingerprint, mapping: Mapping[str, str], missing: Sequence[str], extra: Sequence[str]
) -> Kind:
    if not missing and not extra:
        if any(name != source for name, source in mapping.items()):
            return "renamed"
        known = mine.weights is not None and other.weights is not None
        return "derivative" if known and mine.weights != other.weights else "exact"
    if mapping and not (missing and extra):
        return "subset"
    roles = {role(name) for name in mine.names}
    alike = sum(role(name) in roles for name in other.names)
    return "other size" if 2 * alike >= len(other.names) else "other family"


def role(name: str) -> str:
    """The name but for numbers: what the same block of all layers has in common."""
    return re.sub(r"\d+", "#", name)


def _message(
    kind: Kind,
    mine: Fingerprint,
    other: Fingerprint,
    mapping: Mapping[str, str],
    missing: Sequence[str],
    extra: Sequence[str],
) -> str:
    if kind == "exact":
        compared = mine.weights is not None and other.weights is not None
        return "names, shapes and weights are the same" if compared else "names and shapes are the same"
    if kind == "derivative":
        return (
            "names and shapes are the same, the weights are others, as after fine-tuning: see with `l2l tuners test` "
            "whether the tuner still gains"
        )
    rest = "; ".join([*_differing(_shapes(mine), _shapes(other), missing, extra), *_tied(mine, extra)])
    if kind == "renamed":
        name, source = next((name, source) for name, source in mapping.items() if name != source)
        return f"the shapes are the same under other names: {source!r} is {name!r}"
    if kind == "subset":
        return f"{len(mapping)} blocks are the same; {rest}"
    if kind == "other size":
        return f"the blocks have the same roles in other shapes or numbers; {rest}"
    return f"the blocks have other names and shapes; {rest}"


def _differing(
    mine: Mapping[str, Shape], theirs: Mapping[str, Shape], missing: Sequence[str], extra: Sequence[str]
) -> list[str]:
    """How many blocks have another shape, and how many only one of the two has; some of each by name."""
    resized = [name for name in missing if name in theirs and name in extra]
    said = f": {resized[0]!r} is {list(mine[resized[0]])} there, {list(theirs[resized[0]])} here" if resized else ""
    lists = {
        "missing in the model": [name for name in missing if name not in resized],
        "not in the tuner": [name for name in extra if name not in resized],
    }
    parts = [f"{len(names)} {label}: {format_names(names)}" for label, names in lists.items() if names]
    return [f"{len(resized)} of another shape{said}", *parts] if resized else parts


def _tied(mine: Fingerprint, extra: Sequence[str]) -> list[str]:
    """Says where a block is unknown because it was tied in the tuner's model."""
    tied = {name: group[0] for group in mine.ties or () for name in group[1:]}
    return [f"{name!r} was tied to {tied[name]!r} in the tuner's model" for name in extra if name in tied]


def renaming(mine: Mapping[str, Shape], theirs: Mapping[str, Shape]) -> dict[str, str]:
    """Their block -> mine, where shapes agree and names differ by a prefix, or by parts that a wrapper put in between.

    First one prefix of mine is replaced by one of theirs, whichever pair serves most blocks; blocks outside it keep their
    names; then names are found that have parts more, the one with the fewest, if it is the only one.
    """
    before, after, mapping = _best_prefixes(mine, theirs)
    taken = set(mapping.values())
    for name in mine:
        if name not in taken and theirs.get(name) == mine[name] and name not in mapping:
            mapping[name] = name
            taken.add(name)
    free: dict[tuple[str, Shape], list[list[str]]] = {}
    for name in theirs:
        if name not in mapping:
            parts = name.split(".")
            free.setdefault((parts[-1], theirs[name]), []).append(parts)
    for name in mine:
        if name in taken:
            continue
        wanted = (after + name.removeprefix(before) if name.startswith(before) else name).split(".")
        longer = [parts for parts in free.get((wanted[-1], mine[name]), []) if _within(wanted, parts)]
        shortest = [parts for parts in longer if len(parts) == min(map(len, longer))]
        if len(shortest) == 1 and ".".join(shortest[0]) not in mapping:
            mapping[".".join(shortest[0])] = name
    return mapping


def _best_prefixes(mine: Mapping[str, Shape], theirs: Mapping[str, Shape]) -> tuple[str, str, dict[str, str]]:
    best: tuple[str, str, dict[str, str]] = ("", "", {})
    for before in _prefixes(mine):
        for after in _prefixes(theirs):
            pairs = ((after + name.removeprefix(before), name) for name in mine if name.startswith(before))
            found = {theirs_name: name for theirs_name, name in pairs if theirs.get(theirs_name) == mine[name]}
            if len(found) > len(best[2]):
                best = before, after, found
    return best


def _prefixes(names: Mapping[str, Shape]) -> list[str]:
    """None, and those that half of the names begin with."""
    counted = Counter(prefix for name in names for prefix in _beginnings(name))
    return ["", *(prefix for prefix, count in counted.items() if 2 * count >= len(names))]


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:k]) + "." for k in range(1, min(DEEPEST_PREFIX, len(parts) - 1) + 1))


def _within(short: Sequence[str], long: Sequence[str]) -> bool:
    """Whether the parts of one name come in the other in the same order."""
    rest = iter(long)
    return all(part in rest for part in short)


def representatives(mine: Fingerprint, other: Fingerprint) -> dict[str, str]:
    """Every block of ``other`` -> the block of ``mine`` most like it: of the same role, else kind, the nearest in depth.

    Raises:
        ValueError: a block is of a kind of which there is none.
    """
    sources = list(zip(mine.names, depths(mine.names), _kinds(mine), strict=True))
    found: dict[str, str] = {}
    for name, depth, kind in zip(other.names, depths(other.names), _kinds(other), strict=True):
        near = [source for source in sources if source[2].split()[-1] == kind.split()[-1]]
        alike = [source for source in near if role(source[0]) == role(name)]
        alike = alike or [source for source in near if source[2] == kind] or near
        if not alike:
            raise ValueError(
                f"the tuner has no {kind}, so nothing to take for block {name!r}: learn one for this model"
            )
        found[name] = min(alike, key=lambda source: abs(source[1] - depth))[0]
    return found


def _kinds(prints: Fingerprint) -> list[str]:
    return [kind_of(block) for block in prints.blocks()]


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
