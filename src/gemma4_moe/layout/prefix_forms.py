"""Published forms whose names differ before `layers.` too: MLX's, and those of DiffusionGemma's decoder.

MLX puts a multimodal model's modules in another order; a checkpoint in its form is read under the model's own names.
DiffusionGemma's decoder is `model.decoder.` in the hf layout and `model.` in the nemo layout; its encoder, which shares
all weights but `layer_scalar`, keeps its names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

#: `model_type` of DiffusionGemma.
DIFFUSION_TYPES = ("diffusion_gemma", "diffusion_gemma_text")

_DECODER, _ENCODER, _MODEL = "model.decoder.", "model.encoder.", "model."


class PrefixForm(NamedTuple):
    """A form that is recognised by its prefixes.

    Attributes:
        sign: Matches the start of a name that only this form has.
        renames: Beginnings of names, and those that they are read under; the first that fits counts.
        note: A sentence for the user.
    """

    sign: re.Pattern[str]
    renames: tuple[tuple[str, str], ...]
    note: str

    def read(self, name: str) -> str:
        """Return the name that a tensor is read under."""
        for old, new in self.renames:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


PREFIX_FORMS = (
    PrefixForm(
        re.compile(r".*\.experts\.switch_glu\.", re.DOTALL),
        (
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model.language_model."),
            *(
                (f"{part}.", f"model.{part}.")
                for part in ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
            ),
        ),
        "MLX's prefixes are read as the Hugging Face model's: language_model.model. as model.language_model., and "
        "vision_tower. as model.vision_tower.",
    ),
    PrefixForm(
        re.compile(re.escape(f"{_DECODER}layers.")),
        ((_DECODER, _MODEL),),
        "the decoder of DiffusionGemma is model.decoder. in the hf layout and model. in the nemo layout; its encoder "
        "keeps its names",
    ),
)


def prefix_form(names: Collection[str]) -> PrefixForm | None:
    """Return the form whose sign and whose prefixes are among these names, or None."""
    for form in PREFIX_FORMS:
        if any(map(form.sign.match, names)) and any(form.read(name) != name for name in names):
            return form
    return None


def decoder_read(name: str) -> str:
    """Return the nemo layout's name of a tensor of DiffusionGemma's decoder; any other name as it is."""
    return _MODEL + name.removeprefix(_DECODER) if name.startswith(_DECODER) else name


def decoder_written(name: str) -> str:
    """Return the hf name of a tensor of DiffusionGemma by its name in the nemo layout."""
    if name.startswith(_MODEL) and not name.startswith((_ENCODER, _DECODER)):
        return _DECODER + name.removeprefix(_MODEL)
    return name
