"""A server on this machine that speaks as much of the Hub's protocol as reading a model takes, and can misbehave."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One model on the server.

    Attributes:
        repository: Its id.
        directory: Its files.
        requests: Each request for a file: its name and its Range header.
        busy: How many requests are answered with 503 first.
        cut: Answers to ranges lose their last byte.
        redirect: Files are redirected once, as to a CDN.
        url: Where the server is.
    """

    repository: str
    directory: Path
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    busy: int = 0
    cut: bool = False
    redirect: bool = True
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{self.hub.repository}"):
            revision = path.removeprefix(f"/api/models/{self.hub.repository}").removeprefix("/revision/")
            self.model_info(revision)
        elif path.startswith(f"/{self.hub.repository}/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            if self.hub.redirect:
                self.answer(302, b"", Location=f"/cdn/{name}")
            else:
                self.file(name)
        elif path.startswith("/cdn/"):
            self.file(path.rpartition("/")[2])
        else:
            self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})

    def model_info(self, revision: str) -> None:
        if revision not in ("", "main", COMMIT):
            self.answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in self.hub.directory.iterdir()]
        siblings.append({"rfilename": "onnx/model.safetensors", "size": 3})
        info = {"id": self.hub.repository, "sha": COMMIT, "siblings": siblings}
        self.answer(200, json.dumps(info).encode())

    def file(self, name: str) -> None:
        asked = self.headers["Range"]
        self.hub.requests.append((name, asked))
        if self.hub.busy:
            self.hub.busy -= 1
            self.answer(503, b"")
            return
        content = (self.hub.directory / name).read_bytes()
        if asked is None:
            self.answer(200, content)
            return
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.answer(206, part[:-1] if self.hub.cut else part)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(repository: str, directory: Path) -> Iterator[Hub]:
    """Serve one model until the block ends."""
    hub = Hub(repository, directory)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
