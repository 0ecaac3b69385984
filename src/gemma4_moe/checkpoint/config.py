"""A checkpoint's config.json, and its few sizes that are compared with the tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.impostors import ENOUGH, check_genuine
from gemma4_moe.checkpoint.storage import read_whole
from gemma4_moe.errors import CheckpointFormatError, ConfigError
from gemma4_moe.layout.model_tensors import ties_embeddings
from gemma4_moe.layout.table import SIZE_FIELDS

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

CONFIG_NAME = "config.json"

#: The longest config.json that is read, in bytes. Real ones have a few thousand.
LONGEST_CONFIG = 10 * 2**20

#: The largest size that a config may claim: no axis of a tensor that this package converts comes near.
LARGEST_SIZE = 2**20

_GET_IT = "get the checkpoint's own config.json, or give --config-from BASE, the checkpoint that it was trained from"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config.json: its document, model_type, sizes by axis E, H and I, and number of decoder layers.

    A field that the document lacks is None, or not among the sizes.
    """

    path: Path
    document: dict[str, Any]
    model_type: str | None
    sizes: dict[str, int]
    layers: int | None

    @property
    def text(self) -> dict[str, Any]:
        """The config of the text model: the document's `text_config`, or else the document."""
        text = self.document.get("text_config", self.document)
        return text if isinstance(text, dict) else {}

    def without(self, keys: Collection[str]) -> ConfigFile:
        """Return the same config without some keys, at its top and in `text_config`."""
        document = {key: value for key, value in self.document.items() if key not in keys}
        if "text_config" in document:
            document["text_config"] = {key: value for key, value in self.text.items() if key not in keys}
        return replace(self, document=document)

    @property
    def is_dense(self) -> bool:
        """Whether the document says that there are no experts."""
        return _says_dense(self.text)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output head is the embedding, as it is where the config does not say."""
        return ties_embeddings(self.document)


def read_config(directory: Path) -> ConfigFile:
    """Read the config.json of `directory`.

    The sizes are those of its `text_config`. A config without one has them at its top level.

    Raises:
        ConfigError: The file is missing, too long, or not a JSON object; or a field that is used has no sensible value.
    """
    path = directory / CONFIG_NAME
    document = _read_object(path)
    model_type = document.get("model_type")
    if not isinstance(model_type, str | None):
        raise _senseless(path, "model_type", "a string", model_type)
    text = document.get("text_config", document)
    if not isinstance(text, dict):
        raise _senseless(path, "text_config", "an object", text)
    of_experts = {"E", "I"} if _says_dense(text) else set()
    sizes = {axis: _size(path, text, field) for axis, (field, _) in SIZE_FIELDS.items() if axis not in of_experts}
    known = {axis: size for axis, size in sizes.items() if size is not None}
    return ConfigFile(path, document, model_type, known, _size(path, text, "num_hidden_layers"))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = read_whole(path, LONGEST_CONFIG)
        check_genuine(raw[:ENOUGH], path)
    except CheckpointFormatError as error:
        expected, found = error.facts.get("expected"), error.facts.get("found")
        hint = error.hint if path.is_symlink() or path.exists() else None
        raise _unusable(path, f"{CONFIG_NAME} can't be used: {error.problem}", expected, found, hint) from error
    try:
        document = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"{CONFIG_NAME} is not JSON", None, str(error)[:200]) from error
    if not isinstance(document, dict):
        raise _unusable(path, f"{CONFIG_NAME} is not an object", "{...}", type(document).__name__)
    return document


def _says_dense(text: dict[str, Any]) -> bool:
    """Return whether a text model's config has no experts: null for their number, or their block switched off."""
    return text.get("num_experts", 1) is None or text.get("enable_moe_block", True) is False


def _size(path: Path, text: dict[str, Any], field: str) -> int | None:
    if field not in text:
        return None
    value = text[field]
    if type(value) is not int or not 0 < value <= LARGEST_SIZE:
        raise _senseless(path, field, f"an integer from 1 to {LARGEST_SIZE}", value)
    return value


def _senseless(path: Path, field: str, expected: str, value: object) -> ConfigError:
    found = f"{type(value).__name__} {value!r:.100}"
    return _unusable(path, f"{field} in {CONFIG_NAME} has no sensible value", expected, found)


def _unusable(
    path: Path, problem: str, expected: str | None, found: str | None, hint: str | None = None
) -> ConfigError:
    hint = hint or _GET_IT
    return ConfigError(problem, file=path, expected=expected, found=found, hint=hint)
