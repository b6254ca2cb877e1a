"""A headless Chromium that looks at one file, steered over a pipe by its DevTools protocol; no package is needed.

Source: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "google-chrome")
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage --hide-scrollbars
--remote-debugging-pipe""".split()
OPTIONS.append("--host-resolver-rules=MAP * ~NOTFOUND")
SECONDS = 60  # a first start on a busy machine


class Browser:
    """`with Browser(tmp_path) as browser: browser.open(file, width=400)`: one page, in a profile of its own, offline.

    Attributes:
        requests: addresses that were asked for since `open`, other than the file itself and data within it.
        complaints: what the console, the log and uncaught errors said since `open`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "browser"
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._number, self._read, self._session = 0, b"", ""

    def __enter__(self) -> Browser:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        assert program, "there is no Chromium: `make test` installs it where it may; else apt-get install chromium"
        mine, theirs = os.pipe(), os.pipe()  # it reads from descriptor 3, and writes to 4
        self._to, self._from = mine[1], theirs[0]
        words = [program, *OPTIONS, f"--user-data-dir={self.folder}"]
        # Through a shell, which puts the two ends where they belong without code between fork and exec.
        steps = f'exec "$@" 3<&{mine[0]} 4>&{theirs[1]}'
        self._log = (self.folder.parent / "browser.log").open("w")
        self.process = subprocess.Popen(
            ["bash", "-c", steps, "bash", *words, "about:blank"],
            pass_fds=(mine[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        os.close(mine[0])
        os.close(theirs[1])
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        nothing: dict[str, Any] = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.call("Network.emulateNetworkConditions", offline=True, **nothing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._to)  # at which it ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._from)
        self._log.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have it do something; what it answers.

        Raises:
            AssertionError: it refused, or did not answer.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Load a file into a window of that size, and wait until all of it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.requests, self.complaints = [], []
        self.call("Page.navigate", url=file.absolute().as_uri())
        deadline = time.monotonic() + SECONDS
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < deadline, f"{file} was not loaded"
            time.sleep(0.05)
        self.evaluate("Promise.all([...document.images].map(image => image.decode())).then(() => true)")

    def evaluate(self, script: str) -> Any:
        """A JavaScript expression's value, its promise awaited; it is the browser's own, no policy of the page's holds
        for it."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> bytes:
        """The whole page as PNG, which is also written to `file`."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        content = base64.b64decode(answer["data"])
        file.write_bytes(content)
        return content

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], max(0, deadline - time.monotonic()))
            more = os.read(self._from, 1 << 20) if ready else b""
            assert more, f"Chromium {'said nothing' if not ready else 'ended'}; its words: {self._words()}"
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        method, details = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent" and not details["request"]["url"].startswith(("data:", "file:")):
            self.requests.append(details["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(details["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(details["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(f"{details['entry']['level']}: {details['entry']['text']}")

    def _words(self) -> str:
        return (self.folder.parent / "browser.log").read_text(errors="replace")[-1000:]
