"""A checkpoint directory opened for reading: its safetensors files, checked against its index, and what lies beside.

Only the directory's own entries count: subdirectories, `.cache` among them, are no part of a checkpoint.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gemma4_moe.checkpoint.config import ConfigFile, read_config
from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.checkpoint.foreign_formats import refuse_foreign_files, refuse_partial_tensors
from gemma4_moe.checkpoint.index import INDEX_NAME, LONGEST_INDEX, parse_index
from gemma4_moe.checkpoint.side_files import MANIFEST_NAME, check_side_file, is_side_file
from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, command_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from gemma4_moe.checkpoint.header import TensorEntry
    from gemma4_moe.layout.dtypes import DType

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, and where it is.

    Attributes:
        entry: Its name, dtype, shape and bytes.
        file: The file that holds it.
    """

    entry: TensorEntry
    file: SafetensorsFile

    @property
    def name(self) -> str:
        """Its name."""
        return self.entry.name

    @property
    def dtype(self) -> DType:
        """Its dtype."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.entry.nbytes

    def read_into(self, destination: memoryview, offset: int = 0) -> None:
        """Fill `destination` with the tensor's bytes from `offset` on. Raises what the file's `read_into` raises."""
        if offset < 0 or offset + destination.nbytes > self.nbytes:
            raise ValueError(f"[{offset}, {offset + destination.nbytes}) is outside of {self.nbytes} bytes")
        self.file.read_into(self.entry.start + offset, destination)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint. Use it as a context manager, or call `close`.

    Attributes:
        path: The directory.
        files: The safetensors files by name, sorted.
        tensors: The tensors by name, in the order of the files and of their data.
        side_files: What a conversion takes along unchanged, sorted.
        skipped: Names of all other entries but our manifest, sorted; those of directories end in "/".
    """

    path: Path
    files: dict[str, SafetensorsFile]
    tensors: dict[str, StoredTensor]
    side_files: tuple[Path, ...]
    skipped: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all tensors in bytes, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    def read_config(self) -> ConfigFile:
        """Read config.json; errors are those of `config_file.read_config`."""
        return read_config(self.path)

    def check_unchanged(self) -> None:
        """Check every file as `SafetensorsFile.check_unchanged` does, and raise what it raises."""
        for file in self.files.values():
            file.check_unchanged()


def open_checkpoint(
    path: str | Path, elsewhere: Mapping[str, Callable[[], SafetensorsFile]] | None = None
) -> Checkpoint:
    """Open a directory of safetensors files and check all that can be checked without reading a tensor.

    Args:
        path: The directory.
        elsewhere: Weight files that belong to it but are not in it: by name, what opens them.

    Raises:
        CheckpointFormatError: The directory, its index or a header breaks a rule; or files, index and headers disagree.
        DuplicateTensorError: A tensor is in two files, or twice in one.
        TensorShapeError: A shape and dtype don't make the bytes that a header claims.
        UnsupportedCheckpointError: It is a known format of another kind.
        StorageError: The disk or its permissions refused.
    """
    path, elsewhere = Path(path), elsewhere or {}
    files, directories = _entries(path)
    files = sorted({*files, *elsewhere})
    refuse_foreign_files(path, files)
    weights = [name for name in files if name.endswith(_SUFFIX)]
    index_bytes = read_whole(path / INDEX_NAME, LONGEST_INDEX) if INDEX_NAME in files else None
    weight_map: dict[str, str] | None = None
    if index_bytes is None:
        _require_single_file(path, weights)
    else:
        weight_map = parse_index(index_bytes, file=path / INDEX_NAME)
        _compare_names(path, set(weight_map.values()), set(weights))
    side_files = tuple(path / name for name in files if is_side_file(name))
    for side_file in side_files:
        check_side_file(side_file)
    with ExitStack() as stack:
        openers = {name: partial(SafetensorsFile, path / name) for name in weights} | dict(elsewhere)
        opened = {name: stack.enter_context(openers[name]()) for name in weights}
        refuse_partial_tensors(path, opened)
        tensors = _collect(opened)
        if weight_map is not None:
            _compare_tensors(path, weight_map, tensors)
        stack.pop_all()
    known = {*opened, INDEX_NAME, MANIFEST_NAME}
    left = [name for name in files if name not in known and not is_side_file(name)]
    left += [f"{name}/" for name in directories]
    return Checkpoint(path, opened, tensors, side_files, tuple(sorted(left)))


