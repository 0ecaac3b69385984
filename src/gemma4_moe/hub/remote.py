"""A model on the Hugging Face Hub: read in place over HTTP, with nothing kept, or downloaded into the Hub's cache."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gemma4_moe.checkpoint.config import CONFIG_NAME, LONGEST_CONFIG
from gemma4_moe.checkpoint.directory import Checkpoint, open_checkpoint
from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.checkpoint.index import INDEX_NAME, LONGEST_INDEX, is_bare_name
from gemma4_moe.checkpoint.side_files import LARGEST_SIDE_FILE, MANIFEST_NAME, PATTERNS, is_side_file
from gemma4_moe.checkpoint.storage import FULL, temporary_directory
from gemma4_moe.checkpoint.storage import refusals as disk_refusals
from gemma4_moe.errors import SourceChangedError, StorageError
from gemma4_moe.hub.requests import read_range, read_small, refusals, too_large, unreadable
from gemma4_moe.target.manifest import LONGEST_MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma4_moe.checkpoint.readers import Reader

_WEIGHTS = ".safetensors"

#: The files that a plan needs besides the headers, and the most bytes of each that are read.
_READ = {CONFIG_NAME: LONGEST_CONFIG, INDEX_NAME: LONGEST_INDEX, MANIFEST_NAME: LONGEST_MANIFEST}

#: The first piece of a file of weights that is read, in bytes: enough for most headers, so that each is one request.
_HEAD = 2**16

#: The longest listing of a model's files that is read, in bytes.
_LONGEST_LISTING = 64 * 2**20

#: Errors of the disk of the Hub's cache besides `FULL`. A connection has none of these.
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.EEXIST, errno.ENOTDIR)

#: How the Hub's client for its storage, Xet, ends the text of an error of the operating system.
_OS_ERROR = re.compile(r"\(os error (\d{1,4})\)")


class RemoteFile(SafetensorsFile):
    """A safetensors file on the Hub, at one commit: its bytes never change, but its connection can fail.

    Attributes:
        repository: The model's id.
        commit: The full hash of the commit.
    """

    def __init__(self, repository: str, commit: str, name: str, size: int | None) -> None:
        """Read the file's header.

        Args:
            repository: The model's id.
            commit: The full hash of the commit.
            name: The file's name.
            size: Its size in bytes, where the Hub lists it.

        Raises:
            InputError: The header breaks a rule of the format.
            StorageError: The Hub can't be reached, or refuses.
        """
        from huggingface_hub import hf_hub_url

        self.path = Path(_place(repository, commit)) / name
        self.repository, self.commit = repository, commit
        self._copy: SafetensorsFile | None = None
        self._url = hf_hub_url(repository, name, revision=commit)
        self._descriptor = -1
        if size is None:
            size = read_range(self._url, 0, memoryview(bytearray(1)), file=self.path)
        self._head = bytearray(min(size, _HEAD))
        self.read_into(0, memoryview(self._head))
        self._read_header(size, 0, 0)
        self._head = bytearray()

    def reader(self, *, buffered: bool = False) -> Reader:
        """Return the file itself: connections belong to the Hub's client, and a reader has nothing of its own."""
        return self if self._copy is None else self._copy.reader(buffered=buffered)

    def quickest_reader(self) -> Reader:
        """Return the file itself, or the quickest reader of its copy on this machine."""
        return self if self._copy is None else self._copy.quickest_reader()

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Read `size` bytes from `offset` on into the beginning of `buffer`, and return that part of it."""
        self.read_into(offset, buffer[:size])
        return buffer[:size]

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` with the file's bytes from `offset` on, in one request.

        Raises:
            StorageError: The Hub can't be reached, refuses, or answers with something else.
        """
        if self._copy is not None:
            self._copy.read_into(offset, destination)
        elif destination.nbytes:
            read_range(self._url, offset, destination, file=self.path)

    def check_unchanged(self) -> None:
        """Check a copy on this machine; the files of a commit never change."""
        if self._copy is not None:
            self._copy.check_unchanged()

    def close(self) -> None:
        """Close the copy on this machine, if there is one."""
        if self._copy is not None:
            self._copy.close()

    def read_from(self, path: Path) -> None:
        """Read the file from its copy on this machine from now on.

        Raises:
            SourceChangedError: The copy has another header.
            InputError, StorageError: As opening the copy raises them.
        """
        copy = SafetensorsFile(path)
        if copy.header != self.header:
            copy.close()
            raise SourceChangedError(
                "the copy in the Hub's cache is not the file on the Hub",
                file=path,
                hint="remove the file from the cache, and start again",
            )
        self.path, self.identity, self._copy = path, copy.identity, copy

    def is_cached(self) -> bool:
        """Return whether the whole file is in the Hub's cache on this machine."""
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.repository, self.path.name, revision=self.commit), str)

    def _read(self, count: int) -> bytes:
        more = bytearray(max(0, count - len(self._head)))
        self.read_into(len(self._head), memoryview(more))
        return bytes(self._head[:count] + more)


@dataclass(frozen=True, slots=True)
class _Listing:
    """The Hub's answer about a revision of a model.

    Attributes:
        commit: The full hash of the commit that the revision names.
        sizes: The size in bytes of each file of the model's own directory, or None where the Hub doesn't say.
        directories: The names of the directories in it.
    """

    commit: str
    sizes: dict[str, int | None]
    directories: set[str]


