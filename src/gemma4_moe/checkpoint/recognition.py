"""The identity of a checkpoint: its layout, its spelling, its model, or the known form that is not converted.

Names and the config decide, never shapes: H may equal 2I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.completeness import incomplete
from gemma4_moe.checkpoint.damage import shared_damage
from gemma4_moe.checkpoint.misfits import misfit, wrapped
from gemma4_moe.errors import ConfigError, IncompleteExpertsError, InputError, UnsupportedCheckpointError
from gemma4_moe.layout.foreign import FOREIGN
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.prefix_forms import DIFFUSION_TYPES
from gemma4_moe.layout.spellings import CURRENT
from gemma4_moe.layout.table import CHECKPOINT_RULES, GATE_UP, Layout
from gemma4_moe.layout.targets import problems, targets_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from gemma4_moe.checkpoint.config import ConfigFile
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.spellings import Spelling
    from gemma4_moe.layout.table import Rule
    from gemma4_moe.layout.targets import Described, T, Target

#: `model_type` of the models that have these layers, and what each is called.
SUPPORTED_MODELS = {
    "gemma4": "multimodal Gemma 4",
    "gemma4_text": "text-only Gemma 4",
    **dict.fromkeys(DIFFUSION_TYPES, "DiffusionGemma"),
}

#: What `inspect` calls a model without experts.
DENSE = "dense"


class Recognition(NamedTuple):
    """The identity of a checkpoint, from its names and its config.

    Attributes:
        layout: The layout, or None if it is neither or can't be told.
        spelling: The name of its form, or of several with "and"; of a foreign form; "wrapped" or "none".
        refusal: The reason not to convert it.
    """

    layout: Layout | None
    spelling: str
    refusal: InputError | None = None

    def accepted(self) -> Layout:
        """Return the layout, or raise the refusal."""
        if self.refusal is not None:
            raise self.refusal
        assert self.layout is not None, "a checkpoint without a layout is refused"
        return self.layout


def recognise(names: Collection[str], config: ConfigFile) -> Recognition:
    """Recognise a checkpoint by all its tensor names and its config.json."""
    if (refusal := wrapped(names, config)) is not None:
        return Recognition(None, "wrapped", refusal)
    for form in (form for form in FOREIGN if not form.dequantised):
        if form.tensor is not None and (name := next(filter(form.tensor.fullmatch, names), None)) is not None:
            problem = form.reason or f"a {form.name} checkpoint, which is not converted"
            refusal = UnsupportedCheckpointError(problem, form=form.name, tensor=name, hint=form.hint)
            return Recognition(None, form.name, refusal)
    try:
        layout = layout_of(names, config.path.parent, config.model_type)
    except UnsupportedCheckpointError as error:
        refused = _relative(config) or (_dense(config) if config.is_dense else None) or error
        return Recognition(None, refused.form or "none", refused)
    known = [found for name in names if (found := lookup(name, layout)) is not None]
    seen = {(found.spelling, found.rule) for found in known if found.rule in found.spelling.names}
    spellings = {form.name for form, rule in seen if not any(_shares(other, form, rule) for other, _ in seen)}
    refusal = _wrong_model(config) or _no_experts(config) or misfit(names, config)
    return Recognition(layout, " and ".join(sorted(spellings)) or CURRENT.name, refusal)


def _shares(other: Spelling, form: Spelling, rule: Rule) -> bool:
    """Return whether another form has the names that a role has in this one: they then don't tell this one."""
    return other is not form and other.names.get(rule) == form.names[rule]


def layout_of(names: Collection[str], directory: Path, model_type: str | None = None) -> Layout:
    """Return the layout of a checkpoint's tensor names. Messages have its directory and, if known, its model type.

    Raises:
        UnsupportedCheckpointError: They belong to both layouts, or to none.
    """
    layouts = [layout for layout in Layout if any(lookup(name, layout) for name in names)]
    if len(layouts) == 1:
        return layouts[0]
    if layouts:
        problem, expected = "names of both layouts in one checkpoint", "the names of one layout, hf or nemo"
        hint = "a directory may hold the files of two checkpoints: separate them"
    else:
        problem = "no mixture-of-experts layer in this checkpoint"
        expected = f"tensors such as <prefix>layers.<number>.{GATE_UP.hf}"
        hint = "only Gemma 4 models with experts (26B-A4B) have two layouts; a dense model needs no conversion"
    found = f"{len(names)} tensors{f' of a model of type {model_type}' if model_type else ''}"
    raise UnsupportedCheckpointError(problem, file=directory, expected=expected, found=found, hint=hint)


