"""NeMo AutoModel: its Gemma 4 MoE model, its Checkpointer and NeMo-RL take our adapter once this is installed.

Three names are replaced: the adapter's class where the model's module looks it up, the same class in the module beside
it, where NeMo-RL looks, and the one method of the Checkpointer that reads a checkpoint into a model's own storage.
Nothing is replaced unless everything that it relies on is found as expected.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

from gemma4_moe.adapter import destinations
from gemma4_moe.adapter.state_dict_adapter import Gemma4MoEStateDictAdapter
from gemma4_moe.errors import UsageError
from gemma4_moe.integrations import nemo_contract
from gemma4_moe.integrations.nemo_contract import ADAPTER, READ
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import DOWN, GATE_UP, SCALE, Layout, folds_in_place_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

    import torch

    from gemma4_moe.adapter.interface import StateDict

__all__ = ["adapter_class", "install", "installed", "uninstall"]

#: What was replaced: its owner, its name, and what stood there.
_replaced: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Let NeMo AutoModel use our adapter for every Gemma 4 MoE model that is built from now on.

    A second call changes nothing. A model that was built before keeps its adapter; assign
    `adapter_class()(text_config, moe_config, backend, dtype=...)` to its `state_dict_adapter`.

    Raises:
        UsageError: NeMo AutoModel is not installed, or lacks something that this relies on; the message says what.

    Warns:
        UserWarning: The version is not the one that this was tested with; the message says what was checked.
    """
    if _replaced:
        return
    nemo = nemo_contract.find()
    nemo_contract.check(nemo)
    adapter = adapter_class()
    _replace(nemo.model, ADAPTER, adapter)
    _replace(nemo.beside, ADAPTER, adapter)
    _replace(nemo.checkpointer, READ, refusing_to_round_twice(getattr(nemo.checkpointer, READ), nemo.checkpointing))


def uninstall() -> None:
    """Put back exactly what `install` replaced. Without an `install` before, nothing happens.

    Models that were built in between keep the adapter that they have.
    """
    while _replaced:
        owner, name, before = _replaced.pop()
        setattr(owner, name, before)


@contextmanager
def installed() -> Iterator[None]:
    """Install for the length of a `with` block, unless it is installed already; then leave it so. Errors: `install`."""
    was_installed = bool(_replaced)
    install()
    try:
        yield
    finally:
        if not was_installed:
            uninstall()


def _replace(owner: Any, name: str, new: Any) -> None:
    _replaced.append((owner, name, vars(owner)[name]))
    setattr(owner, name, new)


@cache
def adapter_class() -> type[Gemma4MoEStateDictAdapter]:
    """Return our adapter's class, derived from NeMo's `StateDictAdapter` and `MoESplitExpertsStateDictMixin` too.

    Raises:
        UsageError: NeMo AutoModel is not installed.
    """
    nemo = nemo_contract.find()

    class Installed(Gemma4MoEStateDictAdapter, nemo.mixin, nemo.interface):  # type: ignore[misc, name-defined]
        __doc__ = Gemma4MoEStateDictAdapter.__doc__

        #: How NeMo names the experts in adapter_config.json's `target_parameters`.
        _v5_peft_target_parameters = (GATE_UP.hf, DOWN.hf)

        def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
            """Return the names that NeMo will save: it leaves a module's extra state out of hf checkpoints."""
            return [name for name in super().get_hf_state_dict_keys(state_dict) if "_extra_state" not in name]

    # NeMo-RL looks for a class by the ending of its name, and messages of NeMo show it.
    Installed.__name__ = Installed.__qualname__ = Gemma4MoEStateDictAdapter.__name__
    return Installed


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
