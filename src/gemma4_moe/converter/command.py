"""The command line that resumes a conversion, from the arguments with which it was begun."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.errors import command_line
from gemma4_moe.hub.source import is_hub_id
from gemma4_moe.sizes import exact_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PLACES = ("source", "adapter", "target", "base", "scale_from", "config_from")

_SIZES = ("max_shard_size", "max_memory")

#: Arguments that say how a run begins or is watched, and not which run it is.
_OF_A_START = ("resume", "break_lock", "progress")


def resume_command(function: Callable[..., object], given: Mapping[str, Any]) -> str:
    """Return the command line that resumes a run of a function, whose name is the command's: `convert` or `merge`.

    `given` has the values of its parameters by name. Paths are absolute, so that the command works in any directory.
    """
    said = {name: value for name, value in given.items() if name not in _OF_A_START}
    said |= {name: _absolute(said[name]) for name in _PLACES if said.get(name) is not None}
    said |= {name: exact_size(parse_size(said[name])) for name in _SIZES}
    parameters = signature(function).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    defaults |= {name: exact_size(parse_size(defaults[name])) for name in _SIZES}
    places = [said.pop(name) for name, parameter in parameters.items() if parameter.default is Parameter.empty]
    options = option_words({name: value for name, value in said.items() if value != defaults[name]})
    return command_line("gemma4-moe", function.__name__, *places, *options, "--resume")


def option_words(given: Mapping[str, object]) -> list[object]:
    """Return options as they are typed, from values by the names of parameters."""
    words: list[object] = []
    for name, value in given.items():
        option = name.replace("_", "-")
        words += [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", value]
    return words


def _absolute(place: Any) -> object:
    with refusals("look at the path", place):  # of a working directory that is gone
        return place if is_hub_id(place) else expanded(place).absolute()
