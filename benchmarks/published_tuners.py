"""How far the published tuners moved from their initialisation, and where: the page docs/published-tuners.md.

python benchmarks/published_tuners.py ../shared/tuners/published --out docs/published-tuners.md

Reads every ``.pth`` file of a directory without executing anything. A file's model is the one of those known whose blocks
it names; nothing is fetched.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from l2l.report.run_directory import write_whole
from l2l.tuners.diagnostics import initial_network, movement, reconstruct, typical_sigma
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.model import TunerModel
from l2l.tuners.published import KNOWN_MODELS, Published, known_fingerprint, read_published, to_tuner
from l2l.tuners.schedule import role_of

SHOWN = 10
"""Blocks named per tuner."""
CHANGED = 0.1
"""Change of sigma from which a block counts as changed."""

HEAD = """# The published tuners, and what they learned

`python benchmarks/published_tuners.py DIRECTORY_OF_THE_PTH_FILES --out docs/published-tuners.md` wrote this page. It reads the
files without executing anything (`l2l tuners import` does the same) and takes no other input.

The files are those of ZO Fine-tuner (arXiv:2510.00419), one network 5 -> 64 -> tanh -> 1 per block. None states a licence, a
result or how it was made; *saved as* is the name that the file records of itself.

**The initialisation** is not recorded and is reconstructed. The networks of each device of the machine that learned them
started from the same draws, so blocks fall into groups that still point the same way (cosine above 0.5; between groups it stays
below {apart:.2f}, within them above {alike:.2f}). The median over a group, number by number, is taken as the initialisation of
its blocks. In a group of two it is their mean, so half of what either moved counts to each, and a common change is not seen.

**Distance** is that of a block's weights from their initialisation, relative to the norm of that. **Sigma** is before
normalisation, at weights of mean 0 and variance 4e-4, losses of 2 and a last sigma of 1; *variation* is its standard deviation
over its mean; *then* is at the initialisation; *correlation* is that of sigma then and now; *changed* counts blocks whose
sigma changed by more than {changed}.

