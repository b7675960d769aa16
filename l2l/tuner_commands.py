"""The commands ``l2l tuners ...``: their configurations, and what runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.tuners.transfer import Level

if TYPE_CHECKING:
    from l2l.tuners.fingerprint import Fingerprint


WIDEST = 10_000
"""Columns that a heat map may ask for."""


@dataclass(frozen=True)
class ShowConfig:
    """Show a tuner: recipe, results, sigma by layer and kind, how far it moved."""

    tuner: str
    """Directory, bundled name or hub id."""
    revision: str | None = None
    """Revision of a hub tuner."""
    picture: str | None = None
    """Write the heat map of sigma to this PNG file too."""


def show(config: ShowConfig) -> None:
    """The card, and sigma as a heat map."""
    from rich.console import Console
    from rich.measure import Measurement

    from l2l.tuners.card import render
    from l2l.tuners.diagnostics import draw, heat, table
    from l2l.tuners.io import to_config
    from l2l.tuners.model import Tuner

    tuner = Tuner.from_pretrained(config.tuner, config.revision)
    print(render(tuner, to_config(tuner)))
    picture, console = table(heat(tuner)), Console()
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), picture).maximum
    Console(width=max(console.width, needed)).print(picture)  # a narrow terminal wraps it, and hides no figure
    if config.picture is not None:
        print(f"picture: {draw(heat(tuner), Path(config.picture), config.tuner)}")


@dataclass(frozen=True)
class ListTunersConfig:
    """List tuners: bundled ones, and those of the registries."""


def list_tuners(_: ListTunersConfig) -> None:
    """A row per tuner."""
    from l2l.report.console import print_table
    from l2l.tuners.sources import rows

    print_table("tuners", rows())


def download_config() -> type:
    """Configuration of ``tuners download``."""
    from l2l.tuners.sources import DownloadConfig

    return DownloadConfig


def download(config: Any) -> None:
    """Fetch a tuner; where it lies now."""
    from l2l.tuners.sources import run_download

    print(run_download(config))


def diff_config() -> type:
    """Configuration of ``tuners diff``."""
    from l2l.tuners.inspect import DiffConfig

    return DiffConfig


def diff(config: Any) -> None:
    """What two tuners differ in."""
    from l2l.report.console import print_table
    from l2l.tuners.inspect import difference
    from l2l.tuners.model import Tuner

    found = difference(Tuner.from_pretrained(config.first), Tuner.from_pretrained(config.second), config.most)
    print(found.blocks)
    print("distance of the weights:", "no common shape" if found.distance is None else f"{found.distance:.4g}")
    for title, rows in (("configuration", found.config), ("sigma by kind", found.sigma), ("changes", found.changes)):
        if rows:
            print_table(title, rows)


@dataclass(frozen=True)
class CardConfig:
    """Put licence, results or base model into a tuner's config and card; its weights stay as they are."""

    tuner: str
    """Directory of the tuner."""
    results: str | None = None
    """``meta_evaluate.json`` of an evaluation, or ``summary.json`` of a test: becomes a table in the card."""
    label: str | None = None
    """What the evaluation calls the tuner; None: the contender of the directory's name, or the only one."""
    licence: str | None = None
    """Licence of the tuner's weights, such as MIT."""
    base_model: str | None = None
    """Id by which others know the model, where the tuner was learned from a directory."""


def card(config: CardConfig) -> None:
    """Write the card anew; where it lies."""
    from l2l.tuners.io import edit_card

    results = None if config.results is None else Path(config.results)
    print(edit_card(Path(config.tuner), results, config.label, config.licence, config.base_model))


@dataclass(frozen=True)
class PushConfig:
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
    """Upload; the commit's address."""
    from l2l.tuners.model import Tuner

    tuner = Tuner.from_pretrained(config.tuner)
    print(tuner.push_to_hub(config.repo_id, config.private, config.revision, config.licence))


@dataclass(frozen=True)
class ImportConfig:
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
    """Import; what it is now."""
    from l2l.tuners.published import import_published

    prints = None if config.model is None else fingerprint_of(config.model)
    tuner = import_published(Path(config.file), config.base_model, Path(config.out), prints)
    print(
        f"{config.out}: {len(tuner.fingerprint.names)} blocks of {config.base_model}; the file's own licence is unknown"
    )


@dataclass(frozen=True)
class VerifyConfig:
    """Verify a tuner: files, blocks, sigma, card."""

    tuner: str
    """Directory, bundled name or hub id."""
    model: str | None = None
    """Model that it shall serve: ``l2l/tiny``, a directory or a hub id; None: blocks are not compared. Of a hub model only
    the config is read."""
    match: Level = "exact"
    """How alike the model must be to the tuner's own: ``exact``, ``shape`` or ``kind``."""
    revision: str | None = None
    """Revision of a hub tuner."""


def verify(config: VerifyConfig) -> None:
    """Findings; exit code 2 where one is an error."""
    from l2l.tuners.inspect import refuse_errors, verify

    prints = None if config.model is None else fingerprint_of(config.model, weights=True)
    findings = verify(config.tuner, prints, config.revision, config.match)
    for found in findings:
        print(f"{found.level:8} {found.what:9} {found.text}")
    refuse_errors(config.tuner, findings)


def fingerprint_of(model: str, weights: bool = False) -> Fingerprint:
    """Blocks of a model, from its config alone; of those that published tuners are for, without a network.

    Args:
        weights: look at the weights too where they are at hand, in a directory or in the package.
    """
    from l2l.costs.model_shape import config_of, meta_model
    from l2l.models.load import EMBEDDED, load_model
    from l2l.tuners.fingerprint import Fingerprint
    from l2l.tuners.published import KNOWN_MODELS, known_fingerprint

    if model.lower() in {name.lower() for name in KNOWN_MODELS}:
        return known_fingerprint(model)
    if weights and (model == EMBEDDED or any(Path(model).glob("*.safetensors"))):
        return Fingerprint.of(load_model(model), identity=True)
    return Fingerprint.of(meta_model(config_of(model)))


def trial_config() -> type:
    """Configuration of ``tuners test``."""
    from l2l.experiments.presets.tuner_test import GoNoGoConfig

    return GoNoGoConfig


def trial(config: Any) -> None:
    """Go or no-go on a derivative of the base model."""
    from l2l.experiments.presets.tuner_test import report, run_tuner_test

    print(report(run_tuner_test(config)))
