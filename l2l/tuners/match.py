"""Whether a tuner fits a model, and which block is which: a pure function of two fingerprints.

Six answers. ``exact``: the same names and shapes. ``derivative``: these, but other weights (instruct, fine-tuned).
``renamed``: the same shapes under other names, as a wrapper or another class gives them. ``subset``: one has blocks that
the other lacks (adapters on top, a part left out). ``other size``: blocks of the same roles in other shapes or numbers.
``other family``: nothing in common but kinds of blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from l2l.tuners.constants import depths, kind_of
from l2l.tuners.fingerprint import Fingerprint, format_names

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
