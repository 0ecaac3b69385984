"""NeMo AutoModel: its Gemma 4 MoE model, its Checkpointer and NeMo-RL take our adapter once this is installed.

Three names are replaced: the adapter's class where the model's module looks it up, the same class in the module beside
it, where NeMo-RL looks, and the one method of the Checkpointer that reads a checkpoint into a model's own storage.
Nothing is replaced unless everything that it relies on is found as expected.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemma4_moe.integrations import nemo_contract
from gemma4_moe.integrations.nemo_adapter import adapter_class
from gemma4_moe.integrations.nemo_contract import ADAPTER, READ
from gemma4_moe.integrations.nemo_loading import refusing_to_round_twice

if TYPE_CHECKING:
    from collections.abc import Iterator

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
