"""The public class :class:`l2l.Tuner`: the tuner of :mod:`l2l.tuners.model` with files, the hub and other models on top."""

from pathlib import Path
from typing import Self, final

from torch import nn

from l2l.tuners import io, sources, transfer
from l2l.tuners.model import TunerModel


@final
class Tuner(TunerModel):
    """Sigma per block from features per block, and, where it has a basis, sigma along that. Small, inert on disk.

    Made by :meth:`for_model` (fresh), :meth:`from_pretrained` or :func:`l2l.meta_train`.
    """

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Self:
        """Load a tuner.

        Args:
            name: directory, name of a bundled tuner (``l2l-tiny`` or ``l2l/tiny``) or of a registry, or hub id.
            revision: commit, branch or tag of a hub tuner.

        Raises:
            FileNotFoundError: there is none of that name; the message lists the places searched.
            ValueError: a file is missing, corrupted, or of another format.
        """
        return io.load(sources.locate(str(name), revision), cls)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``tuner.safetensors``, ``config.json`` and a card ``README.md``; the directory."""
        return io.save(self, Path(directory))

    def push_to_hub(self, repo_id: str, private: bool = False, revision: str | None = None, licence: str | None = None) -> str:
        """Upload the saved form to the hub in one commit; the commit's address. Needs a logged-in hub account.

        Args:
            repo_id: ``owner/name``.
            private: whether a repository that is created for it is private.
            revision: branch to commit to.
            licence: of the weights, for the card.

        Raises:
            ValueError: the licence is unknown, the hub refuses or cannot be reached, or the base model is a directory.
        """
        return sources.push(self, repo_id, private, revision, licence)

    def matched(self, model: nn.Module, match: transfer.Level = "exact") -> Self:
        """The tuner bound to the blocks of a similar model.

        With the same names and shapes it is the tuner itself. Renamed blocks keep their rows, basis and schedule. Blocks
        that the tuner does not know must be frozen, or with ``kind`` take the rows of the most similar block. A size-free
        tuner serves every model and ignores ``match``.

        Args:
            match: ``exact``: names and shapes; ``shape``: shapes; ``kind``: kinds of blocks alone.

        Raises:
            ValueError: the model is less similar than ``match`` asks, or the tuner's basis or normalizer cannot go to it.
        """
        return transfer.matched(self, model, match)