def _relative(config: ConfigFile) -> UnsupportedCheckpointError | None:
    """Return the refusal of a relative, by its `model_type`, or of weights that the config calls quantised."""
    quantisation = config.document.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    for form in FOREIGN:
        if config.model_type in form.model_types:
            found = f"model_type {config.model_type}"
            return UnsupportedCheckpointError(
                str(form.reason), form=form.name, file=config.path, found=found, hint=form.hint
            )
        if method in form.quant_methods and not form.dequantised:
            problem = f"config.json says that the weights are quantised: {form.name}"
            found = f"quant_method {method}"
            return UnsupportedCheckpointError(problem, form=form.name, file=config.path, found=found, hint=form.hint)
    return None


def _no_experts(config: ConfigFile) -> ConfigError | None:
    """Return the refusal of a dense model's config beside weights with experts."""
    if not config.is_dense:
        return None
    return ConfigError(
        "config.json says that the model has no experts, and its weights have some",
        file=config.path,
        expected="num_experts, a number",
        found=f"num_experts {config.text.get('num_experts')}",
        hint="put the config.json of the model that it was trained from in its place",
    )


def _dense(config: ConfigFile) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        "a dense model needs no conversion: it is the same in both layouts",
        form=DENSE,
        file=config.path,
        expected="num_experts, a number",
        found="no experts",
        hint="use it as it is",
    )


def _wrong_model(config: ConfigFile) -> InputError | None:
    if (relative := _relative(config)) is not None:
        return relative
    if config.model_type not in SUPPORTED_MODELS:
        return ConfigError(
            "config.json does not name a Gemma 4 model",
            file=config.path,
            expected=f"model_type, one of {', '.join(SUPPORTED_MODELS)}",
            found=repr(config.model_type),
            hint="put the model's own config.json beside its weights",
        )
    if config.document.get("quantization_config"):
        problem, hint = "config.json says that the weights are quantised", "start from the unquantised checkpoint"
        return UnsupportedCheckpointError(problem, file=config.path, found="quantization_config", hint=hint)
    return None


def refuse_other_models(config: ConfigFile) -> None:
    """Check that a config names a Gemma 4 model with experts, whose weights are not quantised."""
    refusal = _wrong_model(config) or (_dense(config) if config.is_dense else None)
    if refusal is not None:
        raise refusal


def wrong_tensors(tensors: Iterable[Described], inventory: Inventory, config: ConfigFile) -> Iterator[InputError]:
    """Yield every wrong tensor, the first incomplete layer, layers that the config does not count, and missing tensors.

    Damage that many tensors share is one error. Layers are counted where all names fit the config, and missing tensors
    looked for where nothing else is wrong.
    """
    tensors = list(tensors)
    if (damage := shared_damage(tensors, inventory.layout, config)) is not None:
        yield damage
        return
    found = list(problems(tensors, inventory, CHECKPOINT_RULES[inventory.layout]))
    yield from found
    if misfit([tensor.name for tensor in tensors], config) is not None:
        return
    try:
        _check_layer_count(inventory, config)
    except InputError as error:
        yield error
        return
    if not found:
        yield from incomplete(tensors, inventory, config)


def checkpoint_targets(
    tensors: Iterable[T],
    layout: Layout,
    config: ConfigFile,
    cast: DType | None = None,
    *,
    all_layers: bool = True,
    complete: bool = False,
    to: Layout | None = None,
) -> dict[str, Target[T]]:
    """Return every tensor that a checkpoint becomes in layout `to`, after the checks of `wrong_tensors`.

    By default `to` is the other layout. Without `all_layers` it may have some of the layers that the config counts. The
    errors of `incomplete` are raised if it must be `complete`.
    """
    tensors, inventory = list(tensors), Inventory(layout, config.sizes)
    if (damage := shared_damage(tensors, layout, config)) is not None:
        raise damage
    targets = targets_of(tensors, inventory, CHECKPOINT_RULES[layout], cast, to=to)
    _check_layer_count(inventory, config, all_layers=all_layers)
    for error in incomplete(tensors, inventory, config) if complete else ():
        raise error
    return targets


def _check_layer_count(inventory: Inventory, config: ConfigFile, *, all_layers: bool = True) -> None:
    """Check that the layers with experts are those that the config counts."""
    if config.layers is None:
        return
    for prefix in sorted({prefix for prefix, _ in inventory.layers}):
        there = {layer for owner, layer in inventory.layers if owner == prefix}
        missing = sorted(set(range(config.layers)) - there)
        if missing and all_layers:
            raise IncompleteExpertsError(
                f"Incomplete expert weights: no tensor of {len(missing)} layers",
                tensor=f"{prefix}layers.{missing[0]}.experts",
                expected=f"experts in {config.layers} layers, as {config.path} counts",
                found=f"experts in {len(there)} layers; none in {missing[:8]}",
                hint="a shard file of the checkpoint may be missing",
            )
        extra = sorted(there - set(range(config.layers)))
        if extra:
            raise ConfigError(
                "more layers with experts than the config counts",
                tensor=f"{prefix}layers.{extra[0]}.experts",
                file=config.path,
                expected=f"layers 0 to {config.layers - 1}",
                found=f"layer {extra[0]}",
                hint="check that the config and the tensors belong to the same model",
            )
