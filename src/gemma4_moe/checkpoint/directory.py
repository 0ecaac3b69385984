"""An open checkpoint directory: its safetensors files, checked against its index, and its other files.

Only the directory's own entries count: subdirectories, `.cache` among them, are no part of a checkpoint.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gemma4_moe.checkpoint.config import ConfigFile, read_config
from gemma4_moe.checkpoint.config_dtype import QUANTISATION
from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.checkpoint.foreign_formats import refuse_foreign_files, refuse_partial_tensors
from gemma4_moe.checkpoint.impostors import ENOUGH, check_genuine
from gemma4_moe.checkpoint.index import INDEX_NAME, LONGEST_INDEX, claimed_size, parse_index
from gemma4_moe.checkpoint.parents import refuse_parent
from gemma4_moe.checkpoint.quantised import dequantised
from gemma4_moe.checkpoint.side_files import MANIFEST_NAME, is_of_macos, side_files_of
from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.checkpoint.stored import StoredTensor
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, command_line
from gemma4_moe.layout.prefix_forms import PrefixForm, prefix_form
from gemma4_moe.layout.prefixes import fitted
from gemma4_moe.layout.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_SUFFIX = ".safetensors"

_DIRECTORY = "a directory of safetensors files"

_AGAIN = "get the index again, and the file that is not as it says"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint. Use it as a context manager, or call `close`.

    Attributes:
        files: The safetensors files by name, sorted.
        tensors: The tensors by name, in the order of the files and of their data.
        side_files: The files that a conversion copies unchanged, sorted.
        skipped: Names of all other entries but our manifest, sorted; those of directories end in "/".
        wrong_size: The `total_size` of the index if it is not the size of all tensors in bytes, else None.
        prefix_form: The form whose prefixes the tensors have in the files, if they are read under others.
        dequantised: A sentence on the weights that are dequantised when they are read; None if there are none.
    """

    path: Path
    files: dict[str, SafetensorsFile]
    tensors: dict[str, StoredTensor]
    side_files: tuple[Path, ...]
    skipped: tuple[str, ...]
    wrong_size: int | None = None
    prefix_form: PrefixForm | None = None
    dequantised: str | None = None

    @property
    def total_bytes(self) -> int:
        """Size of all tensors in bytes, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def read_files(self) -> dict[SafetensorsFile, None]:
        """The files that the tensors are read from, `DequantisedFile`s among them."""
        return dict.fromkeys(tensor.file for tensor in self.tensors.values())

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
        config = read_config(self.path)
        return config if self.dequantised is None else config.without(QUANTISATION)

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
        path: The directory.
        elsewhere: Weight files that belong to it but are not in it: by name, the function that opens the file.

    Raises:
        CheckpointFormatError: The directory, its index or a header breaks a rule; or files, index and headers disagree;
            or quantised weights, their scales and config.json do.
        DuplicateTensorError: A tensor is in two files, or twice in one.
        TensorShapeError: A shape and dtype don't make the bytes that a header claims.
        UnsupportedCheckpointError: It is a known format of another kind.
        ConfigError: Weights are quantised, and config.json can't be read.
    """
    path, elsewhere = Path(path), elsewhere or {}
    files, directories = _entries(path)
    files = sorted({*files, *(name for name in elsewhere if not is_of_macos(name))})
    weights = [name for name in files if name.endswith(_SUFFIX)]
    if not weights and INDEX_NAME not in files:
        refuse_parent(path)
    refuse_foreign_files(path, [*files, *directories])
    weight_map: dict[str, str] | None = None
    claimed = None
    if INDEX_NAME in files:
        raw = read_whole(path / INDEX_NAME, LONGEST_INDEX)
        check_genuine(raw[:ENOUGH], path / INDEX_NAME)
        weight_map, claimed = parse_index(raw, file=path / INDEX_NAME), claimed_size(raw)
        _compare_names(path / INDEX_NAME, set(weight_map.values()), set(weights), files)
    else:
        _require_single_file(path, weights)
    side_files = side_files_of(path, files)
    with ExitStack() as stack:
        openers = {name: partial(SafetensorsFile, path / name) for name in weights} | dict(elsewhere)
        opened = {name: stack.enter_context(openers[name]()) for name in weights}
        refuse_partial_tensors(path, opened)
        tensors = _collect(opened)
        if weight_map is not None:
            _compare_tensors(path / INDEX_NAME, weight_map, tensors)
        plain, note = dequantised(path, tensors)
        stack.pop_all()
    known = {*opened, INDEX_NAME, MANIFEST_NAME, *(side_file.name for side_file in side_files)}
    skipped = tuple(sorted({*files, *directories} - known))
    wrong_size = None if claimed == sum(tensor.nbytes for tensor in tensors.values()) else claimed
    checkpoint = Checkpoint(path, opened, plain, side_files, skipped, wrong_size, dequantised=note)
    form = prefix_form(plain)
    return checkpoint if form is None else replace(checkpoint.renamed(form.read), prefix_form=form)


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


