"""Everything that may stand before `layers.` in a tensor's name."""

#: Of models that are published, and of PEFT's around them.
KNOWN_PREFIXES = [
    "model.language_model.",
    "model.",
    "language_model.",
    "",
    "base_model.model.model.language_model.",
    "base_model.model.model.",
]

PREFIXES = [*KNOWN_PREFIXES, "model.encoder.", "encoder.layers.3.tower.", "with a space, a \n newline and ∂."]
