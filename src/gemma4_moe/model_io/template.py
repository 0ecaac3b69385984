"""The model that a saved directory is of: its config, its side files and, where there are any, its weights' shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.completeness import expected_shapes
from gemma4_moe.checkpoint.config import ConfigFile, read_config
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.recognition import checkpoint_targets, recognise, refuse_other_models
from gemma4_moe.checkpoint.side_files import side_files_of
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.hub.source import is_hub_id, open_source
from gemma4_moe.layout.table import Layout

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint


@dataclass(frozen=True, slots=True)
class Template:
    """A model without its values.

    Attributes:
        directory: The directory that it was read from.
        config: Its config.json.
        side_files: The files that go with it.
        shapes: The shape of each of its tensors, by hf name.
        weights: The directory, if `shapes` was taken from weights there; None if from the config alone.
    """

    directory: Path
    config: ConfigFile
    side_files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    weights: Path | None


def read_template(source: str | Path) -> Template:
    """Read the model of a directory, which may have no weights, or of a Hub id, without reading a tensor.

    Raises:
        InputError: It is not a Gemma 4 MoE model, or its config does not say which tensors it has.
    """
    if is_hub_id(source):
        with open_source(source) as checkpoint:
            return _of_checkpoint(checkpoint)
    directory = expanded(source)
    with refusals("list the directory", directory):
        names = sorted(entry.name for entry in directory.iterdir() if entry.is_file()) if directory.is_dir() else []
    if any(name.endswith(".safetensors") for name in names):
        with open_source(directory) as checkpoint:
            return _of_checkpoint(checkpoint)
    config = read_config(directory)
    refuse_other_models(config)
    return Template(directory, config, side_files_of(directory, names), expected_shapes(config, None), None)


def _of_checkpoint(checkpoint: Checkpoint) -> Template:
    config = checkpoint.read_config()
    refuse_other_models(config)
    weights = _hf_shapes(checkpoint, config)
    shapes = expected_shapes(config, weights)
    origin = None if weights is None else checkpoint.path
    return Template(checkpoint.path, config, checkpoint.side_files, shapes, origin)


def _hf_shapes(checkpoint: Checkpoint, config: ConfigFile) -> dict[str, tuple[int, ...]] | None:
    """Return shapes by hf name, current spelling; None for a form that is not converted."""
    layout = recognise(checkpoint.tensors, config).layout
    if layout is None:
        return None
    targets = checkpoint_targets(checkpoint.tensors.values(), layout, config, to=Layout.HF)
    shapes = {name: target.shape for name, target in targets.items()}
    if config.ties_embeddings:
        shapes.pop("lm_head.weight", None)  # the embedding under another name
    return shapes
