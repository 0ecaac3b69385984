"""A guard around NeMo's read into a model's own storage: it refuses files whose values would be rounded twice.

The read rounds each value to the model's dtype; the scale multiplies afterwards and rounds again. Where the file's
dtype has values that the model's lacks, the result is not the correctly rounded fold. Only here are both dtypes known:
an adapter never learns which file its destinations are filled from.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from gemma4_moe.adapter import destinations
from gemma4_moe.errors import UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.table import DOWN, SCALE, Layout, lookup
from gemma4_moe.layout.transforms import folds_in_place_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    import torch


def refusing_to_round_twice(read: Callable[..., Any], checkpointing: ModuleType) -> Callable[..., Any]:
    """Return NeMo's `Checkpointer._do_load` with the dtypes of the files looked at first.

    Args:
        read: The method; it fills a state dict from a directory.
        checkpointing: The module that it comes from.
    """

    @wraps(read)
    def guarded(
        checkpointer: Any, state_dict: dict[str, Any], path: str, storage_reader: Any = None, is_init_step: bool = False
    ) -> Any:
        loaded = {name: value for name, value in state_dict.items() if destinations.native_of(value) is not None}
        if loaded:
            reader = checkpointing._maybe_msc_reader(path, storage_reader)
            metadata = checkpointing._get_checkpoint_metadata(path, reader).state_dict_metadata
            refuse_two_roundings(
                loaded, {name: metadata[name].properties.dtype for name in loaded if name in metadata}, path
            )
        return read(checkpointer, state_dict, path, storage_reader, is_init_step)

    return guarded


def refuse_two_roundings(
    loaded: Mapping[str, torch.Tensor], file_dtypes: Mapping[str, torch.dtype], path: object
) -> None:
    """Check that a read into destinations, and the scale after it, round once.

    Args:
        loaded: Destinations by hf name.
        file_dtypes: What the checkpoint holds, by hf name. A tensor that it lacks is for the reader to refuse.
        path: The checkpoint.

    Raises:
        UsageError: A `down_proj`, or a scale, has values that its destination can't hold.
    """
    for name, destination in loaded.items():
        found = lookup(name, Layout.HF)
        if found is None or found.rule not in (DOWN, SCALE) or name not in file_dtypes:
            continue
        file, model = dtypes.named(str(file_dtypes[name])), dtypes.named(str(destination.dtype))
        if not folds_in_place_exactly(file, model):
            raise UsageError(
                f"an in-place load would round twice: the checkpoint has {file.name}, its destination {model.name}",
                tensor=name,
                file=path,
                expected=f"a checkpoint whose values are all values of {model.name}",
                found=file.name,
                hint="load with gemma4_moe.load_hf, which rounds once; or make the model in "
                f"{file.name}; or start from a checkpoint in {model.name}",
            )
