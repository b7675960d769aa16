"""Downloads: continued wherever they broke off, checked, complete before they take their names; in the cache by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
import torch
from cases import TiedLM

from l2l.tuners import sources as fetch
from l2l.tuners import sources as registry
from l2l.tuners.api import Tuner
from l2l.tuners.sources import download, download_with_progress

CONTENT = Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PLACES = sorted(Random(1).sample(range(len(CONTENT)), 20))


class Server(ThreadingHTTPServer):
    """Serves bytes by path; breaks connections off where it is told to."""

    def __init__(self, ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = ranges
        self.files = {"/file": CONTENT}
        self.breaks: list[int] = []
        """Absolute places at which the next connections end."""
        self.asked: list[str | None] = []
        """The ranges that were asked for."""

    def at(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked.append(self.headers.get("Range"))
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and server.ranges else 0
        if start >= len(content) and start:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = max(start, server.breaks.pop(0)) if server.breaks else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(ranges: bool) -> Iterator[Server]:
    with Server(ranges) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    yield from serve(True)


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def either(request: pytest.FixtureRequest) -> Iterator[Server]:
    yield from serve(request.param)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("L2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(registry.VARIABLE, raising=False)


@pytest.mark.parametrize("place", PLACES)
def test_a_connection_that_breaks_off_at_any_byte_is_taken_up_in_the_same_call(either: Server, tmp_path: Path, place: int):
    either.breaks = [place]
    target = fetch.fetch(either.at("/file"), tmp_path / "file", SHA256, len(CONTENT))
    assert target.read_bytes() == CONTENT
    assert either.asked == [None, f"bytes={place}-" if place else None]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", PLACES)
def test_a_command_interrupted_at_any_byte_is_taken_up_by_the_next_one(either: Server, tmp_path: Path, place: int):
    def interrupt(have: int, total: int | None) -> None:
        if have >= place:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(either.at("/file"), tmp_path / "file", SHA256, report=interrupt)
    kept = fetch.part_of(tmp_path / "file", SHA256).stat().st_size
    assert kept >= place
    assert not (tmp_path / "file").exists()
    seen: list[tuple[int, int | None]] = []
    fetch.fetch(either.at("/file"), tmp_path / "file", SHA256, report=lambda *found: seen.append(found))
    assert (tmp_path / "file").read_bytes() == CONTENT
    if kept < len(CONTENT):
        assert either.asked == [None, f"bytes={kept}-"]
        assert seen[-1] == (len(CONTENT), len(CONTENT))
        assert seen[0][0] > (kept if either.ranges else 0)


def test_a_connection_that_breaks_off_again_and_again_is_given_up_and_what_came_is_kept(server: Server, tmp_path: Path):
    server.breaks = [1000] * 20
    with pytest.raises(FileNotFoundError, match="broke off 5 times in a row; 1000 bytes are kept"):
        fetch.fetch(server.at("/file"), tmp_path / "file", SHA256)
    server.breaks = []
    assert fetch.fetch(server.at("/file"), tmp_path / "file", SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("have", [10, len(CONTENT), len(CONTENT) + 5])
def test_a_part_of_another_file_is_thrown_away(either: Server, tmp_path: Path, have: int):
    fetch.part_of(tmp_path / "file", SHA256).write_bytes(b"x" * have)
    assert fetch.fetch(either.at("/file"), tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_nothing_is_left(either: Server, tmp_path: Path):
    with pytest.raises(ValueError, match=f"has sha256 {SHA256}, but {'0' * 64} was asked for.*was removed"):
        fetch.fetch(either.at("/file"), tmp_path / "file", "0" * 64)
    assert not list(tmp_path.iterdir())


def test_more_bytes_than_the_file_has_are_refused_and_nothing_is_left(server: Server, tmp_path: Path):
    with pytest.raises(ValueError, match="gives more than the 1000 bytes that the file has"):
        fetch.fetch(server.at("/file"), tmp_path / "file", SHA256, 1000)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_fetched_again(server: Server, tmp_path: Path):
    fetch.part_of(tmp_path / "file", SHA256).write_bytes(CONTENT)
    for _ in range(2):
        fetch.fetch(server.at("/file"), tmp_path / "file", SHA256)
    assert server.asked == []


def test_without_a_network_the_error_says_what_to_do(server: Server, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is not to be had: the server answers 404"):
        fetch.fetch(server.at("/none"), tmp_path / "file", SHA256)
    with pytest.raises(FileNotFoundError, match=r"cannot be reached \(.*refused.*\): run the command where there is a net"):
        fetch.fetch("http://127.0.0.1:9/file", tmp_path / "file", SHA256)


def register(path: Path, monkeypatch: pytest.MonkeyPatch, **entry: Any) -> None:
    values = {"base_model": "me/tied", "licence": "MIT"} | entry
    path.write_text(json.dumps({"registry_version": 1, "tuners": {"mine": values}}))
    monkeypatch.setenv(registry.VARIABLE, str(path))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def saved(tmp_path: Path, server: Server) -> Path:
    folder = Tuner.for_model(TiedLM(), seed=5).save_pretrained(tmp_path / "saved")
    server.files |= {f"/t/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return folder


def test_a_tuner_of_a_users_registry_is_downloaded_once_and_then_used_by_its_name(
    server: Server, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sums = {"sha256": digest(saved / "tuner.safetensors"), "config_sha256": digest(saved / "config.json")}
    register(tmp_path / "r.json", monkeypatch, url=server.at("/t"), **sums)
    folder = download_with_progress("mine", None, None)
    assert download_with_progress("mine", None, None, visible=False) == folder
    assert len(server.asked) == 2
    server.files.clear()
    found, wanted = Tuner.from_pretrained("mine"), Tuner.from_pretrained(saved)
    for name, value in wanted.network.state_dict().items():
        assert torch.equal(value, found.network.state_dict()[name])


def test_a_tuner_whose_weights_have_another_checksum_never_takes_its_name(
    server: Server, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sums = {"sha256": "1" * 64, "config_sha256": digest(saved / "config.json")}
    register(tmp_path / "r.json", monkeypatch, url=server.at("/t"), **sums)
    with pytest.raises(ValueError, match="was removed"):
        download("mine")
    with pytest.raises(FileNotFoundError, match="is known, but not here yet"):
        Tuner.from_pretrained("mine")
    assert not list((tmp_path / "cache").rglob("*.safetensors*"))


def test_a_registry_that_pins_another_file_does_not_take_the_old_one_from_the_cache(
    server: Server, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sums = {"sha256": digest(saved / "tuner.safetensors"), "config_sha256": digest(saved / "config.json")}
    register(tmp_path / "r.json", monkeypatch, url=server.at("/t"), **sums)
    download("mine")
    register(tmp_path / "r.json", monkeypatch, url=server.at("/t"), **(sums | {"sha256": "1" * 64}))
    with pytest.raises(FileNotFoundError, match="is known, but not here yet"):
        Tuner.from_pretrained("mine")


def test_names_that_are_nowhere_and_pins_that_contradict_the_registry_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no tuner 'nowhere': it is in no registry \(l2l-tiny, .*zoft-llama"):
        download("nowhere")
    with pytest.raises(ValueError, match="sha256 is 'abc'; it must be 64"):
        download("me/tuner", sha256="abc")
    with pytest.raises(ValueError, match="the registry pins 'zoft-opt-30b' to"):
        download("zoft-opt-30b", sha256="0" * 64)


def test_a_bundled_tuner_needs_no_download():
    assert download("l2l/tiny").name == "l2l-tiny"


def test_a_published_file_is_imported_on_the_way(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shared = Path(os.environ.get("L2L_SHARED", Path(__file__).parents[3] / "shared"))
    file = shared / "tuners" / "published" / "llama1B_finetuner.pth"
    if not file.is_file():
        pytest.skip(f"no published tuner in {file.parent}")
    server.files["/llama1B.pth"] = file.read_bytes()
    register(
        tmp_path / "r.json",
        monkeypatch,
        url=server.at("/llama1B.pth"),
        sha256=digest(file),
        format="published",
        base_model="meta-llama/Llama-3.2-1B",
    )
    folder = download("mine")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "tuner.safetensors"]
    assert len(Tuner.from_pretrained("mine").fingerprint.names) == 146
    assert not list((tmp_path / "cache").rglob("*.pth"))


@pytest.mark.parametrize("last", ["..", "a b;rm.pth", "x?y=../../z", "..%2f..%2fetc", "n\\..\\x.pth", "z" * 300])
def test_the_name_of_a_downloaded_file_stays_in_its_folder(last, tmp_path, monkeypatch):
    """Kind B4 of issue 16: an address is data of others, and a part of it names a file."""
    monkeypatch.setenv("L2L_CACHE", str(tmp_path))
    seen: list[Path] = []

    def refused(url: str, target: Path, *_: Any) -> None:
        seen.append(target)
        raise FileNotFoundError("offline")

    monkeypatch.setattr(registry, "fetch", refused)
    address = f"https://example.org/{last.replace(' ', '%20')}"
    entry = registry.Entry("one", "0" * 64, "m", "MIT", format="published", url=address)
    with pytest.raises(FileNotFoundError):
        entry.obtain(lambda *_: None)
    assert seen[0].parent == tmp_path / "tuners" / "downloads"
    assert re.fullmatch(r"[\w.-]{13,100}", seen[0].name)
