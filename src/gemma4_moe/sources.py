"""Where a source is: a directory on this machine, or a model on the Hugging Face Hub, fetched or read in place."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from gemma4_moe.checkpoints.directories import Checkpoint, open_checkpoint
from gemma4_moe.checkpoints.side_files import PATTERNS
from gemma4_moe.errors import InputError, StorageError, UsageError
from gemma4_moe.hub import open_on_hub

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@contextmanager
def open_source(
    source: str | Path, revision: str | None = None, *, stream: bool = False
) -> Iterator[tuple[Checkpoint, str | None]]:
    """Open a source, and give it with the commit at which it is read; None for a directory.

    Args:
        source: A path, or a Hub id. A directory of that name comes first.
        revision: Branch, tag or commit on the Hub.
        stream: Leave the weights on the Hub and read them there, instead of fetching them into its cache first.

    Raises:
        UsageError: `stream` for a directory; or what `locate` raises.
        InputError, StorageError: What `locate`, `open_checkpoint` or `open_on_hub` raises.
    """
    if not stream:
        with open_checkpoint(locate(source, revision)) as checkpoint:
            yield checkpoint, None
    elif not is_hub_id(source):
        raise UsageError("only a model on the Hub can be streamed", file=source, hint="leave --stream out")
    else:
        with open_on_hub(source, revision) as (checkpoint, commit):
            yield checkpoint, commit


def is_hub_id(source: str | Path) -> TypeGuard[str]:
    """Say whether a source is the id of a model on the Hub, and no path of this machine."""
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def locate(source: str | Path, revision: str | None = None) -> Path:
    """Return the directory of a source; a model on the Hub is brought into the Hub's cache first.

    Args:
        source: A path, or a Hub id such as google/gemma-4-26B-A4B. A directory of that name comes first.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: There is no such directory or model.
        UsageError: A revision of a directory; or huggingface_hub is not installed.
        StorageError: The Hub can't be reached, or the disk is full.
    """
    path = Path(source)
    if not is_hub_id(source):
        if revision is not None:
            raise UsageError("a directory has no revision", file=path, found=revision, hint="leave --revision out")
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise UsageError(
            "no such directory, and a model on the Hub needs huggingface_hub",
            file=source,
            hint="check the path, or: pip install 'gemma4-moe[hub]'",
        ) from error
    patterns = ["*.safetensors", "*.safetensors.index.json", *PATTERNS]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise InputError(
            "no such directory, and no such model on the Hub that this token may read",
            file=source,
            hint="check the name; a gated model needs `hf auth login`",
        ) from error
    except LocalEntryNotFoundError as error:
        raise StorageError(
            "no such directory, and the Hub can't be reached",
            file=source,
            hint="check the path or the connection; with HF_HUB_OFFLINE, the model must be in the cache",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise StorageError(f"the model can't be brought from the Hub: {error}", file=source) from error
