"""A model on the Hub: read in place over HTTP, or downloaded into a cache."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gemma4_moe.checkpoint.config import CONFIG_NAME, LONGEST_CONFIG
from gemma4_moe.checkpoint.directory import Checkpoint, open_checkpoint
from gemma4_moe.checkpoint.file import FileIdentity, SafetensorsFile
from gemma4_moe.checkpoint.header import header_size, parse_header
from gemma4_moe.checkpoint.index import INDEX_NAME, LONGEST_INDEX, is_bare_name
from gemma4_moe.checkpoint.quantised.claims import MODELOPT_NAME
from gemma4_moe.checkpoint.side_files import LARGEST_SIDE_FILE, PATTERNS, is_side_file
from gemma4_moe.checkpoint.storage import FULL, temporary_directory, too_large
from gemma4_moe.checkpoint.storage import refusals as disk_refusals
from gemma4_moe.checkpoint.strict_json import is_unsigned
from gemma4_moe.checkpoint.threads import run_in_threads
from gemma4_moe.errors import SourceChangedError, StorageError
from gemma4_moe.hub.bars import bar_that_checks, bar_that_tells
from gemma4_moe.hub.requests import read_range, read_small, refusals, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WEIGHTS = ".safetensors"

#: The files that a plan needs besides the headers, and the most bytes of each that are read.
_READ = {CONFIG_NAME: LONGEST_CONFIG, INDEX_NAME: LONGEST_INDEX, MODELOPT_NAME: LONGEST_CONFIG}

#: The first piece of a file of weights that is read, in bytes: enough for most headers, so that each is one request.
_HEAD = 2**16

#: The longest listing of a model's files that is read, in bytes.
_LONGEST_LISTING = 64 * 2**20

#: Errors of the disk of the Hub's cache besides `FULL`. A connection has none of these.
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.EEXIST, errno.ENOTDIR)

#: How the Hub's client for its storage, Xet, ends the text of an error of the operating system.
_OS_ERROR = re.compile(r"\(os error (\d{1,4})\)")


class RemoteFile(SafetensorsFile):
    """A safetensors file on the Hub at one commit (a full hash). After `read_from`, its copy is read."""

    def __init__(self, repository: str, commit: str, name: str, size: int | None) -> None:
        """Read the header of a file. Its size in bytes is asked for if the Hub does not list it."""
        from huggingface_hub import hf_hub_url

        self.path = Path(_place(repository, commit)) / name
        self.repository, self.commit = repository, commit
        self._url = hf_hub_url(repository, name, revision=commit)
        self._descriptor = -1
        if size is None:
            size = read_range(self._url, 0, memoryview(bytearray(1)), file=self.path)
        raw = self._bytes(0, min(size, _HEAD))
        raw += self._bytes(len(raw), header_size(raw, size, file=self.path))
        self.header = parse_header(raw, size, file=self.path)
        self.identity = FileIdentity(size, 0, 0, self.header.digest)

    def _bytes(self, start: int, end: int) -> bytes:
        content = bytearray(max(0, end - start))
        self.read_into(start, memoryview(content))
        return bytes(content)

    def read_from(self, path: Path) -> None:
        """Read the file from its copy at `path` from now on.

        Raises:
            SourceChangedError: The copy has another header.
            InputError: The copy is no safetensors file.
        """
        header = self.header
        super().__init__(path)
        if self.header != header:
            problem = "the copy in the Hub's cache is not the file on the Hub"
            raise SourceChangedError(problem, file=path, hint="remove the file from the cache, and start again")

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` with the file's bytes from `offset` on. On the Hub, it takes one request."""
        if self._descriptor >= 0:
            super().read_into(offset, destination)
        elif destination.nbytes:
            read_range(self._url, offset, destination, file=self.path)

    def check_unchanged(self) -> None:
        """Check the copy on this machine; the files of a commit never change."""
        if self._descriptor >= 0:
            super().check_unchanged()


@contextmanager
def open_on_hub(repository: str, revision: str | None = None, *, headers_only: bool = False) -> Iterator[Checkpoint]:
    """Open a model on the Hub as a checkpoint whose weights stay there until `download`.

    Side files are downloaded into a temporary directory; if `headers_only`, only those that a plan needs. All other
    files are empty there: their names alone tell what else the model has.

    Raises:
        InputError: There is no such model; or what `open_checkpoint` raises.
    """
    commit, sizes, directories = _list(repository, revision)
    with temporary_directory("gemma4-moe-") as temporary:
        directory = Path(temporary) / _place(repository, commit)  # so that errors name the model
        with disk_refusals("write", directory):
            directory.mkdir(parents=True)
            for name in directories:
                (directory / name).mkdir()
        weights = {}
        for name, size in sizes.items():
            if name.endswith(_WEIGHTS):
                weights[name] = partial(RemoteFile, repository, commit, name, size)
            else:
                content = _small_content(repository, commit, name, size, headers_only=headers_only)
                with disk_refusals("write", directory / name):
                    (directory / name).write_bytes(content)
        with open_checkpoint(directory, weights) as checkpoint:
            yield checkpoint


