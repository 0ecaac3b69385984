"""Names of tensors that don't fit the config: of a wrapped module, of the other kind of model, or of another prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.config import CONFIG_NAME
from gemma4_moe.errors import InputError, UnknownTensorError, command_line
from gemma4_moe.layout.prefixes import TEXT_PREFIX, fitted, is_multimodal, split
from gemma4_moe.layout.wrappers import WRAPPERS, without_wrappers, wrappers_in

if TYPE_CHECKING:
    from collections.abc import Collection

    from gemma4_moe.checkpoint.config import ConfigFile

#: A program that makes a text-only model's config of a multimodal one's, in place.
TEXT_CONFIG = (
    "import json, sys; path = sys.argv[1]; text = json.load(open(path))['text_config']; "
    "text['architectures'] = ['Gemma4ForCausalLM']; json.dump(text, open(path, 'w'), indent=2)"
)


def wrapped(names: Collection[str], config: ConfigFile) -> InputError | None:
    """Return the refusal of names that have components of torch's wrappers in them; None if there are none."""
    found = [name for name in names if wrappers_in(name)]
    if not found:
        return None
    components = sorted({component for name in found for component in wrappers_in(name)})
    sources = " and ".join(f"{component} ({WRAPPERS[component]})" for component in components)
    return UnknownTensorError(
        "names of a wrapped module",
        tensor=found[0],
        expected=without_wrappers(found[0]),
        found=f"{sources} in {len(found)} of {len(names)} names",
        hint=f"remove the wrappers on the way: {_strip(config)}",
    )


def misfit(names: Collection[str], config: ConfigFile) -> InputError | None:
    """Return the refusal of names, none of a wrapper, that the config's kind of model does not have."""
    kind = config.model_type
    if kind not in TEXT_PREFIX:
        return None
    is_text = kind == "gemma4_text"
    wrong = [name for name in names if fitted(name, kind) != name or (is_text and is_multimodal(name))]
    if not wrong:
        return None
    other = next(each for each in TEXT_PREFIX if each != kind)
    of_other = all(fitted(name, other) == name for name in names)
    if of_other and is_text:
        problem, hint = f"names of a multimodal model under a text-only {CONFIG_NAME}", _multimodal_hint(names, config)
    elif of_other:
        problem, hint = f"text-only names under a multimodal {CONFIG_NAME}", _text_hint(config)
    elif all(is_multimodal(name) for name in wrong):
        problem, hint = f"a multimodal model's tensors under a text-only {CONFIG_NAME}", _multimodal_hint(names, config)
    else:
        problem = f"names with another prefix than {CONFIG_NAME} calls for"
        hint = f"give each name the model's prefix on the way: {_strip(config)}"
    prefixes = sorted({split(name)[0] for name in wrong})
    return UnknownTensorError(
        problem,
        tensor=wrong[0],
        file=config.path,
        expected=f"{fitted(wrong[0], kind)}, for model_type {kind}",
        found=f"{' and '.join(map(repr, prefixes[:5]))} before {len(wrong)} of {len(names)} names",
        hint=hint,
    )


def _multimodal_hint(names: Collection[str], config: ConfigFile) -> str:
    """Return the next step for a multimodal model's names under a text-only config."""
    if any(map(is_multimodal, names)):
        copy = command_line("cp", f"BASE/{CONFIG_NAME}", config.path)
        return f"put the config of the model that it was trained from in its place: {copy}"
    return f"it has no vision tower: give each name a text-only model's prefix on the way: {_strip(config)}"


def _text_hint(config: ConfigFile) -> str:
    """Return the next step for text-only names under a multimodal config."""
    if config.document.get("vision_config") is None:
        return f"give each name the model's prefix on the way: {_strip(config)}"
    write = command_line("python3", "-c", TEXT_CONFIG, str(config.path))  # python3 takes no `--` here
    return f"the model has no vision tower; make its {CONFIG_NAME} a text-only model's: {write}"


def _strip(config: ConfigFile) -> str:
    return command_line("gemma4-moe", "convert", config.path.parent, "DST", "--strip-wrappers")
