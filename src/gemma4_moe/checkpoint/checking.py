"""What names, shapes, dtypes and the config tell of a whole checkpoint: the rules of `convert` and `inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.errors import ConfigError, IncompleteExpertsError, InputError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.table import CHECKPOINT_RULES, Layout, MoEName, Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gemma4_moe.checkpoint.config import ConfigFile
    from gemma4_moe.checkpoint.directory import StoredTensor


def check_tensors(tensors: Iterable[StoredTensor], layout: Layout, config: ConfigFile) -> dict[str, MoEName | None]:
    """Explain every tensor of a checkpoint, and check names, shapes, dtypes and completeness.

    Raises:
        UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`; an expert dtype that is not
            bfloat16, float16 or float32.
        IncompleteExpertsError: A layer lacks a row of the table, or the config counts a layer that is not there.
        ConfigError: There are layers that the config does not count.
    """
    parsed: dict[str, MoEName | None] = {}
    for problem in wrong_tensors(tensors, layout, config, parsed):
        raise problem
    return parsed


def wrong_tensors(
    tensors: Iterable[StoredTensor], layout: Layout, config: ConfigFile, parsed: dict[str, MoEName | None]
) -> Iterator[InputError]:
    """Yield what `check_tensors` would raise: every wrong tensor, then the first layer that is not complete.

    What the name of each tensor that is not wrong means is put into `parsed`.
    """
    inventory = Inventory(layout, config_sizes(config))
    for stored in tensors:
        try:
            name = inventory.add(stored.name, stored.shape)
            if name is not None and name.rule.operation is not Operation.KEEP:
                dtypes.require_expert_dtype(stored.name, stored.dtype.tag)
            parsed[stored.name] = name
        except InputError as error:
            yield error
    try:
        inventory.require_complete(CHECKPOINT_RULES[layout])
        check_layer_count(inventory, config)
    except InputError as error:
        yield error


def config_sizes(config: ConfigFile) -> dict[str, int]:
    """Return the sizes of E, H and I that a config.json gives."""
    given = {"E": config.experts, "H": config.hidden_size, "I": config.expert_size}
    return {axis: size for axis, size in given.items() if size is not None}


def check_layer_count(inventory: Inventory, config: ConfigFile) -> None:
    """Check that the layers with experts are those that the config counts.

    Raises:
        IncompleteExpertsError: One that the config counts is not there.
        ConfigError: One is there that the config does not count.
    """
    if config.layers is None:
        return
    for prefix in sorted({prefix for prefix, _ in inventory.layers}):
        there = {layer for owner, layer in inventory.layers if owner == prefix}
        missing = sorted(set(range(config.layers)) - there)
        if missing:
            raise IncompleteExpertsError(
                f"Incomplete expert weights: no tensor of {len(missing)} layers",
                tensor=f"{prefix}layers.{missing[0]}.experts",
                expected=f"experts in {config.layers} layers, as {config.path} counts",
                found=f"experts in {len(there)} layers; none in {missing[:8]}",
                hint="a shard file of the checkpoint may be missing",
            )
        extra = sorted(there - set(range(config.layers)))
        if extra:
            raise ConfigError(
                "more layers with experts than the config counts",
                tensor=f"{prefix}layers.{extra[0]}.experts",
                file=config.path,
                expected=f"layers 0 to {config.layers - 1}",
                found=f"layer {extra[0]}",
                hint="check that the config and the tensors belong to the same model",
            )