def _require_single_file(path: Path, weights: list[str]) -> None:
    if not weights:
        expected = f"{INDEX_NAME} and the files that it names, or one {_SUFFIX} file"
        hint = "name the directory that holds the weights"
        raise CheckpointFormatError("no safetensors file in the directory", file=path, expected=expected, hint=hint)
    if len(weights) > 1:
        problem = "several safetensors files, and no index that says which belong together"
        others = [name for name in weights if name != f"model{_SUFFIX}"]
        hint = "get the index, or keep elsewhere what is not the checkpoint: " + _move(path, others or weights[1:])
        raise CheckpointFormatError(problem, file=path, expected=INDEX_NAME, found=_some(weights), hint=hint)


def _compare_names(index: Path, named: set[str], present: set[str], files: Collection[str]) -> None:
    if absent := sorted(named - present):
        begun = [name for name in files if name.endswith(".incomplete") and name.startswith(tuple(absent))]
        raise CheckpointFormatError(
            "the index names a file that is not there",
            file=index,
            expected=_some(absent),
            found=f"{_some(begun)}, whose download has not ended" if begun else _some(present) or "no safetensors file",
            hint=f"fetch {_some(absent)} from where the checkpoint came from, into {index.parent}",
        )
    if extra := sorted(present - named):
        raise CheckpointFormatError(
            "a safetensors file that the index does not name",
            file=index,
            expected="every safetensors file of the directory in the index",
            found=_some(extra),
            hint=f"some readers would take it for the model; keep it elsewhere: {_move(index.parent, extra)}",
        )


def _move(directory: Path, names: Collection[str]) -> str:
    """Return the command that moves files of a user out of a checkpoint, into a new directory beside it."""
    aside = directory.with_name(f"{directory.name}-other-files")
    move = command_line("mv", "--", *(directory / name for name in names), aside)
    return f"{command_line('mkdir', '--', aside)} && {move}"


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


def _compare_tensors(index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        place = tensors[name].file.path.name if name in tensors else "in no file"
        if place != file:
            problem = "the index and the files disagree on where a tensor is"
            raise CheckpointFormatError(problem, tensor=name, file=index, expected=file, found=place, hint=_AGAIN)
    for name, tensor in tensors.items():
        if name not in weight_map:
            problem, expected = "a tensor that the index does not name", f"every tensor in {INDEX_NAME}"
            raise CheckpointFormatError(problem, tensor=name, file=tensor.file.path, expected=expected, hint=_AGAIN)


def _some(names: Collection[str]) -> str:
    """Name a few of `names`, and how many more there are."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def control_directory(target: Path) -> Path:
    """Return the directory that stands beside `target` while it is written."""
    return target.parent / f".{target.name}.gemma4-moe"