def _list(repository: str, revision: str | None) -> tuple[str, dict[str, int | None], set[str]]:
    """Return a revision's commit, the sizes of the files at its top (None if not listed), and the directories there."""
    with refusals(repository):
        from huggingface_hub import constants
    url = f"{constants.ENDPOINT}/api/models/{repository}/revision/{quote(revision or 'main', safe='')}?blobs=true"
    raw = read_small(url, _LONGEST_LISTING, file=repository, attempts=1)
    try:
        answer: Any = json.loads(raw)
        commit, files = answer["sha"], {file["rfilename"]: file.get("size") for file in answer["siblings"]}
        sizes = {name: size for name, size in files.items() if is_bare_name(name)}
        directories = {name.partition("/")[0] for name in files if "/" in name}
        if re.fullmatch("[0-9a-f]{40}", commit) and all(size is None or is_unsigned(size) for size in sizes.values()):
            return commit, sizes, set(filter(is_bare_name, directories))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    raise StorageError(
        "the Hub did not answer with a model's files",
        file=repository,
        expected="the commit, and name and size of each file",
        found=repr(raw[:100]),
        hint="check what HF_ENDPOINT names",
    )


def _small_content(repository: str, commit: str, name: str, size: int | None, *, headers_only: bool) -> bytes:
    """Return the content of a file without weights, or nothing if it is of no use."""
    from huggingface_hub import hf_hub_url

    if name not in _READ and not is_side_file(name):
        return b""
    place, largest = f"{_place(repository, commit)}/{name}", _READ.get(name, LARGEST_SIDE_FILE)
    if size is not None and size > largest:
        raise too_large(place, largest, f"{size} bytes")
    if name not in _READ and headers_only:
        return b""
    return read_small(hf_hub_url(repository, name, revision=commit), largest, file=place)


def _place(repository: str, commit: str) -> str:
    """Return the name of a model at a commit, for errors."""
    return f"{repository}@{commit[:12]}"


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    cached_only: bool = False,
    told: Callable[[int], object] | None = None,
) -> Path:
    """Download a model into the Hub's cache, and return its directory there.

    If `cached_only`, no request is made: the cache must have the model. `told` is called with the bytes of each piece
    that has come, in place of the bars of the Hub's client.

    Raises:
        InputError: There is no such model or revision, or not for this token.
        StorageError: Also if the disk refuses.
    """
    with refusals(repository):
        from huggingface_hub import snapshot_download

        places = []

        def work(check: Callable[[], None]) -> None:
            place = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[f"*{_WEIGHTS}", *_READ, *PATTERNS],
                ignore_patterns=["*/*"],  # a checkpoint has no subdirectories, and a pattern's * would match a slash
                local_files_only=cached_only,
                tqdm_class=bar_that_checks(check) if told is None else bar_that_tells(told, check),
            )
            places.append(Path(place))

        try:
            run_in_threads(1, work)  # an interrupt of the client itself waits for all files that it has begun
        except (OSError, RuntimeError) as error:  # RuntimeError: any failure of the client for Xet
            said = _OS_ERROR.search(str(error))
            code = int(said[1]) if said else getattr(error, "errno", None)
            if code in FULL + _NO_PLACE:
                raise StorageError(
                    f"can't bring the model into the Hub's cache: {os.strerror(code)}",
                    file=cache_directory(),
                    hint="free some space, let HF_HOME name a directory on another disk, or convert with --stream"
                    if code in FULL
                    else "check the directory and its permissions, or let HF_HOME name another one",
                ) from error
            if isinstance(error, OSError):
                raise
            raise unreadable(repository, error) from error
    return places[0]


def _remote_files(checkpoint: Checkpoint) -> list[RemoteFile]:
    return [file for file in checkpoint.files.values() if isinstance(file, RemoteFile)]


def commit_of(checkpoint: Checkpoint) -> str | None:
    """Return the commit of a model opened on the Hub, or None for a directory."""
    return next((file.commit for file in _remote_files(checkpoint)), None)


def download(checkpoint: Checkpoint, revision: str | None = None, told: Callable[[int], object] | None = None) -> None:
    """Download a model opened on the Hub into its cache, and read the copy from now on.

    A directory stays as it is. The cache remembers `revision`, with which the model was opened. For `told` see `fetch`.

    Raises:
        SourceChangedError: The revision has moved to another commit since, or the cache has another file.
        InputError, StorageError: As `fetch` raises them.
    """
    remote = _remote_files(checkpoint)
    if not remote:
        return
    repository, commit = remote[0].repository, remote[0].commit
    directory = fetch(repository, revision, told=told)
    if directory.name != commit:
        problem, found = "the model on the Hub changed while it was read", f"commit {directory.name}"
        raise SourceChangedError(problem, file=repository, expected=f"commit {commit}", found=found, hint="start again")
    for file in remote:
        file.read_from(directory / file.path.name)
    for path in checkpoint.side_files:
        with disk_refusals("write", path):
            path.unlink()
            path.symlink_to(directory / path.name)


def bytes_to_fetch(checkpoint: Checkpoint) -> int:
    """Return how many bytes of weights `download` would bring into the Hub's cache."""
    remote = _remote_files(checkpoint)
    if not remote:
        return 0
    from huggingface_hub import try_to_load_from_cache

    places = [try_to_load_from_cache(file.repository, file.path.name, revision=file.commit) for file in remote]
    return sum(file.size for file, place in zip(remote, places, strict=True) if not isinstance(place, str))


def cache_directory() -> Path:
    """Return the directory of the Hub's cache, which need not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()
