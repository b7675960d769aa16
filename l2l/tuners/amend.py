"""What is said about a tuner, changed: licence, base model, results. Its weights stay as they lie, byte for byte."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from l2l.tuners.store import CARD, CONFIG, load, read_config, upgraded
from l2l.tuners.card import LICENCE, render
from l2l.tuners.results import with_results


def edit_card(
    directory: Path,
    results: Path | None = None,
    label: str | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write a tuner's config and card anew; the card's path.

    Args:
        directory: of the tuner.
        results: ``meta_evaluate.json``, or the ``summary.json`` of ``l2l tuners test``.
        label: what the evaluation calls the tuner; None: the contender of the folder's name, or the only one.
        licence: of the tuner's weights, as the hub names licences.
        base_model: id by which others know the model, where the tuner was learned from a directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no tuner, a value does not fit, or the file says nothing of this tuner and model.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{str(directory)!r} is no directory: `l2l tuners card` changes tuners in a directory")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise ValueError(f"licence is {licence!r}; give one name without spaces, such as MIT or Apache-2.0")
    tuner, config = load(directory), read_config(directory / CONFIG)
    if licence is not None:
        config["recipe"]["licence"] = licence
    if base_model is not None:
        config["base_model"] = base_model
    if results is not None:
        known = config["results"], results, directory.resolve().name, config["base_model"], label
        config["results"] = with_results(*known)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as folder:
        card, kept = (Path(folder) / name for name in (CARD, CONFIG))
        card.write_text(render(tuner, upgraded(config)))
        kept.write_text(json.dumps(config, indent=1) + "\n")
        for file in (card, kept):
            file.chmod(0o644)
            file.replace(directory / file.name)
    return directory / CARD