@contextmanager
def open_on_hub(repository: str, revision: str | None = None, *, headers_only: bool = False) -> Iterator[Checkpoint]:
    """Open a model on the Hub as a checkpoint whose weights stay there until `download`.

    Side files are downloaded into a temporary directory. Files that a conversion does not copy are empty there: their
    names alone tell what else the model has.

    Args:
        repository: The model's id.
        revision: Branch, tag or commit.
        headers_only: Leave side files empty too, except for those that a plan needs.

    Raises:
        InputError: There is no such model; or what `open_checkpoint` raises.
        UsageError: huggingface_hub is not installed.
        StorageError: The Hub can't be reached, or refuses.
    """
    listing = _list(repository, revision)
    commit = listing.commit
    with temporary_directory("gemma4-moe-") as temporary:
        directory = Path(temporary) / _place(repository, commit)  # so that errors name the model
        with disk_refusals("write", directory):
            directory.mkdir(parents=True)
            for name in listing.directories:
                (directory / name).mkdir()
        weights = {}
        for name, size in listing.sizes.items():
            if name.endswith(_WEIGHTS):
                weights[name] = partial(RemoteFile, repository, commit, name, size)
            else:
                content = _small_content(repository, commit, name, size, headers_only=headers_only)
                with disk_refusals("write", directory / name):
                    (directory / name).write_bytes(content)
        with open_checkpoint(directory, weights) as checkpoint:
            yield checkpoint


def _list(repository: str, revision: str | None) -> _Listing:
    """Ask the Hub for the commit and the files of a revision of a model."""
    with refusals(repository):
        from huggingface_hub import constants
    url = f"{constants.ENDPOINT}/api/models/{repository}/revision/{quote(revision or 'main', safe='')}?blobs=true"
    raw = read_small(url, _LONGEST_LISTING, file=repository, attempts=1)
    try:
        answer: Any = json.loads(raw)
        commit, files = answer["sha"], {file["rfilename"]: file.get("size") for file in answer["siblings"]}
        known = re.fullmatch("[0-9a-f]{40}", commit) and all(
            size is None or (type(size) is int and size >= 0) for size in files.values()
        )
        directories = {name.partition("/")[0] for name in files if "/" in name}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        known = None
    if not known:
        raise StorageError(
            "the Hub did not answer with a model's files",
            file=repository,
            expected="the commit, and name and size of each file",
            found=repr(raw[:100]),
            hint="check what HF_ENDPOINT names",
        )
    sizes = {name: size for name, size in files.items() if is_bare_name(name)}
    return _Listing(commit, sizes, {name for name in directories if is_bare_name(name)})


def _small_content(repository: str, commit: str, name: str, size: int | None, *, headers_only: bool) -> bytes:
    """Return the content of a file without weights, or nothing if a conversion has no use for it."""
    from huggingface_hub import hf_hub_url

    most = _READ.get(name)
    if most is None and not is_side_file(name):
        return b""
    place, largest = f"{_place(repository, commit)}/{name}", most or LARGEST_SIDE_FILE
    if size is not None and size > largest:
        raise too_large(place, largest, f"{size} bytes")
    if most is None and headers_only:
        return b""
    return read_small(hf_hub_url(repository, name, revision=commit), largest, file=place)


def _place(repository: str, commit: str) -> str:
    """Return the name of a model at a commit, for errors."""
    return f"{repository}@{commit[:12]}"


def fetch(repository: str, revision: str | None = None, *, cached_only: bool = False) -> Path:
    """Download a model into the Hub's cache, and return its directory there.

    Args:
        repository: The model's id.
        revision: Branch, tag or commit.
        cached_only: Make no request: return the directory only if the cache has the model.

    Raises:
        InputError: There is no such model or revision, or not for this token.
        UsageError: huggingface_hub is not installed.
        StorageError: The Hub can't be reached, or the disk is full.
    """
    with refusals(repository), _refusals_of_the_cache(repository):
        from huggingface_hub import snapshot_download

        place = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[f"*{_WEIGHTS}", *_READ, *PATTERNS],
            ignore_patterns=["*/*"],  # a checkpoint has no subdirectories, and a pattern's * would match a slash
            local_files_only=cached_only,
        )
    return Path(place)


@contextmanager
def _refusals_of_the_cache(repository: str) -> Iterator[None]:
    """Turn an error of the disk of the Hub's cache, in any form of the Hub's client, into a StorageError."""
    try:
        yield
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


def commit_of(checkpoint: Checkpoint) -> str | None:
    """Return the commit of a model that was opened on the Hub, or None for a directory."""
    return next((file.commit for file in checkpoint.files.values() if isinstance(file, RemoteFile)), None)


def download(checkpoint: Checkpoint, revision: str | None = None) -> None:
    """Download a model that was opened on the Hub into the Hub's cache, and read it there from now on.

    A directory stays as it is.

    Args:
        checkpoint: The model.
        revision: The branch, tag or commit with which it was opened: the cache remembers it.

    Raises:
        SourceChangedError: The revision has moved to another commit since, or the cache has another file.
        InputError, StorageError: As `fetch` raises them.
    """
    remote = [file for file in checkpoint.files.values() if isinstance(file, RemoteFile)]
    if not remote:
        return
    repository, commit = remote[0].repository, remote[0].commit
    directory = fetch(repository, revision)
    if directory.name != commit:
        raise SourceChangedError(
            "the model on the Hub changed while it was read",
            file=repository,
            expected=f"commit {commit}",
            found=f"commit {directory.name}",
            hint="start again",
        )
    for file in remote:
        file.read_from(directory / file.path.name)
    for path in checkpoint.side_files:
        with disk_refusals("write", path):
            path.unlink()
            path.symlink_to(directory / path.name)


def bytes_to_fetch(checkpoint: Checkpoint) -> int:
    """Return how many bytes of weights `fetch` would download, for a model opened on the Hub."""
    remote = [file for file in checkpoint.files.values() if isinstance(file, RemoteFile)]
    return sum(file.size for file in remote if not file.is_cached())


def cache_directory() -> Path:
    """Return the directory of the Hub's cache, which need not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()
