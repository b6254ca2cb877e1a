"""A web site on this machine, for tests of what is downloaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


class Site(HTTPServer):
    """A web site that holds `archive`, or nothing where that is None, and remembers who asked."""

    archive: bytes | None
    asked: list[str]


class Page(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.archive is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.archive)))
        self.end_headers()
        self.wfile.write(self.server.archive)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(archive: bytes) -> Iterator[Site]:
    """A site that runs as long as this is entered. Over HTTP: torchvision cannot fetch file:// addresses."""
    with Site(("127.0.0.1", 0), Page) as site:
        site.archive, site.asked = archive, []
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            site.shutdown()
            thread.join()  # tests that fork come later
