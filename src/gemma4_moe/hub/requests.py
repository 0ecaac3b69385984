"""Requests to the Hugging Face Hub: ranges of files, and whole small files.

The connection, the token, redirects, and the retries for a busy server are the work of huggingface_hub. Here an answer
is read as it comes and never beyond the bytes that were asked for, so that no server can fill the memory. A connection
that breaks off is made again, a few times.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from gemma4_moe.checkpoint.storage import too_large
from gemma4_moe.errors import Gemma4MoEError, InputError, StorageError, UsageError
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")

#: How many times a request is made whose connection fails, and the longest pause before the next time, in seconds.
_ATTEMPTS = 6
_LONGEST_PAUSE = 8


class HubUnreachableError(StorageError):
    """The Hub could not be asked, or gave no answer with sense."""


class HubNotAskedError(HubUnreachableError):
    """Nothing of a model is known: it is not in the cache, and the Hub may not or can't be asked."""


_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def read_range(url: str, offset: int, destination: memoryview, *, file: object) -> int:
    """Fill `destination` with a file's bytes from `offset` on, and return the file's size.

    Raises:
        InputError: There is no such file, or not for this token.
        StorageError: Also if the Hub answers with another range.
    """
    wanted = destination.cast("B")
    first, last = offset, offset + wanted.nbytes - 1

    def take(response: Any) -> int:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        count = 0
        if found and (int(found[1]), int(found[2])) == (first, last):
            for chunk in response.iter_bytes():
                count += len(chunk)
                if count > wanted.nbytes:
                    break
                wanted[count - len(chunk) : count] = chunk
            if count == wanted.nbytes:
                return int(found[3])
        raise StorageError(
            "the Hub did not answer with the range that was asked for",
            file=file,
            expected=f"status 206 and bytes {first}-{last}",
            found=f"status {response.status_code}, {found[0] if found else 'no range'}, and {count} bytes",
            hint="start again; convert goes on from where it has ended if you give --resume",
        )

    return _receive(url, take, file=file, range=f"bytes={first}-{last}")


def read_small(url: str, most: int, *, file: object, attempts: int = _ATTEMPTS) -> bytes:
    """Return a whole file of at most `most` bytes. A connection that fails is made `attempts` times.

    Raises:
        CheckpointFormatError: It is larger.
        InputError: There is no such file, or not for this token.
    """

    def take(response: Any) -> bytes:
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > most:
                raise too_large(file, most, f"more than {most} bytes")
        return bytes(content)

    return _receive(url, take, file=file, attempts=attempts)


def _receive(url: str, take: Callable[[Any], _T], *, file: object, attempts: int = _ATTEMPTS, **headers: str) -> _T:
    """Return the result of `take` on the answer to a request. After a failure, it gets the whole next answer."""
    with refusals(file):
        from huggingface_hub import constants, utils

        client: Any = utils
        headers |= client.build_hf_headers(library_name="gemma4-moe", library_version=__version__)
        headers["accept-encoding"] = "identity"  # a range of an encoded file would be another one
        options = {"headers": headers, "follow_redirects": True, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
        options["retry_on_exceptions"] = ()  # the client's own retries break where a connection fails within an answer
        failures = 0
        while True:
            try:
                with client.http_stream_backoff("GET", url, **options) as response:
                    client.hf_raise_for_status(response)
                    return take(response)
            except client.httpx.TransportError:
                failures += 1
                if failures == attempts:
                    raise
            time.sleep(min(2 ** (failures - 1), _LONGEST_PAUSE))


@contextmanager
def refusals(file: object) -> Iterator[None]:
    """Turn the errors of the Hub's client, and its absence, into this package's."""
    try:
        from huggingface_hub import errors, utils
    except ImportError as error:
        problem = "no such directory, and a model on the Hub needs huggingface_hub"
        hint = "check the path, or: pip install 'gemma4-moe[hub]'"
        raise UsageError(problem, file=file, hint=hint) from error
    client: Any = utils
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
        hint = "check the name; a private or gated model needs `hf auth login`"
        raise InputError(problem, file=file, hint=hint) from error
    except errors.OfflineModeIsEnabled as error:
        hint = "unset HF_HUB_OFFLINE; without --stream, a model in the Hub's cache needs no connection"
        raise HubNotAskedError("the Hub may not be asked: HF_HUB_OFFLINE is set", file=file, hint=hint) from error
    except errors.LocalEntryNotFoundError as error:
        hint = "check the path or the connection; with HF_HUB_OFFLINE, the model must be in the cache"
        raise HubNotAskedError("no such directory, and the Hub can't be reached", file=file, hint=hint) from error
    except (client.httpx.HTTPError, OSError) as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            problem = f"the Hub refuses this token: status {response.status_code}"
            raise StorageError(problem, file=file, hint="`hf auth login` with a token that may read it") from error
        raise unreadable(file, error) from error


def unreadable(file: object, error: BaseException) -> StorageError:
    """Return the error for a connection that fails, or an answer without sense.

    It has the first line of `error`, or its kind if it says nothing. Signatures of URLs stay out.
    """
    line = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    problem = "the Hub can't be read: " + re.sub(r"\?[^\s'\"]+", "?…", line)
    return HubUnreachableError(problem, file=file, hint="check the connection, and try again")
