"""A checkpoint's config.json, and the few sizes in it that this package compares with the tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.storage import read_whole
from gemma4_moe.errors import CheckpointFormatError, ConfigError
from gemma4_moe.layout.table import SIZE_FIELDS

if TYPE_CHECKING:
    from pathlib import Path

CONFIG_NAME = "config.json"

#: The longest config.json that is read, in bytes. Real ones have a few thousand.
LONGEST_CONFIG = 10 * 2**20

#: The largest size that a config may claim: no axis of a tensor that this package converts comes near.
LARGEST_SIZE = 2**20

_HINT = "get the checkpoint's own config.json; it tells which sizes its tensors should have"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config.json.

    Attributes:
        model_type: The top level's model_type.
        sizes: E, H and I, as far as the config has them.
        layers: The number of decoder layers, `num_hidden_layers`, or None.
    """

    path: Path
    document: dict[str, Any]
    model_type: str | None
    sizes: dict[str, int]
    layers: int | None


def read_config(directory: Path) -> ConfigFile:
    """Read the config.json of `directory`.

    The sizes are those of its `text_config`. A config without one has them at its top level.

    Raises:
        ConfigError: The file is missing, too long, or not a JSON object; or a field that is used has no sensible value.
        StorageError: The disk or its permissions refused.
    """
    path = directory / CONFIG_NAME
    document = _read_object(path)
    model_type = document.get("model_type")
    if not isinstance(model_type, str | None):
        raise _senseless(path, "model_type", "a string", model_type)
    text = document.get("text_config", document)
    if not isinstance(text, dict):
        raise _senseless(path, "text_config", "an object", text)
    return ConfigFile(
        path=path,
        document=document,
        model_type=model_type,
        sizes={
            axis: size for axis, (field, _) in SIZE_FIELDS.items() if (size := _size(path, text, field)) is not None
        },
        layers=_size(path, text, "num_hidden_layers"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = read_whole(path, LONGEST_CONFIG)
    except CheckpointFormatError as error:
        raise ConfigError(
            f"{CONFIG_NAME} can't be used: {error.problem}",
            file=path,
            expected=error.facts.get("expected"),
            found=error.facts.get("found"),
            hint=_HINT,
        ) from error
    try:
        document = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{CONFIG_NAME} is not JSON", file=path, found=str(error)[:200], hint=_HINT) from error
    if not isinstance(document, dict):
        found = type(document).__name__
        raise ConfigError(f"{CONFIG_NAME} is not an object", file=path, expected="{...}", found=found, hint=_HINT)
    return document


def _size(path: Path, text: dict[str, Any], field: str) -> int | None:
    if field not in text:
        return None
    value = text[field]
    if type(value) is not int or not 0 < value <= LARGEST_SIZE:
        raise _senseless(path, field, f"an integer from 1 to {LARGEST_SIZE}", value)
    return value


def _senseless(path: Path, field: str, expected: str, value: object) -> ConfigError:
    found = f"{type(value).__name__} {value!r:.100}"
    problem = f"{field} in {CONFIG_NAME} has no sensible value"
    return ConfigError(problem, file=path, expected=expected, found=found, hint=_HINT)
