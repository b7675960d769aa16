"""A hub in memory that speaks the endpoints which pushing and pulling a tuner use, over HTTP on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_of_me"
"""Who has it may write below ``me/``."""


class FakeHub(ThreadingHTTPServer):
    """Repositories of models with one branch; every commit keeps its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        """By repository, (commit, files) in order."""
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        """Uploaded large files by sha256."""
        self.as_large: tuple[str, ...] = (".safetensors",)
        """Endings of files that are uploaded apart from the commit."""
        self.log: list[tuple[str, str]] = []
        """(verb, path) of what was asked."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """A commit; gives its name."""
        earlier = self.commits.setdefault(repo, [])
        before = earlier[-1][1] if earlier else {}
        name = hashlib.sha1(repr((repo, len(earlier), sorted(files.items()))).encode()).hexdigest()
        earlier.append((name, before | files))
        return name

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        found = self.commits.get(repo, [])
        if revision == "main":
            return found[-1] if found else ("0" * 40, {})
        return next((commit for commit in found if commit[0] == revision), None)


class Endpoints(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        assert isinstance(self.server, FakeHub)
        return self.server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def may_write(self, repo: str) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" and repo.startswith("me/")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/tree/([^/]+)|/revision/([^/]+))?", path):
            self.repository(found[1], found[2] or found[3] or "main", bool(found[2]))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(found[1], found[2], found[3])
        else:
            self.refuse(404, "", f"no endpoint {path}")

    def known(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit; None where it was refused."""
        if repo not in self.hub.private or (self.hub.private[repo] and not self.may_write(repo)):
            self.refuse(401, "RepoNotFound", "Repository not found")
            return None
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def repository(self, repo: str, revision: str, tree: bool) -> None:
        if commit := self.known(repo, revision):
            files = [{"type": "file", "path": name, "size": len(c), "oid": blob(c)} for name, c in commit[1].items()]
            info = {"id": repo, "sha": commit[0], "siblings": [{"rfilename": name} for name in commit[1]], "tags": []}
            self.answer(200, files if tree else info | {"private": self.hub.private[repo]})

    def file(self, repo: str, revision: str, name: str) -> None:
        commit = self.known(repo, revision)
        if commit is None:
            return
        headers = {"X-Repo-Commit": commit[0]}
        if name not in commit[1]:
            self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content = commit[1][name]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        etag = hashlib.sha256(content).hexdigest() if name.endswith(self.hub.as_large) else blob(content)
        self.answer(206 if start else 200, content[start:], headers | {"ETag": f'"{etag}"'})

    def do_PUT(self) -> None:
        content, name = self.body(), self.path.rpartition("/")[2]
        self.hub.log.append(("PUT", "/upload"))
        if hashlib.sha256(content).hexdigest() != name:
            self.answer(400, {"error": "another checksum"})
            return
        self.hub.large[name] = content
        self.answer(200, {})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.log.append(("POST", path))
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif found := re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?/(preupload|commit|info)/.+", path):
            if found[1] not in self.hub.private or not self.may_write(found[1]):
                self.refuse(403, "", "You don't have the rights")
            else:
                {"preupload": self.preupload, "commit": self.commit, "info": self.batch}[found[2]](found[1], body)
        else:
            self.refuse(404, "", f"no endpoint {path}")

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.may_write(repo):
            self.refuse(401, "", "Invalid username or password.")
        elif repo in self.hub.private:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{repo}"})
        else:
            self.hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.answer(200, {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo})

    def validate(self, card: str) -> None:
        found = re.match(r"---\n(.*?)\n---\n", card, re.S)
        good = found is not None and isinstance(yaml.safe_load(found[1]), dict)
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, repo: str, body: bytes) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(self.hub.as_large) else "regular" for name in names}
        files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
        self.answer(200, {"files": files})

    def batch(self, repo: str, body: bytes) -> None:
        found = [
            file | {"actions": {"upload": {"href": f"{self.hub.address}/upload/{file['oid']}"}}}
            for file in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": found})

    def commit(self, repo: str, body: bytes) -> None:
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        name = self.hub.add(repo, files)
        self.answer(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{name}", "commitOid": name})


def blob(content: bytes) -> str:
    """Name that git gives a file."""
    return hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()


@contextmanager
def running(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub talks to in this process, with a cache of its own and the token of ``me``."""
    with FakeHub() as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        constants = {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield hub
        hub.shutdown()
        thread.join()
