"""A source by its path or Hub id: a directory, or a model on the Hugging Face Hub, downloaded or read in place."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from gemma4_moe.checkpoint.directory import Checkpoint, open_checkpoint
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.errors import InputError, StorageError, UsageError
from gemma4_moe.hub.remote import fetch, open_on_hub

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART = r"[A-Za-z0-9]([\w.-]{0,94}\w)?"
_HUB_ID = re.compile(rf"(?!.*(--|\.\.|\.git$)){_PART}/{_PART}", re.ASCII)


@contextmanager
def open_source(
    source: str | Path, revision: str | None = None, *, stream: bool = False
) -> Iterator[tuple[Checkpoint, str | None]]:
    """Open a source, and yield it with its commit, or None if its files are on this machine.

    Args:
        source: A path, or a Hub id. A directory of that name comes first.
        revision: Branch, tag or commit on the Hub.
        stream: Read the weights of a model on the Hub in place. Without it they are downloaded into the cache first.

    Raises:
        UsageError, InputError, StorageError: As `locate`, `open_checkpoint` and `open_on_hub` raise them.
    """
    if stream and is_hub_id(source):
        with open_on_hub(source, revision) as (checkpoint, commit):
            yield checkpoint, commit
    else:
        with open_checkpoint(locate(source, revision)) as checkpoint:
            yield checkpoint, None


@contextmanager
def open_headers(source: str | Path, revision: str | None = None) -> Iterator[Checkpoint]:
    """Open a source for its headers alone: of a model on the Hub, no weights are downloaded.

    If the Hub can't be reached, or refuses, the model is read from the Hub's cache.

    Args:
        source: A path, or a Hub id. A directory of that name comes first.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UsageError, InputError, StorageError: As `locate`, `open_checkpoint` and `open_on_hub` raise them.
    """
    with ExitStack() as stack:
        if is_hub_id(source):
            try:
                checkpoint, _ = stack.enter_context(open_on_hub(source, revision, headers_only=True))
            except (InputError, StorageError):
                cached = _cached(source, revision)
                if cached is None:
                    raise
                checkpoint = stack.enter_context(open_checkpoint(cached))
        else:
            checkpoint = stack.enter_context(open_checkpoint(locate(source, revision)))
        yield checkpoint


def is_hub_id(source: str | Path) -> TypeGuard[str]:
    """Return whether a source is the id of a model on the Hub, and no path on this machine.

    Raises:
        StorageError: The disk or its permissions refused.
    """
    if not isinstance(source, str) or _HUB_ID.fullmatch(source) is None:
        return False
    with refusals("look at the path", source):
        return not Path(source).exists()


def on_hub(*sources: str | Path | None) -> list[str]:
    """Return the sources that are models on the Hub."""
    return [source for source in sources if source is not None and is_hub_id(source)]


def check_streamed(source: str | Path, base: str | Path | None) -> None:
    """Check that the source or the base can be streamed.

    Raises:
        UsageError: Neither the source nor the base is a model on the Hub.
    """
    if not on_hub(source, base):
        raise UsageError("only a model on the Hub can be streamed", file=source, hint="leave --stream out")


def locate(source: str | Path, revision: str | None = None) -> Path:
    """Return the directory of a source; a model on the Hub is downloaded into its cache first.

    Args:
        source: A path, or a Hub id such as google/gemma-4-26B-A4B. A directory of that name comes first.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: There is no such directory or model.
        UsageError: A revision of a directory; or huggingface_hub is not installed.
        StorageError: The Hub can't be reached, or the disk is full.
    """
    if is_hub_id(source):
        return fetch(source, revision)
    path = expanded(source)
    if revision is not None:
        raise UsageError("a directory has no revision", file=path, found=revision, hint="leave --revision out")
    return path


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the directory of a model in the Hub's cache, or None if the cache lacks it."""
    try:
        return fetch(repository, revision, cached_only=True)
    except StorageError:
        return None