def _entries(path: Path) -> tuple[list[str], list[str]]:
    """Return the names of `path`'s entries, sorted: those that are no directories, and those that are."""
    with refusals("look at the directory", path):
        exists, is_directory = path.exists(), path.is_dir()
        begun = not exists and control_directory(path).is_dir()
    if not exists:
        hint = "check the path"
        if begun:
            remove = command_line("gemma4-moe", "clean", path)
            hint = f"a conversion to it was not finished: convert with --resume, or remove it: {remove}"
        raise CheckpointFormatError(
            "no such directory", file=path, expected="a directory of safetensors files", hint=hint
        )
    if not is_directory:
        refuse_foreign_files(path.parent, [path.name])
        raise CheckpointFormatError(
            "not a directory", file=path, expected="a directory of safetensors files", hint="name the file's directory"
        )
    with refusals("list the directory", path):
        entries = sorted(path.iterdir())
        directories = {entry for entry in entries if entry.is_dir()}
    files = [entry.name for entry in entries if entry not in directories]
    return files, [entry.name for entry in entries if entry in directories and entry.name != ".cache"]


def _require_single_file(path: Path, weights: list[str]) -> None:
    if not weights:
        raise CheckpointFormatError(
            "no safetensors file in the directory",
            file=path,
            expected=f"{INDEX_NAME} and the files that it names, or one {_SUFFIX} file",
            hint="name the directory that holds the weights",
        )
    if len(weights) > 1:
        raise CheckpointFormatError(
            "several safetensors files, and no index that says which belong together",
            file=path,
            expected=INDEX_NAME,
            found=_some(weights),
            hint="get the index, or leave only the file that is meant",
        )


def _compare_names(path: Path, named: set[str], present: set[str]) -> None:
    if named - present:
        raise CheckpointFormatError(
            "the index names a file that is not there",
            file=path / INDEX_NAME,
            expected=_some(named - present),
            found=_some(present) if present else "no safetensors file",
            hint="get the whole checkpoint again",
        )
    if present - named:
        raise CheckpointFormatError(
            "a safetensors file that the index does not name",
            file=path / INDEX_NAME,
            expected="every safetensors file of the directory in the index",
            found=_some(present - named),
            hint="remove what is left over from another checkpoint: some readers ignore the index and would take it",
        )


def _collect(files: dict[str, SafetensorsFile]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, file in files.items():
        for entry in file.header.entries:
            other = tensors.get(entry.name)
            if other is not None:
                raise DuplicateTensorError(
                    "two files hold one tensor",
                    tensor=entry.name,
                    file=file.path,
                    expected="each tensor in one file",
                    found=f"{other.file.path.name} and {name}",
                    hint="remove the file that does not belong to the checkpoint",
                )
            tensors[entry.name] = StoredTensor(entry, file)
    return tensors


def _compare_tensors(path: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        place = tensors[name].file.path.name if name in tensors else "in no file"
        if place != file:
            raise CheckpointFormatError(
                "the index and the files disagree on where a tensor is",
                tensor=name,
                file=path / INDEX_NAME,
                expected=file,
                found=place,
                hint="get the whole checkpoint again",
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointFormatError(
                "a tensor that the index does not name",
                tensor=name,
                file=tensor.file.path,
                expected=f"every tensor in {INDEX_NAME}",
                hint="get the whole checkpoint again",
            )


def _some(names: set[str] | list[str]) -> str:
    """Name a few of `names`, and how many more there are."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def control_directory(target: Path) -> Path:
    """Return the directory that stands beside `target` while it is written."""
    return target.parent / f".{target.name}.gemma4-moe"
