"""The interface that a training framework asks of a model's state-dict adapter; the names are NeMo AutoModel's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

#: Names and tensors: a mapping, or an iterable of pairs that is consumed one by one.
StateDict = Mapping[str, Any] | Iterable[tuple[str, Any]]


class StateDictAdapter(ABC):
    """Converts between a model's own state dict and that of its published checkpoint."""

    _supports_low_memory_dcp_load: ClassVar[bool] = False

    @property
    def supports_low_memory_dcp_load(self) -> bool:
        """Whether `to_hf(for_checkpoint_load=True)` gives destinations that alias the model's storage."""
        return self._supports_low_memory_dcp_load

    @property
    def checkpoint_key_aliases(self) -> dict[str, str]:
        """Other names under which a checkpoint may hold a tensor; none."""
        return {}

    @abstractmethod
    def from_hf(self, hf_state_dict: StateDict, device_mesh: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Convert a state dict from the hf layout."""

    @abstractmethod
    def to_hf(
        self, state_dict: StateDict, exclude_key_regex: str | None = None, quantization: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Convert a state dict to the hf layout."""

    @abstractmethod
    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> list[tuple[str, Any]]:
        """Convert one tensor to the hf layout."""

    @abstractmethod
    def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
        """Return the names that `to_hf` gives, without converting."""

    def iter_checkpoint_load_parts(
        self, model_state_dict: Mapping[str, Any], device_mesh: Any = None
    ) -> Iterator[Any] | None:
        """Return None: the model is loaded in one part."""
        del model_state_dict, device_mesh
        return None

    def map_peft_target_module_to_hf(self, name: str, *, v4_compatible: bool = False) -> str:
        """Return a module's name in the hf layout; modules keep their names."""
        del v4_compatible
        return name
