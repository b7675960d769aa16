"""The commands ``l2l tuners ...``: their configurations, and the functions that run them and print.

They use models, reports and experiments, so they are above ``l2l.tuners``.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement

from l2l.arguments import Arguments
from l2l.costs import config_of, meta_model
from l2l.experiments.presets.tuner_test import GoNoGoConfig, report, run_tuner_test
from l2l.models.load import EMBEDDED, load_model
from l2l.report.console import print_table
from l2l.tuners import Fingerprint, Level, Tuner, diagnostics, inspect, io, published, sources
from l2l.tuners.card import render

WIDEST = 10_000
"""Columns that a heat map may ask for."""


@dataclass(frozen=True)
class ShowConfig(Arguments):
    """Show a tuner: recipe, results, sigma by layer and kind, how far it moved."""

    tuner: str
    """Directory, bundled name or hub id."""
    revision: str | None = None
    """Revision of a hub tuner."""
    picture: str | None = None
    """Write the heat map of sigma to this PNG file too."""


def show(config: ShowConfig) -> None:
    """Print the card, and sigma as a heat map."""
    tuner = Tuner.from_pretrained(config.tuner, config.revision)
    print(render(tuner, io.to_config(tuner)))
    found, console = diagnostics.heatmap(tuner), Console()
    table = diagnostics.heatmap_table(found)
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    Console(width=max(console.width, needed)).print(table)  # a narrow terminal wraps it, and hides no figure
    if config.picture is not None:
        print(f"picture: {diagnostics.draw_heatmap(found, Path(config.picture), config.tuner)}")


def list_tuners() -> None:
    """Print a row per tuner, bundled or of a registry."""
    print_table("tuners", sources.tuner_rows())


@dataclass(frozen=True)
class DownloadConfig(Arguments):
    """Download a tuner, so that it can be used by its name, also offline."""

    tuner: str
    """Name in a registry (see ``l2l tuners list``), or hub id."""
    revision: str | None = None
    """Commit, branch or tag of a hub tuner; None: its main branch. Registries pin their own."""
    sha256: str | None = None
    """What the hub's ``tuner.safetensors`` must have."""
    progress: bool = True
    """Show a progress bar."""


def download(config: DownloadConfig) -> None:
    """Fetch a tuner; print its folder."""
    print(sources.download_with_progress(config.tuner, config.revision, config.sha256, config.progress))


@dataclass(frozen=True)
class DiffConfig(Arguments):
    """Compare two tuners: configs, sigma by kind, distance of weights, the blocks that differ most."""

    first: str
    """Directory, bundled or registered name, or hub id."""
    second: str
    """The other one."""
    most: int = inspect.MOST
    """Blocks to name."""


def diff(config: DiffConfig) -> None:
    """Print how two tuners differ."""
    first, second = Tuner.from_pretrained(config.first), Tuner.from_pretrained(config.second)
    found = inspect.difference(first, second, config.most)
    print(found.blocks)
    print("distance of the weights:", "no common shape" if found.distance is None else f"{found.distance:.4g}")
    for title, rows in (("configuration", found.config), ("sigma by kind", found.sigma), ("changes", found.changes)):
        if rows:
            print_table(title, rows)


@dataclass(frozen=True)
class CardConfig(Arguments):
    """Put licence, results or base model into a tuner's config and card; its weights stay as they are."""

    tuner: str
    """Directory of the tuner."""
    results: str | None = None
    """``meta_evaluate.json`` of an evaluation, or ``summary.json`` of a test: becomes a table in the card."""
    label: str | None = None
    """The tuner's label in the evaluation; None: the contender of the directory's name, or the only one."""
    licence: str | None = None
    """Licence of the tuner's weights, such as MIT."""
    base_model: str | None = None
    """Public id of the model, where the tuner was learned from a directory."""


def card(config: CardConfig) -> None:
    """Rewrite the card; print its path."""
    results = None if config.results is None else Path(config.results)
    print(io.edit_card(Path(config.tuner), results, config.label, config.licence, config.base_model))


@dataclass(frozen=True)
class PushConfig(Arguments):
    """Upload a tuner to the hub."""

    tuner: str
    """Directory or bundled name."""
    repo_id: str
    """owner/name on the hub."""
    private: bool = False
    """Whether a repository that is made for it is private."""
    revision: str | None = None
    """Branch to commit to."""
    licence: str | None = None
    """Licence of the tuner's weights, for its card."""


def push(config: PushConfig) -> None:
    """Upload; print the commit's address."""
    tuner = Tuner.from_pretrained(config.tuner)
    print(tuner.push_to_hub(config.repo_id, config.private, config.revision, config.licence))


@dataclass(frozen=True)
class ImportConfig(Arguments):
    """Import a published tuner from its pickle, of which nothing is executed."""

    file: str
    """The .pth file."""
    base_model: str
    """Hub id of the model that it was trained for."""
    out: str
    """New directory for the tuner."""
    model: str | None = None
    """Directory or hub id whose config tells the blocks; None: the base model is one of those that l2l knows."""


def import_tuner(config: ImportConfig) -> None:
    """Import a published file; print what it became."""
    fingerprint = None if config.model is None else fingerprint_of(config.model)
    tuner = published.import_published(Path(config.file), config.base_model, Path(config.out), fingerprint)
    blocks = len(tuner.fingerprint.names)
    print(f"{config.out}: {blocks} blocks of {config.base_model}; the file's own licence is unknown")


@dataclass(frozen=True)
class VerifyConfig(Arguments):
    """Verify a tuner: files, blocks, sigma, card."""

    tuner: str
    """Directory, bundled name or hub id."""
    model: str | None = None
    """Model to use it with: ``l2l/tiny``, a directory or a hub id; None: blocks are not compared. Of a hub model only the
    config is read."""
    match: Level = "exact"
    """Required similarity of the model to the tuner's own: ``exact``, ``shape`` or ``kind``."""
    revision: str | None = None
    """Revision of a hub tuner."""


def verify(config: VerifyConfig) -> None:
    """Print the findings; exit code 2 where one is an error."""
    fingerprint = None if config.model is None else fingerprint_of(config.model, weights=True)
    findings = inspect.verify(config.tuner, fingerprint, config.revision, config.match)
    for found in findings:
        print(f"{found.level:8} {found.what:9} {found.text}")
    inspect.refuse_errors(config.tuner, findings)


def fingerprint_of(model: str, weights: bool = False) -> Fingerprint:
    """Blocks of a model, from its config alone.

    Args:
        weights: read the weights too where they are on this machine, in a directory or in the package.
    """
    if model.lower() in {name.lower() for name in published.KNOWN_MODELS}:
        return published.known_fingerprint(model)
    if weights and (model == EMBEDDED or any(Path(model).glob("*.safetensors"))):
        return Fingerprint.of(load_model(model), identity=True)
    return Fingerprint.of(meta_model(config_of(model)))


def trial(config: GoNoGoConfig) -> None:
    """Test a tuner on a derivative of its base model; print the verdict."""
    print(report(run_tuner_test(config)))