"""


@dataclass(frozen=True)
class Report:
    """Figures of a file."""

    name: str
    found: Published
    tuner: TunerModel
    moved: list[float]
    then: list[float]
    now: list[float]
    sizes: tuple[int, ...]
    """Per block: size of its group of blocks that started alike."""
    alike: float
    """Least cosine within the groups."""
    apart: float
    """Largest cosine between groups, in absolute value."""


def report(path: Path, models: Mapping[str, Fingerprint]) -> Report:
    """Figures of one file.

    Raises:
        ValueError: the file is refused, fits none of the models, or a block started like no other.
    """
    found = read_published(path)
    base = next((base for base, known in models.items() if set(known.names) == set(found.names)), None)
    if base is None:
        raise ValueError(f"{path}: its {len(found.names)} blocks are those of none of {', '.join(models)}")
    tuner = to_tuner(found, base, models[base], path.name)
    if initial_network(tuner) is None:
        raise ValueError(f"{path}: some blocks started like no other, so their initialisation cannot be reconstructed")
    state = tuner.network.state_dict()
    weights = torch.cat([value.reshape(len(tuner.fingerprint.names), -1) for value in state.values()], 1).double()
    groups = reconstruct(weights)
    number = torch.tensor(groups.group)
    directions = weights / weights.norm(dim=1, keepdim=True)
    cosines = directions @ directions.t()
    same = number[:, None] == number
    then, now = typical_sigma(tuner, fresh=True).tolist(), typical_sigma(tuner).tolist()
    alike, apart = cosines[same].min().item(), cosines[~same].abs().max().item()
    return Report(path.name, found, tuner, movement(tuner), then, now, groups.sizes, alike, apart)


def page(reports: Sequence[Report]) -> str:
    """The page as Markdown."""
    alike, apart = min(one.alike for one in reports), max(one.apart for one in reports)
    head = HEAD.format(alike=alike, apart=apart, changed=CHANGED)
    table = rows_of([overview(one) for one in reports])
    return head + "\n\n".join([table, *(section(one) for one in reports)]) + "\n"


def overview(one: Report) -> dict[str, str]:
    """A row of the first table."""
    then, now = torch.tensor(one.then).double(), torch.tensor(one.now).double()
    moved = torch.tensor(one.moved)
    changed = int(((now - then).abs() > CHANGED).sum())
    return {
        "tuner for": f"`{one.tuner.provenance.base_model}`",
        "blocks": str(len(now)),
        "distance: median": f"{median(one.moved):.1e}",
        "90 %": f"{moved.quantile(0.9):.1e}",
        "largest": f"{max(one.moved):.3f}",
        "sigma: min": f"{now.min():.2g}",
        "median": f"{median(one.now):.3f}",
        "max": f"{now.max():.3g}",
        "variation": f"{now.std(correction=0) / now.mean():.2f}",
        "variation then": f"{then.std(correction=0) / then.mean():.2f}",
        "correlation": f"{torch.corrcoef(torch.stack([then, now]))[0, 1]:.3f}",
        "changed": f"{changed} of {len(now)}",
    }


def section(one: Report) -> str:
    """Section of one tuner: its file, the blocks and the roles that moved farthest."""
    names = one.tuner.fingerprint.names
    counts = {size: one.sizes.count(size) for size in sorted(set(one.sizes))}
    groups = ", ".join(f"{count} in groups of {size}" for size, count in counts.items())
    order = sorted(range(len(names)), key=lambda i: -one.moved[i])[:SHOWN]
    blocks = [
        {
            "block": f"`{names[i]}`",
            "distance": f"{one.moved[i]:.4f}",
            "sigma then": f"{one.then[i]:.3f}",
            "sigma now": f"{one.now[i]:.3f}",
            "group of": str(one.sizes[i]),
        }
        for i in order
    ]
    found, dtype = one.found, str(one.found.dtype).removeprefix("torch.")
    facts = f"`{one.name}`, {found.bytes} bytes, {dtype}, saved as `{found.saved_as}`."
    text = [f"## {one.tuner.provenance.base_model}", facts, f"sha256 `{found.sha256}`. Blocks: {groups}."]
    return "\n\n".join([*text, "Farthest from their initialisation:", rows_of(blocks), "By role:", rows_of(by_role(one))])


def by_role(one: Report) -> list[dict[str, str]]:
    """Per role, the same tensor of all layers: median and largest distance, and its share of all movement squared."""
    shapes = zip(one.tuner.fingerprint.names, one.tuner.fingerprint.shapes, strict=True)
    roles: dict[str, list[int]] = {}
    for i, (name, shape) in enumerate(shapes):
        roles.setdefault(role_of(name, len(shape)), []).append(i)
    total = sum(value**2 for value in one.moved)
    shares = {role: sum(one.moved[i] ** 2 for i in members) / total for role, members in roles.items()}
    return [
        {
            "role": f"`{role}`",
            "blocks": str(len(roles[role])),
            "distance: median": f"{median(one.moved[i] for i in roles[role]):.1e}",
            "largest": f"{max(one.moved[i] for i in roles[role]):.4f}",
            "share of all movement, squared": f"{100 * shares[role]:.1f} %",
        }
        for role in sorted(roles, key=lambda role: -shares[role])
    ]


def rows_of(rows: Sequence[Mapping[str, str]]) -> str:
    """A table as Markdown; columns are the keys of the first row."""
    names = list(rows[0])
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="holds the .pth files")
    parser.add_argument("--out", type=Path, help="file to write; default: print")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums of several threads may differ in the last digit
    files = sorted(options.directory.glob("*.pth"))
    if not files:
        raise SystemExit(f"published_tuners: no .pth file in {options.directory}: name the directory that holds them")
    models = {base: known_fingerprint(base) for base in KNOWN_MODELS}
    try:
        text = page([report(path, models) for path in files])
    except ValueError as error:
        raise SystemExit(f"published_tuners: {error}") from error
    if options.out is None:
        print(text)
    else:
        write_whole(options.out, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
