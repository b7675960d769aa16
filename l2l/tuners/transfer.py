"""A tuner on a model other than its own: how the two are related, which block is which, and the tuner bound to that model.

The relation is a function of two fingerprints. ``exact``: the same names and shapes. ``derivative``: these, but other
weights (instruct, fine-tuned). ``renamed``: the same shapes under other names, as a wrapper or another class gives them.
``subset``: one has blocks that the other lacks (adapters on top, a part left out). ``other size``: blocks of the same roles in
other shapes or numbers. ``other family``: nothing in common but kinds of blocks.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from torch import nn

from l2l.params import Blocks
from l2l.tuners.features import depths, kind_of, role
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.model import TunerModel
from l2l.tuners.networks import build_network
from l2l.tuners.normalize import CurvatureNormalizer
from l2l.tuners.schedule import BlockSchedule

AnyTuner = TypeVar("AnyTuner", bound=TunerModel)
Shape: TypeAlias = tuple[int, ...]
Level: TypeAlias = Literal["exact", "shape", "kind"]
"""Required similarity: names and shapes; shapes; or kinds of blocks alone."""
LEVELS = get_args(Level)
Relation: TypeAlias = Literal["exact", "derivative", "renamed", "subset", "other size", "other family"]
NEEDED: dict[Relation, Level] = {
    **{"exact": "exact", "derivative": "exact"},
    **{"renamed": "shape", "subset": "shape"},
    **{"other size": "kind", "other family": "kind"},
}
"""The strictest level at which each is accepted."""
MAX_PREFIX = 4
"""Parts of a name that may belong to a prefix."""


@dataclass(frozen=True)
class Match:
    """Relation of a model to a tuner."""

    kind: Relation
    mapping: Mapping[str, str]
    """Block of the model -> the tuner's block that it is, of the same shape."""
    extra: tuple[str, ...]
    """Blocks of the model that the tuner lacks."""
    message: str
    """One sentence."""

    @property
    def needed(self) -> Level:
        """The strictest ``--match`` that accepts it."""
        return NEEDED[self.kind]

    def accepted(self, level: Level) -> bool:
        """Whether matching at ``level`` accepts this match."""
        return LEVELS.index(self.needed) <= LEVELS.index(level)


def check_level(level: str) -> None:
    """Raise ValueError unless there is such a level."""
    if level not in LEVELS:
        raise ValueError(f"match is {level!r}; use one of {', '.join(LEVELS)}")


def classify(fingerprint: Fingerprint, other: Fingerprint) -> Match:
    """Relation of the model of fingerprint ``other`` to a tuner of ``fingerprint``. The order of blocks does not matter."""
    mine, theirs = (dict(zip(one.names, one.shapes, strict=True)) for one in (fingerprint, other))
    mapping = {name: name for name in mine} if mine == theirs else _renaming(mine, theirs)
    for first, *tied in fingerprint.ties or ():  # a shared tensor has the name that the model lists first
        names = [name for name in tied if name not in mapping and theirs.get(name) == mine.get(first)]
        if names and first not in mapping.values():
            mapping[names[0]] = first
    found = set(mapping.values())
    missing = tuple(name for name in mine if name not in found)
    extra = tuple(name for name in theirs if name not in mapping)
    renamed = next(((name, source) for name, source in mapping.items() if name != source), None)
    compared = fingerprint.weights is not None and other.weights is not None
    kind: Relation
    if not missing and not extra:
        if renamed is not None:
            kind, message = "renamed", f"the shapes are the same under other names: {renamed[1]!r} is {renamed[0]!r}"
        elif compared and fingerprint.weights != other.weights:
            kind, message = "derivative", "names and shapes are the same, the weights are others, as after fine-tuning"
            message += ": see with `l2l tuners test` whether the tuner still gains"
        else:
            same = "names, shapes and weights" if compared else "names and shapes"
            kind, message = "exact", f"{same} are the same"
        return Match(kind, mapping, extra, message)
    roles = set(map(role, mine))
    if mapping and not (missing and extra):
        kind, message = "subset", f"{len(mapping)} blocks are the same"
    elif 2 * sum(role(name) in roles for name in theirs) >= len(theirs):
        kind, message = "other size", "the blocks have the same roles in other shapes or numbers"
    else:
        kind, message = "other family", "the blocks have other names and shapes"
    resized = [name for name in missing if name in theirs and name in extra]
    details: list[str] = []
    if resized:
        example = f"{resized[0]!r} is {list(mine[resized[0]])} there, {list(theirs[resized[0]])} here"
        details.append(f"{len(resized)} of another shape: {example}")
    for label, names in (("missing in the model", missing), ("not in the tuner", extra)):
        if rest := [name for name in names if name not in resized]:
            details.append(f"{len(rest)} {label}: {format_names(rest)}")
    ties = {name: group[0] for group in fingerprint.ties or () for name in group[1:]}
    details += [f"{name!r} was tied to {ties[name]!r} in the tuner's model" for name in extra if name in ties]
    return Match(kind, mapping, extra, "; ".join([message, *details]))


