"""An open checkpoint directory: its named tensors, each with a way to read its bytes by ranges, and its other files.

A tensor is in one file, or in parts of several (`parts`). A training run or a step means the model in it (`runs`). Only
the directory's own entries count: subdirectories are no part of a checkpoint, but for the config of a step in parts.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gemma4_moe.checkpoint.agreement import (
    SUFFIX,
    are_numbered,
    check_numbered,
    compare_names,
    compare_tensors,
    no_single_file,
)
from gemma4_moe.checkpoint.completeness import known_shapes
from gemma4_moe.checkpoint.config import CONFIG_NAME, ConfigFile, read_config
from gemma4_moe.checkpoint.config_dtype import QUANTISATION
from gemma4_moe.checkpoint.dcp import METADATA_NAME, open_dcp
from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.checkpoint.foreign_formats import refuse_foreign_files
from gemma4_moe.checkpoint.impostors import ENOUGH, check_genuine
from gemma4_moe.checkpoint.index import INDEX_NAME, LONGEST_INDEX, claimed_size, parse_index
from gemma4_moe.checkpoint.nemo_step import holds_parts, is_part, parts_of, side_directory
from gemma4_moe.checkpoint.parents import refuse_parent
from gemma4_moe.checkpoint.parts import FileOfParts, whole_shape
from gemma4_moe.checkpoint.quantised import dequantised
from gemma4_moe.checkpoint.runs import taken
from gemma4_moe.checkpoint.side_files import MANIFEST_NAME, is_of_macos, side_files_of
from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.checkpoint.stored import StoredTensor
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, command_line
from gemma4_moe.layout.prefix_forms import prefix_form
from gemma4_moe.layout.prefixes import fitted
from gemma4_moe.layout.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gemma4_moe.checkpoint.file import IdentifiedFile
    from gemma4_moe.checkpoint.parts import Part


_DIRECTORY = "a directory of safetensors files"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint. Use it as a context manager, or call `close`.

    Attributes:
        path: Its own directory; of a run or a step, that of the model.
        files: The files that hold or describe its tensors, by name.
        tensors: The tensors by name, in the order of the files and of their data.
        side_files: The files that a conversion copies unchanged, sorted.
        skipped: Names of all other entries but our manifest, sorted; those of directories end in "/".
        wrong_size: The `total_size` of the index if it is not the size of all tensors in bytes, else None.
        in_parts: Whether each rank of a training run has saved its own parts.
        config_directory: The directory of config.json, if it is not `path`.
        notes: Sentences on the model that was taken from a run or a step, and on what was left out of it, and on
            forms that are read as another one.
        dequantised: Whether weights are dequantised when they are read.
    """

    path: Path
    files: Mapping[str, IdentifiedFile]
    tensors: dict[str, StoredTensor]
    side_files: tuple[Path, ...]
    skipped: tuple[str, ...]
    wrong_size: int | None = None
    in_parts: bool = False
    config_directory: Path | None = None
    notes: tuple[str, ...] = ()
    dequantised: bool = False

    @property
    def total_bytes(self) -> int:
        """Size of all tensors in bytes, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    def read_config(self) -> ConfigFile:
        """Read config.json, without what it says of weights that are dequantised. Raises what `read_config` raises."""
        config = read_config(self.config_directory or self.path)
        return config.without(QUANTISATION) if self.dequantised else config

    def with_config_of(self, other: Checkpoint) -> Self:
        """Return the same open checkpoint with the config.json of another one, which must stay open."""
        own = [file for file in self.side_files if file.name != CONFIG_NAME]
        config = [file for file in other.side_files if file.name == CONFIG_NAME]
        return replace(self, config_directory=other.config_directory or other.path, side_files=(*config, *own))

    def without_wrappers(self) -> Self:
        """Return the same open checkpoint, its tensors' names without wrappers and under the model's own prefixes.

        Raises:
            ConfigError: The config, whose `model_type` decides the prefixes, can't be read.
            DuplicateTensorError: Two names become one.
        """
        kind = self.read_config().model_type
        return self.renamed(lambda name: fitted(name, kind))

    def renamed(self, name_of: Callable[[str], str]) -> Self:
        """Return the same open checkpoint under other names. A DuplicateTensorError if two become one."""
        plain = unwrapped(self.tensors, name_of)
        return replace(self, tensors={own: replace(self.tensors[name], name=own) for own, name in plain.items()})

    def check_unchanged(self) -> None:
        """Check every file as `SafetensorsFile.check_unchanged` does, and raise what it raises."""
        for file in self.files.values():
            file.check_unchanged()


def open_checkpoint(
    path: str | Path, elsewhere: Mapping[str, Callable[[], SafetensorsFile]] | None = None
) -> Checkpoint:
    """Open a directory of safetensors files, and check it without reading a tensor.

    Args:
        path: The directory; or a training run, or a step of one, whose model is opened.
        elsewhere: Weight files that belong to it but are not in it: by name, the function that opens the file.

    Raises:
        CheckpointFormatError: The directory, its index or a header breaks a rule; or files, index and headers disagree;
            or quantised weights, their scales and config.json do.
        ConfigError: The tensors are in parts, and the config, which tells their shapes, is damaged.
        DuplicateTensorError: A tensor, or a part of one, is in two files, or twice in one.
        TensorShapeError: A shape and dtype don't make the bytes that a header claims.
        UnsupportedCheckpointError: It is a known format of another kind.
        ConfigError: Weights are quantised, and config.json can't be read.
    """
    (path, notes), elsewhere = taken(Path(path)), elsewhere or {}
    files, directories = _entries(path)
    files = sorted({*files, *(name for name in elsewhere if not is_of_macos(name))})
    weights = [name for name in files if name.endswith(SUFFIX)]
    if METADATA_NAME in files and not elsewhere:
        return _open_dcp(path, files, directories, notes)
    if not weights and INDEX_NAME not in files:
        refuse_parent(path)
    refuse_foreign_files(path, [*files, *directories])
    weight_map: dict[str, str] | None = None
    claimed = None
    if INDEX_NAME in files:
        raw = read_whole(path / INDEX_NAME, LONGEST_INDEX)
        check_genuine(raw[:ENOUGH], path / INDEX_NAME)
        weight_map, claimed = parse_index(raw, file=path / INDEX_NAME), claimed_size(raw)
        compare_names(path / INDEX_NAME, set(weight_map.values()), set(weights), files)
    elif are_numbered(weights):
        check_numbered(path, weights)
    elif len(weights) != 1 and not any(map(is_part, weights)):
        raise no_single_file(path, weights)
    config_directory, side_files = None, side_files_of(path, files)
    with ExitStack() as stack:
        openers = {name: partial(SafetensorsFile, path / name) for name in weights} | dict(elsewhere)
        opened = {name: stack.enter_context(openers[name]()) for name in weights}
        if holds_parts(opened):
            config_directory = side_directory(path)
            beside = _entries(config_directory)[0]
            side_files = side_files_of(config_directory, beside)
            tensors = _join(opened, known_shapes(read_config(config_directory)) if CONFIG_NAME in beside else {})
        else:
            tensors = _collect(opened)
        if weight_map is not None:
            compare_tensors(path / INDEX_NAME, weight_map, {name: t.file.path for name, t in tensors.items()})
        plain, dequantised_note = dequantised(config_directory or path, tensors)
        stack.pop_all()
    known = {*opened, INDEX_NAME, MANIFEST_NAME, *(side_file.name for side_file in side_files)}
    known |= set() if config_directory is None else {f"{config_directory.name}/"}
    skipped = tuple(sorted({*files, *directories} - known))
    wrong_size = None if claimed == sum(tensor.nbytes for tensor in tensors.values()) else claimed
    in_parts, form = config_directory is not None, prefix_form(plain)
    notes = (*notes, *(note for note in (form and form.note, dequantised_note) if note))
    found = Checkpoint(path, opened, plain, side_files, skipped, wrong_size, in_parts, config_directory, notes)
    found = replace(found, dequantised=dequantised_note is not None)
    return found if form is None else found.renamed(form.read)


def _entries(path: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files in `path`, and of its directories. `.cache` is left out; others get a slash."""
    with refusals("look at the directory", path):
        exists, is_directory = path.exists(), path.is_dir()
        begun = not exists and control_directory(path).is_dir()
    if not exists:
        hint = "check the path"
        if begun:
            remove = command_line("gemma4-moe", "clean", path)
            again = command_line("gemma4-moe", "convert", "SRC", path, "--resume")
            hint = f"a conversion to it was not finished: resume it: {again}; or remove it: {remove}"
        raise CheckpointFormatError("no such directory", file=path, expected=_DIRECTORY, hint=hint)
    if not is_directory:
        refuse_foreign_files(path.parent, [path.name])
        hint = "name the file's directory"
        raise CheckpointFormatError("not a directory", file=path, expected=_DIRECTORY, hint=hint)
    with refusals("list the directory", path):
        entries = {entry.name: entry.is_dir() for entry in path.iterdir() if not is_of_macos(entry.name)}
    directories = [f"{name}/" for name, is_directory in entries.items() if is_directory and name != ".cache"]
    return [name for name, is_directory in entries.items() if not is_directory], directories


