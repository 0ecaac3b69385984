"""Damage that many tensors share, named once: parameters emptied by ZeRO-3, experts pruned, scales lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.errors import ConfigError, IncompleteExpertsError, InputError, TensorShapeError, command_line
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.prefixes import split
from gemma4_moe.layout.table import DOWN, SCALE, SIZE_FIELDS, Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma4_moe.checkpoint.config import ConfigFile
    from gemma4_moe.layout.targets import Described

#: A program that writes another number of experts into a config.json.
SET_EXPERTS = (
    "import json, sys; path, count = sys.argv[1], int(sys.argv[2]); config = json.load(open(path)); "
    "text = config.get('text_config', config); text['num_experts'] = count; "
    "text['top_k_experts'] = min(count, text.get('top_k_experts') or count); "
    "json.dump(config, open(path, 'w'), indent=2)"
)


def shared_damage(tensors: Sequence[Described], layout: Layout, config: ConfigFile) -> InputError | None:
    """Return the error for damage that many tensors share, or None."""
    return _emptied(tensors) or _pruned(tensors, layout, config) or _without_scales(tensors, layout, config)


def _emptied(tensors: Sequence[Described]) -> InputError | None:
    empty = [tensor.name for tensor in tensors if tensor.shape == (0,) and split(tensor.name)[1]]
    if not empty:
        return None
    return TensorShapeError(
        "tensors without elements, as a save of one rank under DeepSpeed ZeRO-3 leaves them",
        tensor=empty[0],
        expected="the parameter's shape",
        found=f"[0], in {len(empty)} of {len(tensors)} tensors",
        hint="merge the run's own checkpoint: python3 RUN/zero_to_fp32.py RUN MERGED --safe_serialization; or save "
        "the model again with stage3_gather_16bit_weights_on_model_save",
    )


def _pruned(tensors: Sequence[Described], layout: Layout, config: ConfigFile) -> InputError | None:
    """Return the error for weights that agree on another number of experts than the config has."""
    counts: dict[int, list[Described]] = {}
    for tensor in tensors:
        name = lookup(tensor.name, layout)
        if name is not None and name.part.expert is None and name.rule.axes(layout)[:1] == ("E",) and tensor.shape:
            counts.setdefault(tensor.shape[0], []).append(tensor)
    said = config.sizes.get("E")
    if said is None or len(counts) != 1 or said in counts:
        return None
    ((count, members),) = counts.items()
    write = command_line("python3", "-c", SET_EXPERTS, str(config.path), count)  # python3 takes no `--` here
    return ConfigError(
        f"{SIZE_FIELDS['E'][0]} in config.json is not the weights' number of experts, which agree",
        tensor=members[0].name,
        file=config.path,
        expected=f"E = {said} from the config",
        found=f"E = {count} in all {len(members)} tensors of the experts, such as {list(members[0].shape)}",
        hint=f"if experts were pruned, the config is stale; write the number that is left into it: {write}",
    )


def _without_scales(tensors: Sequence[Described], layout: Layout, config: ConfigFile) -> InputError | None:
    """Return the error for an hf checkpoint of which no layer has its `per_expert_scale`."""
    found = [name for tensor in tensors if (name := lookup(tensor.name, layout)) is not None]
    downs = [name for name in found if name.rule is DOWN]
    if layout is not Layout.HF or not downs or any(name.rule is SCALE for name in found):
        return None
    convert = ["gemma4-moe", "convert", config.path.parent, "DST"]
    ones, base = command_line(*convert, "--scale", "ones"), command_line(*convert, "--scale-from", "BASE")
    return IncompleteExpertsError(
        "Incomplete expert weights: no layer has its per_expert_scale",
        tensor=downs[0].sibling(SCALE).hf,
        expected=f"a scale of E values in each layer, {SCALE.hf}",
        found=f"none for {len({name.layer_key for name in downs})} layers",
        hint=f"if it was folded into down_proj, it is one: {ones}; if a tool has lost it, it is that of the checkpoint "
        f"that the model was trained from, provided that training left it as it was: {base}",
    )
