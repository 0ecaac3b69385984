"""Where a source is: a directory on this machine, or a model on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from gemma4_moe.checkpoints.side_files import PATTERNS
from gemma4_moe.errors import InputError, StorageError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


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
    if path.exists() or not (isinstance(source, str) and _HUB_ID.fullmatch(source)):
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
