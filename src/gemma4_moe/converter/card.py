"""The model card of a conversion: README.md, which says how the directory was made, and from what.

It names models and steps, never a path of the machine, and nothing that changes from run to run.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from gemma4_moe.hub.remote import commit_of
from gemma4_moe.hub.source import looks_like_hub_id
from gemma4_moe.sizes import format_size
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.converter.plan import Plan

#: A model's directory in the Hub's cache.
_CACHED = re.compile(r"models--(.+?)--(.+)")

#: Directories of a step whose names say nothing.
_INNER = ("model", "consolidated")


def card_of(plan: Plan, source: Checkpoint, base: Checkpoint | None, name: str, given_back: Mapping[str, int]) -> bytes:
    """Return the card of a model that is called `name`; `given_back` are the manifest's counts."""
    origin = None if base is None else model_name(base)
    head = ["library_name: transformers"]
    if origin is not None and looks_like_hub_id(origin):
        head.append(f"base_model: {json.dumps(origin)}")
    parts = ", in parts" if source.in_parts else ""
    facts = [
        f"made from: `{model_name(source)}`, in the {plan.source_layout} layout{parts}",
        f"layout: {plan.target_layout}, {len(plan.tensors):,} tensors, {format_size(plan.target_bytes)}, "
        + " and ".join(sorted({tensor.dtype.name for tensor in plan.tensors.values()})),
    ]
    if origin is not None:
        own, count = sum(given_back.values()), sum(experts.weights.shape[0] for experts in plan.bases.values())
        facts.append(f"base: `{origin}`; {own:,} of {count:,} experts have its `down_proj` and `per_expert_scale`")
    rounded = "No value was rounded" if not plan.inexact else "Values were rounded to the dtype that was asked for"
    return "\n".join(
        [
            *("---", *head, "---", "", f"# {name}", ""),
            f"Made by gemma4-moe {__version__}. {rounded}.",
            "",
            *(f"- {fact}" for fact in facts),
            "",
            "`gemma4-moe verify DIRECTORY` compares every file with its hash in `gemma4_moe.json`.",
            "",
        ]
    ).encode()


def model_name(checkpoint: Checkpoint) -> str:
    """Return the name of a model: its Hub id, or that of its directory or step."""
    parts = [part for part in checkpoint.path.parts if part not in _INNER] or ["model"]
    if commit_of(checkpoint) is not None:
        return "/".join(parts[-2:]).partition("@")[0]
    cached = next((found for part in parts if (found := _CACHED.fullmatch(part)) is not None), None)
    return parts[-1] if cached is None else f"{cached[1]}/{cached[2]}"
