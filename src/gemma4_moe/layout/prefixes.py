"""The prefixes of a model's names, and names that have others: of the other kind of model, doubled, or a wrapper's.

A name is a prefix and a stem. The stem begins at the component that names a part of the model, such as `layers`, and
the kind of the model decides what is before it.
"""

from __future__ import annotations

from gemma4_moe.layout.wrappers import without_wrappers

#: Before `layers.` in a model of each kind, by `model_type`.
TEXT_PREFIX = {"gemma4": "model.language_model.", "gemma4_text": "model."}

#: The parts that a multimodal model alone has, below `model.`.
_MULTIMODAL_PARTS = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")

_HEAD = "lm_head"

#: The modules of a text model outside all layers, each with a weight.
_TEXT_MODULES = (
    "embed_tokens",
    "norm",
    "embed_tokens_per_layer",
    "per_layer_model_projection",
    "per_layer_projection_norm",
)


def fitted(name: str, model_type: str | None) -> str:
    """Return `name` without wrappers, and with the prefix that it has in a model of this kind.

    A name in no part of the model keeps its prefix, and so does each name if the kind is unknown.
    """
    plain = without_wrappers(name)
    if model_type not in TEXT_PREFIX:
        return plain
    stem = split(plain)[1]
    if not stem:
        return plain
    if is_multimodal(plain):
        return f"model.{stem}"
    return stem if stem.startswith(f"{_HEAD}.") else TEXT_PREFIX[model_type] + stem


def split(name: str) -> tuple[str, str]:
    """Return the prefix and the stem of a name without wrappers; no stem if it is in no part of the model."""
    components = name.split(".")
    pairs = list(enumerate(zip(components, [*components[1:], ""], strict=True)))
    multimodal = [at for at, (component, _) in pairs if component in _MULTIMODAL_PARTS]
    layers = [at for at, (component, number) in pairs if component == "layers" and number.isdecimal()]
    others = [at for at, pair in pairs[-2:] if pair[0] in (*_TEXT_MODULES, _HEAD) and pair[1] == "weight"]
    for places in (multimodal, layers, others):
        if places:
            stem = ".".join(components[places[-1] :])  # the last: a prefix may be doubled inside a name
            return name.removesuffix(stem), stem
    return name, ""


def is_multimodal(name: str) -> bool:
    """Return whether a name is in a part that a text-only model does not have."""
    return any(component in _MULTIMODAL_PARTS for component in name.split("."))
