"""Requests to the Hugging Face Hub: ranges of files and whole small ones, with this package's errors.

An answer is taken as it comes and never beyond what was asked for, so that no server can fill the memory. Where the Hub
is busy or the connection breaks off, the request is made again for a while; where nothing comes, it ends in time.
"""

from __future__ import annotations

import importlib
import itertools
import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemma4_moe.errors import CheckpointFormatError, Gemma4MoEError, InputError, StorageError, UsageError
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PARTIAL_CONTENT = 206
_REFUSED = (401, 403)

#: Statuses of a server that may answer in a moment. Those after which nothing changes, 401 and 404 say, are not here.
_BUSY = (408, 429, 500, 502, 503, 504)

#: How often a request is made whose answer breaks off.
_ATTEMPTS = 4

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")

_LOG_IN = "check the name; a private or gated model needs `hf auth login`"


class _BrokenOffError(Exception):
    """The connection has failed while an answer came."""


def read_range(url: str, offset: int, destination: memoryview, *, file: object) -> int:
    """Fill `destination` with the bytes of a file from `offset` on, and return the size of the whole file in bytes.

    Raises:
        InputError: There is no such file, or not for this token.
        StorageError: The Hub can't be reached, refuses, or answers with something else.
    """
    wanted = destination.cast("B")
    first, last = offset, offset + wanted.nbytes - 1
    size = 0

    def take(response: Any) -> None:
        nonlocal size
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        count = 0
        if response.status_code == _PARTIAL_CONTENT and found and (int(found[1]), int(found[2])) == (first, last):
            for chunk in response.iter_bytes():
                if count + len(chunk) <= wanted.nbytes:
                    wanted[count : count + len(chunk)] = chunk
                count += len(chunk)
            size = int(found[3])
        if count != wanted.nbytes:
            raise StorageError(
                "the Hub did not answer with the range that was asked for",
                file=file,
                expected=f"status {_PARTIAL_CONTENT} and bytes {first}-{last}",
                found=f"status {response.status_code}, {found[0] if found else 'no range'}, and {count} bytes",
                hint="try again; --resume goes on where this run has ended",
            )

    # An encoding would make another range of it.
    _receive(url, {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}, take, file=file)
    return size


def read_small(url: str, most: int, *, file: object, patient: bool = True) -> bytes:
    """Return a whole file of at most `most` bytes.

    Args:
        url: Where it is.
        most: Its largest size in bytes.
        file: What it is called in errors.
        patient: Try again where no connection comes about.

    Raises:
        CheckpointFormatError: It is larger.
        InputError: There is no such file, or not for this token.
        StorageError: The Hub can't be reached, or refuses.
    """
    content = bytearray()

    def take(response: Any) -> None:
        content.clear()
        for chunk in response.iter_bytes():
            content.extend(chunk)
            if len(content) > most:
                raise too_large(file, most, f"more than {most} bytes")

    _receive(url, {}, take, file=file, patient=patient)
    return bytes(content)


def too_large(file: object, most: int, found: str) -> CheckpointFormatError:
    """Return the error for a file beside the weights that has more than `most` bytes."""
    return CheckpointFormatError(
        "a file that is far larger than such a file can be", file=file, expected=f"at most {most} bytes", found=found
    )


def _receive(
    url: str, headers: dict[str, str], take: Callable[[Any], None], *, file: object, patient: bool = True
) -> None:
    """Make a request and let `take` have its answer, from the beginning where an earlier one has broken off."""
    from huggingface_hub import constants, utils

    client: Any = utils
    options: dict[str, Any] = {} if patient else {"retry_on_exceptions": ()}
    for failures in itertools.count(1):
        answering = client.http_stream_backoff(
            "GET",
            url,
            headers=client.build_hf_headers(library_name="gemma4-moe", library_version=__version__) | headers,
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_status_codes=_BUSY,
            **options,
        )
        try:
            with refusals(file), answering as response, _noticing_a_break():
                client.hf_raise_for_status(response)
                take(response)
            return
        except _BrokenOffError as error:
            if failures == _ATTEMPTS:
                raise unreadable(file, error) from error
            time.sleep(failures)


def _http() -> Any:
    """Return the client's HTTP library: its name has changed before, and the client's own errors know it."""
    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


@contextmanager
def _noticing_a_break() -> Iterator[None]:
    """Keep a failure within an answer from the client's own retries, which know only answers that don't begin."""
    try:
        yield
    except _http().TransportError as error:
        raise _BrokenOffError(_first_line(error)) from error


@contextmanager
def refusals(file: object) -> Iterator[None]:
    """Turn what the Hub's client raises into this package's errors.

    Raises:
        UsageError: huggingface_hub is not installed.
        InputError: There is no such model or revision, or not for this token.
        StorageError: The Hub can't be reached, or refuses; or the disk does.
    """
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise UsageError(
            "no such directory, and a model on the Hub needs huggingface_hub",
            file=file,
            hint="check the path, or: pip install 'gemma4-moe[hub]'",
        ) from error
    try:
        yield
    except Gemma4MoEError:
        raise
    except errors.RevisionNotFoundError as error:
        hint = "check --revision: a branch, a tag, or a whole commit hash"
        raise InputError("no such revision of the model on the Hub", file=file, hint=hint) from error
    except errors.GatedRepoError as error:
        hint = "ask for access on the model's page, and `hf auth login` with a token that has it"
        raise InputError("a gated model, which this token may not read", file=file, hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        problem = "no such directory, and no such model on the Hub that this token may read"
        raise InputError(problem, file=file, hint=_LOG_IN) from error
    except errors.OfflineModeIsEnabled as error:
        hint = "unset HF_HUB_OFFLINE; without --stream, a model in the Hub's cache needs no connection"
        raise StorageError("the Hub may not be asked: HF_HUB_OFFLINE is set", file=file, hint=hint) from error
    except errors.LocalEntryNotFoundError as error:
        raise StorageError(
            "no such directory, and the Hub can't be reached",
            file=file,
            hint="check the path or the connection; with HF_HUB_OFFLINE, the model must be in the cache",
        ) from error
    except (_http().HTTPError, OSError) as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in _REFUSED:
            problem = f"the Hub refuses this token: status {response.status_code}"
            raise StorageError(problem, file=file, hint="`hf auth login` with a token that may read it") from error
        raise unreadable(file, error) from error


def unreadable(file: object, error: BaseException) -> StorageError:
    """Return the error for a connection that fails, or for an answer that makes no sense."""
    problem = f"the Hub can't be read: {_first_line(error)}"
    return StorageError(problem, file=file, hint="check the connection, and try again")


def _first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing. Signatures of URLs stay out."""
    line = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    return re.sub(r"\?[^\s'\"]+", "?…", line)
