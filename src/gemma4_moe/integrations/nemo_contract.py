"""The parts of NeMo AutoModel that the integration depends on, and a check of each.

Some of them are private. So a version passes only if it has every name, and if its code still uses it: replacing a name
that no code looks up would silently change nothing.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.adapter.state_dict_adapter import Gemma4MoEStateDictAdapter
from gemma4_moe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

#: The version that the tests run with.
TESTED = "0.7.0"

#: The adapter's class, which NeMo's model module looks up when it builds a model; the adapter's own module defines it.
ADAPTER = "Gemma4MoEStateDictAdapter"

#: The Checkpointer's method that reads files into a state dict.
READ = "_do_load"

_COMPONENTS = "nemo_automodel.components"


@dataclass(frozen=True, slots=True)
class Nemo:
    """The parts of an installed NeMo AutoModel: modules, and classes of them."""

    version: str  # without the local part of a development build
    model: ModuleType
    adapter_module: ModuleType
    checkpointing: ModuleType
    checkpointer: Any
    interface: Any
    mixin: Any


def find() -> Nemo:
    """Return the parts, imported; a UsageError names one that is missing."""
    checkpointing = _module(f"{_COMPONENTS}.checkpoint.checkpointing")
    return Nemo(
        version=str(_part(_module("nemo_automodel"), "__version__")).partition("+")[0],
        model=_module(f"{_COMPONENTS}.models.gemma4_moe.model"),
        adapter_module=_module(f"{_COMPONENTS}.models.gemma4_moe.state_dict_adapter"),
        checkpointing=checkpointing,
        checkpointer=_part(checkpointing, "Checkpointer"),
        interface=_part(_module(f"{_COMPONENTS}.checkpoint.state_dict_adapter"), "StateDictAdapter"),
        mixin=_part(_module(f"{_COMPONENTS}.moe.state_dict_mixin"), "MoESplitExpertsStateDictMixin"),
    )


def check(nemo: Nemo) -> None:
    """Check every part that the integration depends on; warn if another version passes."""
    passed = []
    for expected, is_so in _checks(nemo):
        if not is_so:
            raise UsageError(
                f"NeMo AutoModel {nemo.version} is not as this integration expects it; nothing was installed",
                expected=expected,
                hint=f"use nemo-automodel {TESTED}, or the version of this package that goes with yours",
            )
        passed.append(expected)
    if nemo.version != TESTED:
        warnings.warn(
            f"the integration was tested with NeMo AutoModel {TESTED}, not with {nemo.version}. Checked, and found: "
            + "; ".join(passed),
            stacklevel=3,
        )


def _checks(nemo: Nemo) -> Iterator[tuple[str, bool]]:
    """Yield each expectation and whether it holds."""
    theirs, read = getattr(nemo.adapter_module, ADAPTER, None), vars(nemo.checkpointer).get(READ)
    same = inspect.isclass(theirs) and getattr(nemo.model, ADAPTER, None) is theirs
    yield f"the model's module has the adapter's class of its adapter module as {ADAPTER}", same
    arguments = _takes(theirs, "config", "moe_config", "backend", "dtype")
    yield f"{ADAPTER} is made from config, moe_config, backend and dtype", arguments
    model = getattr(nemo.model, "Gemma4ForConditionalGeneration", None)
    yield f"Gemma4ForConditionalGeneration looks {ADAPTER} up when it is built", _mentions(model, "__init__", ADAPTER)
    abstract = getattr(nemo.interface, "__abstractmethods__", ())
    known = inspect.isclass(nemo.interface) and all(hasattr(Gemma4MoEStateDictAdapter, name) for name in abstract)
    yield "no method of StateDictAdapter is abstract that our adapter lacks", known
    yield "MoESplitExpertsStateDictMixin is a class", inspect.isclass(nemo.mixin)
    arguments = _takes(read, "state_dict", "path", "storage_reader", "is_init_step")
    yield f"Checkpointer.{READ} takes state_dict, path, storage_reader and is_init_step", arguments
    yield f"Checkpointer.load_model reads with {READ}", _mentions(nemo.checkpointer, "load_model", READ)
    asks = _mentions(nemo.checkpointer, "load_model", "for_checkpoint_load")
    yield "Checkpointer.load_model asks the adapter for destinations with for_checkpoint_load", asks
    for name in ("to_hf", "from_hf"):
        calls = _mentions(nemo.checkpointing, f"_maybe_adapt_state_dict_{name}", name)
        yield f"the checkpointing module calls {name} of state_dict_adapter", calls
    for name in ("_get_checkpoint_metadata", "_maybe_msc_reader"):
        arguments = _takes(getattr(nemo.checkpointing, name, None), "path", "storage_reader")
        yield f"the checkpointing module has {name} of path and storage_reader", arguments


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            "a part of NeMo AutoModel can't be imported",
            expected=name,
            found=str(error),
            hint=f"pip install nemo-automodel=={TESTED}",
        ) from error


def _part(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        problem, expected = "a part of NeMo AutoModel is not where it is expected", f"{name} in {module.__name__}"
        raise UsageError(problem, expected=expected, hint=f"use nemo-automodel {TESTED}")
    return getattr(module, name)


def _takes(function: Any, *names: str) -> bool:
    return callable(function) and set(names) <= set(inspect.signature(function).parameters)


def _mentions(holder: Any, method: str, name: str) -> bool:
    """Return whether a method's code has a name as a lookup, keyword or string."""
    code = getattr(inspect.unwrap(getattr(holder, method, None)), "__code__", None)  # type: ignore[arg-type]
    if code is None:
        return False
    keywords = (each for constant in code.co_consts if isinstance(constant, tuple) for each in constant)
    return name in (*code.co_names, *code.co_consts, *keywords)
