"""Opens a page in headless Chromium: what it says on the console, what it asks of a network, and how it looks.

    python benchmarks/browser.py report.html --out docs/images/report

writes report-desktop.png, report-phone.png and report-dark.png. It fails where there is a console error, a request to a
network, a page wider than its window, or a large screenshot. Chromium is driven over a pipe by its DevTools protocol, so
nothing but the browser is needed (Debian: chromium-headless-shell).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""Commands under which a Chromium may be installed."""
VIEWS = {"desktop": (1280, 900, False), "phone": (390, 844, False), "dark": (1280, 900, True)}
"""Name -> width and height in CSS pixels, and whether the page is to be dark."""
LIMIT = 300_000
"""Most bytes of a screenshot."""


def chromium() -> str | None:
    """The command of an installed Chromium."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A page of headless Chromium; a context manager."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        """Of the console, and exceptions of scripts."""
        self.requests: list[str] = []
        """Addresses that were asked for, data: and file: ones included."""
        self._count = 0
        self._buffer = b""
        self._loaded = False

    def __enter__(self) -> Browser:
        command = chromium()
        assert command is not None, "no Chromium is installed"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self._out = os.pipe()
        self._in, ours = os.pipe()

        def place() -> None:  # the pipes are file descriptors 3 and 4 of the browser
            low, high = os.dup(theirs), os.dup(ours)
            os.dup2(low, 3)
            os.dup2(high, 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--disable-background-networking"]
        options += [f"--user-data-dir={self._profile.name}", "--hide-scrollbars", "--disable-component-update"]
        self._process = subprocess.Popen(
            [command, *options], preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(ours)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._out)
        self._process.terminate()
        self._process.wait()
        os.close(self._in)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False) -> None:
        """Load a file in a window of that size."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.call("Emulation.setDeviceMetricsOverride", **sizes)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._note(self._read())

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, such as Tab or Enter."""
        codes = {"Tab": 9, "Enter": 13, "Space": 32}
        text = {"Enter": "\r"}.get(key)
        down: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]} | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=codes[key])

    def screenshot(self, target: Path, most: int) -> None:
        """The page from its top, at most so many pixels of it, as PNG."""
        width, height = self.value("document.documentElement.clientWidth"), self.value("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, most), "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(base64.b64decode(found["data"]))


def main() -> int:
    """Look at a page in each of :data:`VIEWS`; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="screenshots take this name, with the view behind it")
    parser.add_argument("--most", type=int, default=4000, help="most pixels of the page's height")
    given = parser.parse_args()
    bad = 0
    with Browser() as browser:
        for view, (width, height, dark) in VIEWS.items():
            browser.open(given.page, width, height, dark, touch=view == "phone")
            target = given.out.with_name(f"{given.out.name}-{view}.png")
            browser.screenshot(target, given.most)
            size, wide = target.stat().st_size, browser.value("document.documentElement.scrollWidth")
            bad += (size > LIMIT) + (wide > width)
            print(f"{target}: {size:,} bytes; page {wide} of {width} pixels wide")
        outside = [url for url in browser.requests if not url.startswith(("file:", "data:"))]
        print(
            f"console errors: {len(browser.errors)}; requests: {len(browser.requests)}, of which to a network: {len(outside)}"
        )
        for line in (*browser.errors, *outside):
            print(f"  {line}")
        return int(bool(bad or browser.errors or outside))


if __name__ == "__main__":
    sys.exit(main())
