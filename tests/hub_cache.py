"""Caches of the hub laid out as its libraries lay them out: for tests of what works without a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def add_snapshot(hub: Path, kind: str, repo: str, commit: str, files: Mapping[str, bytes], refs: tuple[str, ...] = ()) -> Path:
    """Put a commit of a repository into the cache, as ``hf download`` does; the folder of its files.

    Args:
        kind: ``models`` or ``datasets``.
        refs: branches and tags that point to the commit.
    """
    folder = hub / f"{kind}--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


def run_offline(home: Path, code: str, **environment: str) -> str:
    """Run Python code whose hub cache is ``home/hub``, in a process without a network; what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    settings = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **settings, **(environment or {"HF_HUB_OFFLINE": "1"})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
