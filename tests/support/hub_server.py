"""A server on this machine that speaks as much of the Hub's protocol as reading a model takes, and can misbehave."""

import gzip
import json
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from support.command import run

COMMIT = "0123456789abcdef0123456789abcdef01234567"

#: Where a file is below the server's address, as huggingface_hub's `HUGGINGFACE_CO_URL_TEMPLATE` says it.
FILE_PATH = "/{repo_id}/resolve/{revision}/{filename}"


@dataclass
class Hub:
    """One model on the server, and how it misbehaves."""

    repository: str
    directory: Path
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # for a file's bytes: its name, the Range
    listings: int = 0  # requests that were not for a file
    served: Counter[str] = field(default_factory=Counter)  # the bytes of each file that were sent
    #: Each Authorization header that came.
    tokens: dict[str, set[str | None]] = field(default_factory=lambda: {"hub": set(), "cdn": set()})
    revisions: set[str] = field(default_factory=lambda: {"main", COMMIT, "refs/pr/1"})  # the commit's names
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # refusals of the next requests to the Hub
    last: int | None = None  # so many requests for files are answered before the server gives up
    gated: bool = False  # the model may be listed, but its files are refused
    sizes: bool = True  # the listing has the files' sizes
    cut: bool = False  # answers to ranges lose their last byte
    longer: int = 0  # bytes that answers have beyond the range
    broken: int = 0  # so many answers break off in the middle first
    stalled: int = 0  # so many requests get no answer for a while first
    silent: float = 0  # for so many seconds a request for a whole file of weights gets no answer, and then none at all
    whole: bool = False  # ranges are ignored
    shift: int = 0  # bytes by which the answer to a range begins late
    encodes: bool = False  # files are compressed for a client that accepts that, and ranges are of the compressed file
    others: list["Hub"] = field(default_factory=list)  # further models on the server
    url: str = ""
    cdn: str = ""  # on another port: every file is redirected there once

    @property
    def weight_requests(self):
        return [asked for name, asked in self.requests if name.endswith(".safetensors")]

    @property
    def weight_bytes(self):
        return sum(count for name, count in self.served.items() if name.endswith(".safetensors"))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the second packet of an answer waits 40 ms

    def do_HEAD(self):
        self.do_GET()

    def answer(self, status, body=b"", length=None, **headers):
        """Answer, and return whether the client took it all."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body)
            except ConnectionError:
                self.close_connection = True
                return False
        return True

    def log_message(self, *_):
        """Say nothing."""


class _HubHandler(_Handler):
    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        first = type(self).hub
        self.hub = next((hub for hub in first.others if f"/{hub.repository}/" in path), first)
        api, files = f"/api/models/{self.hub.repository}", f"/{self.hub.repository}/resolve/"
        if not path.startswith((api, files)):  # also what the client asks besides, of its own accord
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        self.hub.tokens["hub"].add(self.headers["Authorization"])
        if self.hub.answers:
            status, headers = self.hub.answers.pop(0)
            self.answer(status, **headers)
        elif path.startswith(api):
            self.hub.listings += 1
            self.listing(urlsplit(self.path).path.removeprefix(api))
        else:
            commit, _, name = path.removeprefix(files).partition("/")
            self.resolve(commit, name)

    def listing(self, rest):
        quoted = rest.removeprefix("/revision/").removeprefix("/tree/") or "main"
        revision = "" if "/" in quoted else unquote(quoted)  # its slashes are no slashes of the path
        if revision not in self.hub.revisions:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        sizes = {
            str(path.relative_to(self.hub.directory)): path.stat().st_size
            for path in sorted(self.hub.directory.rglob("*"))
            if path.is_file()
        }
        if rest.startswith("/tree/"):
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            self.answer(200, json.dumps(tree).encode())
            return
        siblings = [{"rfilename": name} | ({"size": size} if self.hub.sizes else {}) for name, size in sizes.items()]
        info = {"id": self.hub.repository, "sha": COMMIT, "siblings": siblings}
        self.answer(200, json.dumps(info).encode())

    def resolve(self, commit, name):
        if self.hub.last is not None and len(self.hub.requests) >= self.hub.last:
            self.answer(410)
        elif self.hub.gated:
            self.answer(403, X_Error_Code="GatedRepo")
        elif commit != COMMIT or not (self.hub.directory / name).is_file():
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            size = str((self.hub.directory / name).stat().st_size)
            linked = {"X_Linked_Size": size, "X_Linked_ETag": f'"{name}"', "X_Repo_Commit": COMMIT}
            self.answer(302, Location=f"{self.hub.cdn}/{name}", **linked)


class _CdnHandler(_Handler):
    def do_GET(self):
        self.hub.tokens["cdn"].add(self.headers["Authorization"])
        self.file(unquote(urlsplit(self.path).path).lstrip("/"))

    def file(self, name):
        path, asked, encoding = self.hub.directory / name, self.headers["Range"], {}
        if self.hub.encodes and "gzip" in self.headers["Accept-Encoding"]:
            path, encoding = path.with_name(f"{name}.gz"), {"Content_Encoding": "gzip"}
            path.write_bytes(gzip.compress((self.hub.directory / name).read_bytes()))
        size = path.stat().st_size
        if self.command == "HEAD":
            self.answer(200, length=size, ETag=f'"{name}"', X_Repo_Commit=COMMIT)
            return
        self.hub.requests.append((name, asked))
        if self.hub.stalled:
            self.hub.stalled -= 1
            threading.Event().wait(2)
            self.close_connection = True
            return
        if self.hub.silent and asked is None and name.endswith(".safetensors"):
            threading.Event().wait(self.hub.silent)
            self.close_connection = True
            return
        first, last = (0, size - 1) if asked is None else map(int, asked.removeprefix("bytes=").split("-"))
        if self.hub.whole:
            first, last, asked = 0, size - 1, None
        first, last = first + self.hub.shift, min(last + self.hub.shift, size - 1)
        with path.open("rb") as file:
            file.seek(first)
            part = file.read(last + 1 - first) + bytes(self.hub.longer)
        length = len(part)
        if self.hub.broken:
            self.hub.broken -= 1
            part = part[: length // 2]
            self.close_connection = True
        elif self.hub.cut and asked is not None:
            part = part[:-1]
            length -= 1
        ranged = {} if asked is None else {"Content_Range": f"bytes {first}-{last}/{size}"}
        self.hub.served[name] += len(part) * self.answer(206 if ranged else 200, part, length, **ranged, **encoding)


@contextmanager
def serving(repository, directory):
    """Serve one model until the block ends."""
    hub = Hub(repository, directory)
    with _running(hub, _HubHandler) as hub.url, _running(hub, _CdnHandler) as hub.cdn:
        yield hub


@contextmanager
def serving_too(hub, repository, directory):
    """Serve another model on the same server until the block ends."""
    other = Hub(repository, directory, url=hub.url)
    with _running(other, _CdnHandler) as other.cdn:
        hub.others.append(other)
        yield other


@contextmanager
def _running(hub, handler):
    own = type("Handler", (handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), own) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def environment(hub, home):
    """The variables with which a process has `hub` for the Hub, and its cache in `home/cache`."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home / "home"),
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_TOKEN": "hf_small",
        "TMPDIR": str(home),
    }


def start(hub, home, *arguments, **more):
    """Run the command in a process of its own, below `home`, with its variables."""
    return run(*arguments, cwd=home, **environment(hub, home) | more)
