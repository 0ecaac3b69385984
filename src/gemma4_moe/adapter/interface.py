"""The interface that NeMo AutoModel expects of a state-dict adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

#: Names and values: a mapping, or an iterable of pairs, which is consumed pair by pair.
StateDict = Mapping[str, Any] | Iterable[tuple[str, Any]]


class StateDictAdapter(ABC):
    """Converts state dicts between a model's own layout and that of its published checkpoint."""

    _supports_low_memory_dcp_load: ClassVar[bool] = False

    @property
    def supports_low_memory_dcp_load(self) -> bool:
        """Whether `to_hf(for_checkpoint_load=True)` returns views of the model's storage."""
        return self._supports_low_memory_dcp_load

    @property
    def checkpoint_key_aliases(self) -> dict[str, str]:
        """Other names of tensors in a checkpoint, by their hf names: none."""
        return {}

    @abstractmethod
    def from_hf(self, hf_state_dict: StateDict, device_mesh: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return a state dict, given in the hf layout, in the model's own."""

    @abstractmethod
    def to_hf(
        self, state_dict: StateDict, exclude_key_regex: str | None = None, quantization: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Return a state dict in the hf layout."""

    @abstractmethod
    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> list[tuple[str, Any]]:
        """Return (hf name, tensor) pairs for one tensor."""

    @abstractmethod
    def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
        """Return the names of the state dict that `to_hf` would return."""

    def iter_checkpoint_load_parts(
        self, model_state_dict: Mapping[str, Any], device_mesh: Any = None
    ) -> Iterator[Any] | None:
        """Return None: the whole model is loaded at once."""
        del model_state_dict, device_mesh
        return None

    def map_peft_target_module_to_hf(self, name: str, *, v4_compatible: bool = False) -> str:
        """Return `name`: a module has the same name in the hf layout."""
        del v4_compatible
        return name
