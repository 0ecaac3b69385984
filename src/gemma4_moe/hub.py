"""A model on the Hugging Face Hub read in place: ranges of its files over HTTP, and nothing kept in the Hub's cache."""

from __future__ import annotations

import importlib
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoints.directories import Checkpoint, open_checkpoint
from gemma4_moe.checkpoints.files import SafetensorsFile
from gemma4_moe.checkpoints.index import INDEX_NAME
from gemma4_moe.checkpoints.side_files import LARGEST_SIDE_FILE, is_side_file
from gemma4_moe.errors import CheckpointFormatError, InputError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma4_moe.checkpoints.direct_io import Reader

_PARTIAL_CONTENT = 206


class RemoteFile(SafetensorsFile):
    """A safetensors file on the Hub, at one commit. Its bytes can't change, but the connection can fail."""

    def __init__(self, repository: str, commit: str, name: str, size: int) -> None:
        """Read the file's header.

        Args:
            repository: The model's id.
            commit: The full hash of the commit.
            name: The file's name.
            size: Its size in bytes, as the Hub lists it.

        Raises:
            InputError: The header breaks a rule of the format.
            StorageError: The Hub can't be reached, or refuses.
        """
        from huggingface_hub import hf_hub_url

        self.path = Path(f"{repository}@{commit[:12]}") / name
        self._url = hf_hub_url(repository, name, revision=commit)
        self._descriptor = -1
        self._read_header(size, 0, 0)

    def reader(self, *, buffered: bool = False) -> Reader:  # noqa: ARG002 - there is no page cache between
        """Return what reads ranges of the file."""
        return _RemoteReader(self)

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` with the file's bytes from `offset` on, in one request.

        Raises:
            StorageError: The Hub can't be reached, refuses, or answers with something else.
        """
        if not destination.nbytes:
            return
        last = offset + destination.nbytes - 1
        response = _get(self._url, self.path, {"Range": f"bytes={offset}-{last}"})
        content: bytes = response.content
        if response.status_code != _PARTIAL_CONTENT or len(content) != destination.nbytes:
            raise StorageError(
                "the Hub did not answer with the range that was asked for",
                file=self.path,
                expected=f"status {_PARTIAL_CONTENT} and {destination.nbytes} bytes from byte {offset} on",
                found=f"status {response.status_code} and {len(content)} bytes",
                hint="try again; --resume goes on where this run has ended",
            )
        destination.cast("B")[:] = content

    def check_unchanged(self) -> None:
        """Return: what a commit names never changes."""


class _RemoteReader:
    def __init__(self, file: RemoteFile) -> None:
        self._file = file

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        self._file.read_into(offset, buffer[:size])
        return buffer[:size]

    def close(self) -> None:
        """There is nothing to give back: connections belong to the Hub's client."""


@contextmanager
def open_on_hub(repository: str, revision: str | None = None) -> Iterator[tuple[Checkpoint, str]]:
    """Open a model on the Hub as a checkpoint whose weights stay there, and give it with its commit.

    Only what stands beside the weights is fetched, into a temporary directory.

    Args:
        repository: The model's id.
        revision: Branch, tag or commit.

    Raises:
        InputError: There is no such model; or what `open_checkpoint` raises.
        UsageError: huggingface_hub is not installed.
        StorageError: The Hub can't be reached, or refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UsageError("a model on the Hub needs huggingface_hub", hint="pip install 'gemma4-moe[hub]'") from error
    with _refusals(repository):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or [] if "/" not in file.rfilename}
    commit = str(info.sha)
    with tempfile.TemporaryDirectory(prefix="gemma4-moe-") as name:
        directory = Path(name)
        for file, size in sizes.items():
            if is_side_file(file) or file == INDEX_NAME:
                _fetch(repository, commit, file, size, directory)
        weights = {
            file: partial(RemoteFile, repository, commit, file, size or 0)
            for file, size in sizes.items()
            if file.endswith(".safetensors")
        }
        with open_checkpoint(directory, weights) as checkpoint:
            yield checkpoint, commit


def _fetch(repository: str, commit: str, name: str, size: int | None, directory: Path) -> None:
    """Fetch a small file whole."""
    from huggingface_hub import hf_hub_url

    if size is None or size > LARGEST_SIDE_FILE:
        raise CheckpointFormatError(
            "a side file that is far larger than such a file can be",
            file=f"{repository}/{name}",
            expected=f"at most {LARGEST_SIDE_FILE} bytes",
            found=f"{size} bytes",
        )
    content = _get(hf_hub_url(repository, name, revision=commit), name, {}).content
    (directory / name).write_bytes(content)


def _get(url: str, file: object, headers: dict[str, str]) -> Any:
    """Make one request, again and again for a while where the Hub is busy or the connection fails."""
    from huggingface_hub import utils

    client: Any = utils
    with _refusals(file):
        response = client.http_backoff("GET", url, headers=client.build_hf_headers() | headers, follow_redirects=True)
        client.hf_raise_for_status(response)
    return response


@contextmanager
def _refusals(file: object) -> Iterator[None]:
    """Turn what the Hub's client raises into this package's errors."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    # The client's HTTP library has changed its name before; the client itself knows which one it is.
    session = huggingface_hub.get_session()
    http = importlib.import_module(type(session).__module__.partition(".")[0])
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(
            "no such model or revision on the Hub that this token may read",
            file=file,
            hint="check the name; a gated model needs `hf auth login`",
        ) from error
    except (http.HTTPError, OSError) as error:
        raise StorageError(
            f"the Hub can't be read: {str(error).splitlines()[0]}",
            file=file,
            hint="check the connection, and try again",
        ) from error
