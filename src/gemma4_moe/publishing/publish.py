"""Publish the model of a run or a step: one hf directory, complete and verified, and pushed to the Hub if asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.recognition import recognise
from gemma4_moe.checkpoint.side_files import is_tokenizer_file
from gemma4_moe.converter.blocks import DEFAULT_MEMORY
from gemma4_moe.converter.convert import convert
from gemma4_moe.errors import ConfigError, DifferenceError, UsageError, command_line
from gemma4_moe.hub.push import check_repository, push_directory
from gemma4_moe.hub.source import open_source
from gemma4_moe.layout.table import Layout
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE
from gemma4_moe.verifier.verify import verify

if TYPE_CHECKING:
    from gemma4_moe.converter.conversion import Conversion
    from gemma4_moe.hub.push import Pushed
    from gemma4_moe.sizes import Progress
    from gemma4_moe.verifier.comparison import Verification


@dataclass(frozen=True, slots=True, repr=False)
class Publication:
    """The result of `publish`.

    Attributes:
        directory: The directory in the hf layout: the target, or the source's own if there was nothing to change.
        conversion: What made it, or None.
        verification: Its comparison with the source, or None.
        pushed: The commit on the Hub, or None.
        notes: Sentences on what a user should know before others use the model.
    """

    directory: Path
    conversion: Conversion | None
    verification: Verification | None
    pushed: Pushed | None
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        where = "" if self.pushed is None else f", pushed as {self.pushed.repository}@{self.pushed.commit[:12]}"
        return f"<Publication in {self.directory}{where}>"


def publish(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    max_memory: int | str = DEFAULT_MEMORY,
    overwrite: bool = False,
    resume: bool = False,
    push: str | None = None,
    private: bool = False,
    progress: Progress | None = None,
) -> Publication:
    """Make the hf directory `target` of a training run's model: weights, config, tokenizer and a model card.

    Args:
        source: A run, a step, or any checkpoint that `convert` reads.
        target: See `convert`.
        base: The published checkpoint that the training began with, a directory or a Hub id. Its config.json is used,
            its files of tokenizer, processor and generation fill in, and it gets experts back as `convert` does.
        dtype: See `convert`.
        max_shard_size: See `convert`.
        max_memory: See `convert`.
        overwrite: See `convert`.
        resume: See `convert`.
        push: The repository on the Hub that the directory is uploaded to; it is made if it does not exist.
        private: Make a new repository private.
        progress: Called with the bytes that are done so far and with their total, of the conversion and then of its
            verification.

    Raises:
        InputError: The source is not a checkpoint that can be converted; or see `push_directory`.
        UsageError: The model is in the hf layout already, and there is nothing to change and no repository to push it
            to; or see `convert`.
        DifferenceError: The target is not what the source should become.
        StorageError: The disk, its permissions or the Hub refused.
    """
    if push is not None:
        check_repository(push)
    place, is_ready, notes = _look_at(source, base)
    if is_ready:
        _check_unchanged(place, dtype, push)
        ready = f"{place} is in the hf layout already: it is pushed as it is, and nothing was made"
        done, found, directory, notes = None, None, place, (ready, *notes)
    else:
        done = convert(
            source,
            target,
            to=Layout.HF,
            dtype=dtype,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            overwrite=overwrite,
            resume=resume,
            base=base,
            config_from=base,
            card=True,
            progress=progress,
        )
        found = verify(source, done.target, config_from=base, progress=progress)
        if found.different:
            hint = f"see {command_line('gemma4-moe', 'verify', Path(source), done.target)}"
            raise DifferenceError("the directory is not what the source becomes", file=done.target, hint=hint)
        directory, notes = done.target, (*done.notes, *notes, *_lacking(done.target, base))
    pushed = None if push is None else push_directory(directory, push, private=private)
    return Publication(directory, done, found, pushed, notes)


def _check_unchanged(place: Path, dtype: str, push: str | None) -> None:
    """Check that a model which is ready as it is shall be pushed so."""
    if push is not None and dtype == "keep":
        return
    upload = command_line("hf", "upload", "USER/MODEL", place)
    raise UsageError(
        "the model is in the hf layout already, and nothing is to be changed",
        file=place,
        expected="a step in parts, a model in the nemo layout, or a base that gets its experts back",
        hint=f"publish it as it is: {upload}; or give --base SRC, the checkpoint that the training began with",
    )


def _look_at(source: str | Path, base: str | Path | None) -> tuple[Path, bool, tuple[str, ...]]:
    """Return the model's place, whether it is ready as it is, and a note on dtypes that its config does not say."""
    with open_source(source) as checkpoint:
        if base is not None:  # `convert` judges the source by its config
            return checkpoint.path, False, ()
        try:
            config = checkpoint.read_config()
        except ConfigError as error:
            hint = "give --base SRC, the published checkpoint that the training began with"
            raise ConfigError(error.problem, **error.facts, hint=hint) from error
        layout = recognise(checkpoint.tensors, config).accepted()
        said = config.document.get("dtype", config.document.get("torch_dtype"))
        floats = {t.dtype.name for t in checkpoint.tensors.values() if t.dtype.float_format is not None}
        other = isinstance(said, str) and floats != {said}
        notes = (f"weights are {' and '.join(sorted(floats))}, and config.json says {said}",) if other else ()
        local = config.document.get("_name_or_path")
        if local and str(local).startswith(("/", ".")):
            notes = (
                *notes,
                f"config.json names a place of this machine, {local}: give --base SRC to publish the base's",
            )
        return checkpoint.path, layout is Layout.HF and not checkpoint.in_parts, notes


def _lacking(target: Path, base: str | Path | None) -> tuple[str, ...]:
    """Return that a target has no tokenizer, if so."""
    if any(is_tokenizer_file(path.name) for path in expanded(target).iterdir()):
        return ()
    remedy = "the base has none" if base is not None else "give --base SRC, whose files fill in"
    return (f"there is no tokenizer, no chat template and no processor: {remedy}",)
