"""What a checkpoint's config says of its quantised weights: the library, and the modules that it leaves as they are."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_moe.checkpoint.config import CONFIG_NAME, LONGEST_CONFIG, read_config
from gemma4_moe.checkpoint.config_dtype import QUANTISATION
from gemma4_moe.checkpoint.quantised import compressed_tensors, modelopt, transformers_fp8
from gemma4_moe.checkpoint.storage import read_whole
from gemma4_moe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The file in which ModelOpt says it too, and older exports say it alone.
MODELOPT_NAME = "hf_quant_config.json"

_LISTS = {
    compressed_tensors.LIBRARY: ("ignore",),
    transformers_fp8.LIBRARY: ("modules_to_not_convert",),
    modelopt.LIBRARY: ("ignore", "exclude_modules"),
}

_BLOCK = (128, 128)

#: The largest block, in rows and in columns.
_LARGEST_BLOCK = 2**20

#: The longest pattern, and the most of them: a model has a few hundred modules that are left out.
_LONGEST_PATTERN, _MOST_PATTERNS = 1000, 100_000


class Claims(NamedTuple):
    """What a config says.

    Attributes:
        file: The file that says it.
        library: The name of the library that quantised the weights; None if the file does not say that they are.
        patterns: The modules that it leaves as they are.
        block: Rows and columns of a block that shares a scale.
    """

    file: Path
    library: str | None
    patterns: tuple[str, ...] = ()
    block: tuple[int, int] = _BLOCK


def read_claims(directory: Path) -> Claims:
    """Read what config.json or, if it says nothing, ModelOpt's own file says. Raises a ConfigError for nonsense."""
    config = read_config(directory)
    file = config.path
    said: Any = next(
        (part[key] for part in (config.document, config.text) for key in QUANTISATION if part.get(key)), None
    )
    if said is None and (directory / MODELOPT_NAME).is_file():
        file = directory / MODELOPT_NAME
        said = _modelopts(file)
    if said is None:
        return Claims(file, None)
    if not isinstance(said, dict):
        raise _senseless(file, "quantization_config", "an object", said)
    library = _library(said)
    patterns = tuple(pattern for key in _LISTS.get(str(library), ()) for pattern in _patterns(file, said, key))
    return Claims(file, library, patterns, _block(file, said))


def _modelopts(file: Path) -> object:
    try:
        document = json.loads(read_whole(file, LONGEST_CONFIG).decode())
    except (ValueError, RecursionError) as error:
        hint = "get the file again from where the checkpoint came from"
        raise ConfigError(f"{file.name} is not JSON", file=file, found=str(error)[:200], hint=hint) from error
    said = document.get("quantization") if isinstance(document, dict) else None
    return {**said, "quant_method": modelopt.LIBRARY} if isinstance(said, dict) else said


def _library(said: dict[str, Any]) -> str | None:
    producer = said.get("producer")
    by_modelopt = isinstance(producer, dict) and producer.get("name") == modelopt.LIBRARY
    if by_modelopt or said.get("quant_library") == modelopt.LIBRARY:
        return modelopt.LIBRARY
    method = said.get("quant_method")
    return None if method is None else str(method)[:100]


def _patterns(file: Path, said: dict[str, Any], key: str) -> tuple[str, ...]:
    patterns = said.get(key) or []
    strings = isinstance(patterns, list) and all(isinstance(each, str) for each in patterns)
    if not strings or len(patterns) > _MOST_PATTERNS or max(map(len, patterns), default=0) > _LONGEST_PATTERN:
        raise _senseless(file, key, "a list of names of modules", patterns)
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error:
            if pattern.startswith("re:") or key == "modules_to_not_convert":
                raise _senseless(file, key, "patterns of Python's re", pattern) from None
    return tuple(patterns)


def _block(file: Path, said: dict[str, Any]) -> tuple[int, int]:
    """Return the size of a block, as the config or its first group of weights gives it."""
    for key, sizes in _blocks(said):
        if sizes is None:
            continue
        numbers = isinstance(sizes, list) and [type(size) for size in sizes] == [int, int]
        if not numbers or not all(0 < size <= _LARGEST_BLOCK for size in sizes):
            raise _senseless(file, key, "two positive integers", sizes)
        return sizes[0], sizes[1]
    return _BLOCK


def _blocks(said: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "weight_block_size", said.get("weight_block_size")
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        yield "block_structure", weights.get("block_structure") if isinstance(weights, dict) else None


def _senseless(file: Path, key: str, expected: str, found: object) -> ConfigError:
    where = "" if file.name == CONFIG_NAME else f" in {file.name}"
    return ConfigError(
        f"{key}{where} has no sensible value",
        file=file,
        expected=expected,
        found=f"{type(found).__name__} {found!r:.100}",
        hint="get the checkpoint's own file; it tells which weights are quantised",
    )