def _renaming(mine: Mapping[str, Shape], theirs: Mapping[str, Shape]) -> dict[str, str]:
    """Their block -> mine, where shapes agree and names differ by a prefix, or by parts that a wrapper inserts.

    First one prefix of mine is replaced by one of theirs, the pair that maps most blocks; blocks outside it keep their
    names; of the others, a name with additional parts is taken, the one with the fewest, if it is unique.
    """
    before, after, mapping = "", "", dict[str, str]()
    for old in _prefixes(mine):
        for new in _prefixes(theirs):
            pairs = ((new + name.removeprefix(old), name) for name in mine if name.startswith(old))
            found = {theirs_name: name for theirs_name, name in pairs if theirs.get(theirs_name) == mine[name]}
            if len(found) > len(mapping):
                before, after, mapping = old, new, found
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
        longer: list[list[str]] = []
        for parts in free.get((wanted[-1], mine[name]), []):
            rest = iter(parts)
            if all(part in rest for part in wanted):  # in the same order
                longer.append(parts)
        shortest = [parts for parts in longer if len(parts) == min(map(len, longer))]
        if len(shortest) == 1 and ".".join(shortest[0]) not in mapping:
            mapping[".".join(shortest[0])] = name
    return mapping


def _prefixes(names: Mapping[str, Shape]) -> list[str]:
    """The empty one, and those that half of the names begin with."""
    split = [name.split(".") for name in names]
    counted = Counter(".".join(parts[: k + 1]) + "." for parts in split for k in range(min(MAX_PREFIX, len(parts) - 1)))
    return ["", *(prefix for prefix, count in counted.items() if 2 * count >= len(names))]


def _representatives(mine: Fingerprint, other: Fingerprint, mapping: Mapping[str, str]) -> dict[str, str]:
    """Every block of ``other`` outside of ``mapping`` -> the most similar of ``mine``: of the same role, else kind, at the
    nearest depth.

    Tuners saved without kinds have those of the blocks that they are mapped to; the kinds of others are guessed from shapes,
    by which an embedding is a matrix.
    """
    kinds, other_kinds = (dict(zip(one.names, map(kind_of, one.blocks()), strict=True)) for one in (mine, other))
    if not mine.kinds:
        kinds |= {source: other_kinds[name] for name, source in mapping.items()}
    sources = [(name, depth, kinds[name]) for name, depth in zip(mine.names, depths(mine.names), strict=True)]
    found: dict[str, str] = {}
    for name, depth in zip(other.names, depths(other.names), strict=True):
        if name in mapping:
            continue
        kind = other_kinds[name]
        near = [source for source in sources if source[2].split()[-1] == kind.split()[-1]]
        if not near and not mine.kinds:
            near = [source for source in sources if source[2].split()[-1] == "matrix"]
        alike = [source for source in near if role(source[0]) == role(name)]
        alike = alike or [source for source in near if source[2] == kind] or near
        if not alike:
            raise ValueError(f"the tuner has no {kind}, so nothing to take for block {name!r}: learn one for this model")
        found[name] = min(alike, key=lambda source: abs(source[1] - depth))[0]
    return found


