"""A source by its path or Hub id: a directory, or a model on the Hub."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from gemma4_moe.checkpoint.directory import Checkpoint, open_checkpoint
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.errors import InputError, StorageError, UsageError
from gemma4_moe.hub.remote import fetch, open_on_hub
from gemma4_moe.hub.requests import HubNotAskedError, HubUnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART = r"[A-Za-z0-9]([\w.-]{0,94}\w)?"
_HUB_ID = re.compile(rf"(?!.*(--|\.\.|\.git$)){_PART}/{_PART}", re.ASCII)


@contextmanager
def open_source(source: str | Path, revision: str | None = None, *, stream: bool = False) -> Iterator[Checkpoint]:
    """Open a source. The weights of a model on the Hub stay there until `download`.

    If the Hub can't be reached, or refuses, the model is read from the Hub's cache, except for a stream.

    Args:
        source: A path, or a Hub id. A directory of that name comes first.
        revision: Branch, tag or commit on the Hub.
        stream: Whether nothing will be downloaded into the Hub's cache.

    Raises:
        UsageError, InputError, StorageError: As `locate`, `open_checkpoint` and `open_on_hub` raise them.
    """
    with ExitStack() as stack:
        if is_hub_id(source):
            try:
                checkpoint = stack.enter_context(open_on_hub(source, revision, headers_only=not stream))
            except (InputError, StorageError) as error:
                cached = None
                with suppress(StorageError):
                    cached = None if stream else fetch(source, revision, cached_only=True)
                if cached is None:
                    if isinstance(error, HubUnreachableError) and not stream:
                        raise _no_directory(source, error) from error
                    raise
                checkpoint = stack.enter_context(open_checkpoint(cached))
        else:
            checkpoint = stack.enter_context(open_checkpoint(locate(source, revision)))
        yield checkpoint


def is_hub_id(source: object) -> TypeGuard[str]:
    """Return whether a source is a Hub id, and no path on this machine."""
    if not isinstance(source, str) or not looks_like_hub_id(source):
        return False
    with refusals("look at the path", source):
        return not Path(source).exists()


def looks_like_hub_id(name: str) -> bool:
    """Return whether a model on the Hub can have such a name."""
    return _HUB_ID.fullmatch(name) is not None


def _no_directory(source: str, error: HubUnreachableError) -> StorageError:
    """Return the error for a name that is no directory, and may be a model on a Hub that gave no answer."""
    hint = f"check the path; or, if it is a model on the Hub: {error.problem}: {error.hint}"
    return StorageError("no such directory", file=source, hint=hint)


def check_streamed(source: str | Path, *others: str | Path | None) -> None:
    """Raise a UsageError if none of the checkpoints is on the Hub: nothing else can be streamed."""
    if not any(map(is_hub_id, (source, *others))):
        raise UsageError("only a model on the Hub can be streamed", file=source, hint="leave --stream out")


def locate(source: str | Path, revision: str | None = None) -> Path:
    """Return the directory of a source. A model on the Hub is downloaded into the Hub's cache first.

    Args:
        source: A path, or a Hub id such as google/gemma-4-26B-A4B. A directory of that name comes first.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: There is no such directory or model.
        UsageError: A revision of a directory.
    """
    if is_hub_id(source):
        try:
            return fetch(source, revision)
        except HubNotAskedError as error:
            raise _no_directory(source, error) from error
    path = expanded(source)
    if revision is not None:
        raise UsageError("a directory has no revision", file=path, found=revision, hint="leave --revision out")
    return path