def _collect(files: dict[str, SafetensorsFile]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, file in files.items():
        for entry in file.header.entries:
            stored = StoredTensor(entry.name, entry.dtype, entry.shape, entry.start, entry.end, file)
            other = tensors.setdefault(entry.name, stored)
            if other.file is not file:
                raise DuplicateTensorError(
                    "two files hold one tensor",
                    tensor=entry.name,
                    file=file.path,
                    expected="each tensor in one file",
                    found=f"{other.file.path.name} and {name}",
                    hint="one file is of another checkpoint, such as an older save: save this one again, into an empty "
                    "directory",
                )
    return tensors


def _join(files: dict[str, SafetensorsFile], called: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Return the tensors whose parts are in files.

    `called` are the shapes that the config calls for. Where there is no config, whoever brings one compares them.
    """
    return {name: _joined(name, parts, called.get(name)) for name, parts in parts_of(files).items()}


def _open_dcp(path: Path, files: list[str], directories: list[str], notes: tuple[str, ...]) -> Checkpoint:
    """Open a directory of torch.distributed.checkpoint. Its config is beside it, or that of another checkpoint."""
    with ExitStack() as stack:
        found = open_dcp(path, stack.enter_context)
        tensors = {name: _joined(name, parts, shape) for name, (shape, parts) in found.tensors.items()}
        side_files = side_files_of(path, files)
        stack.pop_all()
    skipped = {*files, *directories} - {*found.files, *(side_file.name for side_file in side_files)}
    notes = notes if found.left_out is None else (*notes, found.left_out)
    return Checkpoint(path, found.files, tensors, side_files, tuple(sorted(skipped)), in_parts=True, notes=notes)


def _joined(name: str, parts: Sequence[Part], called: tuple[int, ...] | None) -> StoredTensor:
    """Return the tensor that parts are, after the checks of `whole_shape`."""
    shape, dtype = whole_shape(name, parts, called), parts[0].dtype
    nbytes = prod(shape) * dtype.bits // 8
    if len(parts) == 1:
        return StoredTensor(name, dtype, shape, parts[0].start, parts[0].start + nbytes, parts[0].file)
    return StoredTensor(name, dtype, shape, 0, nbytes, FileOfParts(parts, shape))


def control_directory(target: Path) -> Path:
    """Return the directory that stands beside `target` while it is written."""
    return target.parent / f".{target.name}.gemma4-moe"