def compare(tuner: TunerModel, model: nn.Module) -> Match:
    """Relation of a model to a tuner. Weights are read only where the tuner knows those it was made for."""
    return classify(tuner.fingerprint, Fingerprint.of(model, identity=tuner.fingerprint.weights is not None))


def identified(tuner: AnyTuner, model: nn.Module) -> AnyTuner:
    """The same tuner, with ties and weights of the model that it was made for, else ValueError, in its fingerprint."""
    tuner.check(model)
    return replace(tuner, fingerprint=tuner.fingerprint.identified(model))


def matched(tuner: AnyTuner, model: nn.Module, match: Level = "exact") -> AnyTuner:
    """The tuner bound to the blocks of a model: see :meth:`l2l.Tuner.matched`."""
    check_level(match)
    if tuner.size_free:
        tuner.check(model)
        return tuner.with_basis(tuner.basis, model)
    fingerprint = Fingerprint.of(model)  # without its weights: a derivative is bound in the same way
    found, base = classify(tuner.fingerprint, fingerprint), tuner.provenance.base_model
    trained = Blocks.of(model).names
    unknown = [name for name in found.extra if name in trained]
    if not found.accepted(match):
        level = "kind" if unknown else found.needed
        raise ValueError(
            f"the tuner was made for {base!r} and does not fit this model ({found.kind}): {found.message}. Use a tuner of "
            f"this model, learn one with `l2l meta-train`, or try --match {level} and judge it with `l2l tuners test`"
        )
    if found.needed == "exact":
        return tuner
    if found.kind == "subset" and match == "shape" and unknown:
        raise ValueError(
            f"the tuner for {base!r} knows {len(trained) - len(unknown)} of the {len(trained)} blocks that are trained, but "
            f"not {format_names(unknown)}: freeze these, or give them the sigma of similar blocks with --match kind"
        )
    if found.needed == "kind" and (tuner.basis is not None or isinstance(tuner.normalizer, CurvatureNormalizer)):
        what = "a basis" if tuner.basis is not None else "curvature traces"
        bound_here = f"the tuner for {base!r} has {what} measured on blocks of its own model"
        raise ValueError(f"{bound_here}: it cannot go to one of other shapes; learn a tuner for this model")
    sources = dict(found.mapping)
    if found.extra:  # else each block takes the row of the one that it is
        sources |= _representatives(tuner.fingerprint, fingerprint, sources)
    rows, count = tuner.rows([sources[name] for name in fingerprint.names]), len(tuner.fingerprint.names)
    args = {
        name: [value[row] for row in rows] if isinstance(value, list) and len(value) == count else value
        for name, value in tuner.architecture_args.items()
    } | {"blocks": len(rows)}
    network, shared = build_network(tuner.architecture, args), tuner.network.shared
    learned = tuner.network.state_dict().items()
    network.load_state_dict({name: value if name in shared else value[rows] for name, value in learned})

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values[source] for name, source in found.mapping.items() if source in values}

    normalizer, schedule = tuner.normalizer, tuner.block_schedule
    if isinstance(normalizer, CurvatureNormalizer):
        normalizer = CurvatureNormalizer(renamed(normalizer.traces), renamed(normalizer.basis_traces))
    if schedule is not None:  # every block moves with the group of its source; groups without any are dropped
        groups = [tuple(name for name, source in sources.items() if source in group) for group in schedule.groups]
        left = [(group, share) for group, share in zip(groups, schedule.shares, strict=True) if group]
        schedule = BlockSchedule(tuple(group for group, _ in left), tuple(share for _, share in left))
    origin = {"matched": {"from": tuner.provenance.base_model, "kind": found.kind}}
    bound = replace(
        tuner,
        network=network,
        fingerprint=fingerprint,
        normalizer=normalizer,
        architecture_args=args,
        provenance=replace(tuner.provenance, recipe=tuner.provenance.recipe | origin),
        basis=renamed(tuner.basis or {}) or None,
        block_schedule=schedule,
    )
    bound.normalizer.counts(Blocks.of(model), bound.basis or ())  # refuses blocks that nothing was measured on
    return bound
