"""Tuners on the Hugging Face hub: config and safetensors only. A pickle is never fetched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from l2l.tuners.tuner import Tuner

WEIGHTS, CONFIG = "tuner.safetensors", "config.json"
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt")
UNKNOWN = "unknown"


def hub_folder(repo_id: str, revision: str | None) -> Path:
    """A folder with a hub tuner's weights and config: from the cache, else downloaded into it.

    Raises:
        FileNotFoundError: there is no such tuner, or the hub cannot be reached.
        ValueError: the repository holds a pickle in place of a tuner.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with _without_retries_told():
            files = [Path(hf_hub_download(repo_id, name, revision=revision)) for name in (CONFIG, WEIGHTS)]
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"tuner {repo_id!r} is not in the local cache and the hub cannot be reached: run `l2l tuners download "
            f"{repo_id}` where there is a network, or give a directory"
        ) from error
    except (EntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError):
            _refuse_pickles(repo_id, revision)
        raise FileNotFoundError(f"no tuner {repo_id!r} on the hub: {str(error).splitlines()[0]}") from error
    return files[1].parent


@contextmanager
def _without_retries_told() -> Iterator[None]:
    """The hub's client says of each try that it failed, in two lines; our error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_pickles(repo_id: str, revision: str | None) -> None:
    """Raise ValueError where a repository without a tuner holds a pickle of one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = sorted(name for name in HfApi().list_repo_files(repo_id, revision=revision) if name.endswith(PICKLES))
    except HfHubHTTPError:
        return
    if found:
        raise ValueError(
            f"the hub repository {repo_id!r} holds no tuner.safetensors, but the pickle {found[0]!r}, which could run "
            f"code: it is not loaded. Get it with `hf download {repo_id} {found[0]}`, then `l2l tuners import FILE "
            "--base-model ID --out DIR` reads its numbers without executing anything"
        )


def licensed(tuner: Tuner, licence: str | None) -> Tuner:
    """The tuner with a licence in its recipe, as the card states it.

    Raises:
        ValueError: the tuner's licence is unknown and none is given: it is not ours to pass on.
    """
    stated = tuner.provenance.recipe.get("licence")
    if licence is None:
        if isinstance(stated, str) and stated.startswith(UNKNOWN):
            raise ValueError(
                f"the licence of this tuner is {stated}: it is not pushed. With its authors' leave, name the licence with "
                "--licence"
            )
        return tuner
    recipe = tuner.provenance.recipe | {"licence": licence}
    provenance = replace(tuner.provenance, recipe=recipe)
    known = (tuner.normalizer, tuner.architecture, tuner.architecture_args, provenance, tuner.feature_set)
    return Tuner(tuner.network, tuner.fingerprint, *known, tuner.basis, tuner.block_schedule)


def _check_public(tuner: Tuner) -> None:
    base = tuner.provenance.base_model
    if Path(base).is_absolute() or base.startswith("."):
        raise ValueError(
            f"the tuner says that its model is {base!r}, a directory that others do not have: name the model with "
            "`l2l tuners card DIR --base_model ID` before it is pushed"
        )


def push(tuner: Tuner, repo_id: str, private: bool, revision: str | None, licence: str | None = None) -> str:
    """Upload a tuner's three files in one commit; gives the commit's address. Needs a logged-in hub account.

    Raises:
        ValueError: the licence is unknown, the hub refuses or cannot be reached, or the base model is a directory.
    """
    import tempfile

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable = import_module("huggingface_hub.errors").HTTPError  # of its HTTP client, whichever that is
    tuner = licensed(tuner, licence)
    _check_public(tuner)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        tuner.save_pretrained(folder)
        try:
            with _without_retries_told():
                api.create_repo(repo_id, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision).commit_url)
        except (HfHubHTTPError, HFValidationError, RuntimeError) as error:  # RuntimeError: an upload broke off
            raise ValueError(
                f"the hub did not take {repo_id!r} ({_first_line(error)}): log in with `hf auth login`, and name "
                "a repository that is yours"
            ) from error
        except (unreachable, ConnectionError) as error:  # ConnectionError: HF_HUB_OFFLINE is set
            raise ValueError(
                f"the hub cannot be reached ({_first_line(error)}), so nothing was pushed: run the command where there is a "
                "network"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
