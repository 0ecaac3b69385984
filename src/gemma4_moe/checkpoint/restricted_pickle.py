"""Pickles of strangers, read without importing or running anything that they name.

A pickle is a program: it names functions and calls them. Here every name that it may use is given with a stand-in of
our own, as one pair of module and name, never a whole module. Any other name is refused when the program comes to it,
and nothing was imported before. Operations that no writer of plain data needs, or that reserve memory by a number in
the file, are refused before the program starts.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from typing import TYPE_CHECKING, Any

from gemma4_moe.errors import CheckpointFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    #: What stands in for each (module, name).
    StandIns = Mapping[tuple[str, str], Any]

#: Operations that copy into a buffer of a size that they name, or reach for registries and buffers of a process.
_REFUSED = frozenset({"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID"})

#: Operations that store under a number, which must not be far above those that were stored before.
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})

_FAILURES = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError),
    *(ImportError, OverflowError, MemoryError, RecursionError, AssertionError, Warning),
)

_UNTRUSTED = "don't use this checkpoint unless you know who wrote it; or save it as safetensors with torch"


class Record:
    """An object of a pickle: its attributes as they were stored, or `state` if that is no dict."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def get(self, name: str) -> Any:
        """Return an attribute that was stored, or None."""
        return self.__dict__.get(name)


def load(raw: bytes, stand_ins: StandIns, *, file: object, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Return the object of a pickle, built of stand-ins.

    Args:
        raw: The pickle.
        stand_ins: All names that it may use.
        file: Its place, for errors.
        persistent: Takes the persistent ids; without it the pickle may have none.

    Raises:
        CheckpointFormatError: It is damaged, or uses a name or an operation that it should not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # damaged text is also one with escapes that Python has deprecated
            _check_operations(raw)
        return _Unpickler(raw, stand_ins, persistent).load()
    except _FAILURES as error:
        raise CheckpointFormatError(
            "a pickle that is damaged, or that is not what torch.distributed.checkpoint writes; it was not run",
            file=file,
            expected="names of torch's checkpoint metadata, and plain data",
            found=str(error)[:200] or type(error).__name__,
            hint=_UNTRUSTED,
        ) from error


def _check_operations(raw: bytes) -> None:
    for number, (operation, argument, _) in enumerate(pickletools.genops(raw)):
        if operation.name in _REFUSED:
            raise pickle.UnpicklingError(f"the operation {operation.name}")
        if operation.name in _PUTS and int(argument or 0) > number:
            raise pickle.UnpicklingError(f"{operation.name} {argument}")


class _Unpickler(pickle.Unpickler):
    def __init__(self, raw: bytes, stand_ins: StandIns, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(raw))
        self._stand_ins, self._persistent = stand_ins, persistent

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands in for a name. Nothing is imported."""
        try:
            return self._stand_ins[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Return what a persistent id stands for."""
        if self._persistent is None:
            raise pickle.UnpicklingError("a persistent id")
        return self._persistent(pid)
