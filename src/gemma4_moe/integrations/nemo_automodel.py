"""Make NeMo AutoModel's Gemma 4 MoE model, its Checkpointer and NeMo-RL use our adapter.

`install` replaces three names: the adapter's class in the model's module, the same class in the adapter's own module,
which NeMo-RL searches, and the one method of the Checkpointer that reads a checkpoint into a model's own storage.
It replaces nothing unless every part of NeMo that it depends on is as expected.
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
from gemma4_moe.layout.table import DOWN, SCALE, Layout
from gemma4_moe.layout.wrappers import is_extra_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

    import torch

    from gemma4_moe.adapter.interface import StateDict

__all__ = ["adapter_class", "install", "installed", "uninstall"]

#: Each replaced name: the module or class that has it, the name, and the original object.
_replaced: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Make NeMo AutoModel use our adapter for Gemma 4 MoE models built from now on.

    A second call changes nothing. A model that exists already keeps its adapter: assign
    `adapter_class()(text_config, moe_config, backend, dtype=...)` to its `state_dict_adapter`.

    Raises:
        UsageError: NeMo AutoModel is not installed, or not as expected; the message names the part.

    Warns:
        UserWarning: The version is not the tested one; the message lists the checks that passed.
    """
    if _replaced:
        return
    nemo = nemo_contract.find()
    nemo_contract.check(nemo)
    adapter = adapter_class()
    _replace(nemo.model, ADAPTER, adapter)
    _replace(nemo.adapter_module, ADAPTER, adapter)
    _replace(nemo.checkpointer, READ, refusing_to_round_twice(getattr(nemo.checkpointer, READ), nemo.checkpointing))


def uninstall() -> None:
    """Restore every name that `install` replaced; models that exist keep their adapter."""
    while _replaced:
        holder, name, original = _replaced.pop()
        setattr(holder, name, original)


@contextmanager
def installed() -> Iterator[None]:
    """Install for a `with` block; an installation from before the block stays."""
    was_installed = bool(_replaced)
    install()
    try:
        yield
    finally:
        if not was_installed:
            uninstall()


def _replace(holder: Any, name: str, new: Any) -> None:
    _replaced.append((holder, name, vars(holder)[name]))
    setattr(holder, name, new)


@cache
def adapter_class() -> type[Gemma4MoEStateDictAdapter]:
    """Return our adapter's class, derived also from NeMo's `StateDictAdapter` and `MoESplitExpertsStateDictMixin`."""
    nemo = nemo_contract.find()

    class Installed(Gemma4MoEStateDictAdapter, nemo.mixin, nemo.interface):  # type: ignore[misc, name-defined]
        __doc__ = Gemma4MoEStateDictAdapter.__doc__

        #: The expert parameters that adapter_config.json may name: none, as long as LoRA on them is refused.
        _v5_peft_target_parameters = ()

        def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
            """Return the names that NeMo saves: all but a module's `_extra_state`."""
            return [name for name in super().get_hf_state_dict_keys(state_dict) if not is_extra_state(name)]

    # NeMo-RL finds a class by the ending of its name, and NeMo's messages show the name.
    Installed.__name__ = Installed.__qualname__ = Gemma4MoEStateDictAdapter.__name__
    return Installed


def refusing_to_round_twice(read: Callable[..., Any], checkpointing: ModuleType) -> Callable[..., Any]:
    """Return NeMo's `Checkpointer._do_load` with a check of the files' dtypes before it."""

    @wraps(read)
    def guarded(
        checkpointer: Any, state_dict: dict[str, Any], path: str, storage_reader: Any = None, is_init_step: bool = False
    ) -> Any:
        loaded = {name: value for name, value in state_dict.items() if destinations.native_of(value) is not None}
        if loaded:
            reader = checkpointing._maybe_msc_reader(path, storage_reader)
            metadata = checkpointing._get_checkpoint_metadata(path, reader).state_dict_metadata
            dtypes_found = {name: metadata[name].properties.dtype for name in loaded if name in metadata}
            refuse_two_roundings(loaded, dtypes_found, path)
        return read(checkpointer, state_dict, path, storage_reader, is_init_step)

    return guarded


def refuse_two_roundings(
    loaded: Mapping[str, torch.Tensor], file_dtypes: Mapping[str, torch.dtype], path: object
) -> None:
    """Check that reading a checkpoint into destinations and then folding the scale rounds only once.

    Destinations and the checkpoint's dtypes are given by hf name. A missing tensor is for the reader to refuse.
    """
    for name, destination in loaded.items():
        found = lookup(name, Layout.HF)
        if found is None or found.rule not in (DOWN, SCALE) or name not in file_dtypes:
            continue
        file, model = dtypes.named(str(file_dtypes[name])), dtypes.named(str(destination.dtype))
        if not dtypes.is_exact(file, model):
            raise UsageError(
                f"an in-place load would round twice: the checkpoint has {file.name}, its destination {model.name}",
                tensor=name,
                file=path,
                expected=f"a checkpoint whose values are all values of {model.name}",
                found=file.name,
                hint=f"load with gemma4_moe.load_hf, which rounds once; or make the model in {file.name}; "
                f"or start from a checkpoint in {model.name}",
            )
