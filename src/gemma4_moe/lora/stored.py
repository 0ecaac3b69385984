"""Stored tensors of experts in PEFT's and vLLM's forms: the rows of the table that they are."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.errors import ConfigError, IncompleteExpertsError, TensorShapeError, UnsupportedCheckpointError
from gemma4_moe.layout.lora import LORA_ROWS, LoraForm, ParamWrapper
from gemma4_moe.layout.table import DOWN, GATE_UP
from gemma4_moe.lora.config import NATIVE_NAME, STAMP
from gemma4_moe.lora.modules import LoraTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.lora import LoraRow
    from gemma4_moe.layout.table import Rule
    from gemma4_moe.lora.config import LoraConfig
    from gemma4_moe.lora.modules import Array
    from gemma4_moe.lora.names import LoraName


def layout_in_use(
    stored: Mapping[str, StoredTensor], names: Mapping[str, LoraName], config: LoraConfig
) -> ParamWrapper | None:
    """Return the layout of PEFT's wrapper, from the stamp and the shapes; None without experts.

    With both weights adapted, shapes tell it: H and I appear twice each, and only one layout lets both agree.

    Raises:
        ConfigError: Stamp and shapes disagree, or neither tells.
    """
    shapes: defaultdict[str, dict[tuple[bool, str], tuple[int, ...]]] = defaultdict(dict)
    for name, meaning in names.items():
        if meaning.form is LoraForm.PEFT:
            shapes[meaning.path][meaning.is_inner, meaning.side] = stored[name].shape
    if not shapes:
        return None
    votes = {vote for own in shapes.values() if (vote := _vote(own)) is not None}
    known = votes | ({config.stamp} if config.stamp is not None else set())
    if len(known) == 1:
        return known.pop()
    raise ConfigError(
        "the layout of PEFT's expert tensors can't be told" if not known else "shapes and stamp of an adapter disagree",
        file=config.path,
        expected=f"one of {' and '.join(ParamWrapper)}, by peft_version here or by {STAMP} in {NATIVE_NAME}",
        found=" and ".join(sorted(known)) or "no stamp, and shapes that fit both",
        hint="write the peft_version that has saved the adapter into adapter_config.json",
    )


def _vote(shapes: Mapping[tuple[bool, str], tuple[int, ...]]) -> ParamWrapper | None:
    """Return the layout in which the shapes of one layer agree on H and on I; None if they don't say."""
    ends = {}
    for place in ((True, "A"), (True, "B"), (False, "A"), (False, "B")):
        if len(shapes.get(place, ())) != 2:
            return None
        ends[place] = shapes[place][1 if place[1] == "A" else 0]  # the axis without rank and experts
    is_current = ends[True, "A"] == ends[False, "B"] and ends[True, "B"] == 2 * ends[False, "A"]
    is_legacy = ends[True, "B"] == ends[False, "A"] and ends[True, "A"] == 2 * ends[False, "B"]
    if is_current == is_legacy:
        return None
    return ParamWrapper.CURRENT if is_current else ParamWrapper.LEGACY


def wrapped_rows(
    path: str, names: Mapping[str, LoraName], config: LoraConfig, layout: ParamWrapper
) -> dict[str, LoraRow]:
    """Return the row of each stored tensor of one layer's experts in PEFT's form.

    PEFT wraps a second parameter around the first. With one parameter only `target_parameters` says which.

    Raises:
        ConfigError: `target_parameters` does not name the parameters that the tensors belong to.
    """
    targets = [rule for rule in (GATE_UP, DOWN) if _is_targeted(path + rule.hf, config)]
    inner = any(meaning.is_inner for meaning in names.values())
    if len(targets) != 1 + inner:
        raise ConfigError(
            "target_parameters does not name the weights that the tensors belong to",
            tensor=next(iter(names)),
            file=config.path,
            expected=f"{1 + inner} of {GATE_UP.hf} and {DOWN.hf}",
            found=", ".join(config.parameters) or "no target_parameters",
            hint="put the target_parameters that the adapter was trained with into adapter_config.json",
        )
    if config.has_own_expert_rank and not config.ranks:
        raise UnsupportedCheckpointError(
            "experts of another rank than adapter_config.json says, which PEFT can't load",
            file=config.path,
            expected="their rank in rank_pattern",
            found=f"moe_rank_scaling in {NATIVE_NAME}",
            hint="convert NeMo's own directory of this adapter",
        )
    rules: dict[bool, Rule] = {True: GATE_UP, False: targets[-1]}
    sides = {row.side if layout is ParamWrapper.CURRENT else row.legacy_side: row.side for row in LORA_ROWS}
    return {
        name: next(row for row in LORA_ROWS if (row.rule, row.side) == (rules[found.is_inner], sides[found.side]))
        for name, found in names.items()
    }


def _is_targeted(parameter: str, config: LoraConfig) -> bool:
    return any(f".{parameter}".endswith(f".{name}") for name in config.parameters)


def experts_of_vllm(
    path: str, stored: Mapping[str, StoredTensor], names: Mapping[str, LoraName]
) -> dict[LoraRow, LoraTensor]:
    """Return the rows that one layer's matrices of single experts make.

    Raises:
        IncompleteExpertsError: An expert's matrix is missing.
        TensorShapeError: Matrices of one kind differ in shape or dtype.
    """
    matrices = {(m.projection, m.side, m.expert): stored[name] for name, m in names.items()}
    count = 1 + max(expert for *_, expert in matrices)
    found = {}
    for row in LORA_ROWS:
        if not any(
            (projection, row.side, expert) in matrices for projection in row.projections for expert in range(count)
        ):
            continue
        own: list[list[StoredTensor]] = []
        for expert in range(count):
            for projection in row.projections:
                if (projection, row.side, expert) not in matrices:
                    hint = "get the adapter's directory again; an adapter of some experts alone is not carried"
                    tensor = path + row.vllm(expert, projection)
                    raise IncompleteExpertsError("an adapter lacks an expert's matrix", tensor=tensor, hint=hint)
            own.append([matrices[projection, row.side, expert] for projection in row.projections])
        found[row] = _stacked(row, own)
    return found


def _stacked(row: LoraRow, experts: list[list[StoredTensor]]) -> LoraTensor:
    first = experts[0][0]
    for matrix in (matrix for own in experts for matrix in own):
        if matrix.shape != first.shape or matrix.dtype != first.dtype or len(matrix.shape) != 2:
            raise TensorShapeError(
                "matrices of one kind that differ",
                tensor=matrix.name,
                file=matrix.file.path,
                expected=f"{first.dtype.name} {list(first.shape)}, as {first.name} has",
                found=f"{matrix.dtype.name} {list(matrix.shape)}",
                hint="save the adapter again with the program that trained it",
            )
    rows, columns = first.shape
    together = len(experts[0]) if row.side == "B" else 1
    shape = (len(experts), together * rows, columns)

    def read() -> Array:
        result = np.empty(shape, first.dtype.numpy())
        for into, own in zip(result, experts, strict=True):
            for number, matrix in enumerate(own):
                values = matrix.read()
                if row.side == "B":
                    into[number * rows : (number + 1) * rows] = values
                elif number and into.tobytes() != values.tobytes():
                    raise _two_inputs(own[0], matrix)
                else:
                    into[...] = values
        return result

    return LoraTensor(first.name, first.dtype, shape, read)


def _two_inputs(first: StoredTensor, second: StoredTensor) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        "gate and up of an expert with an A of their own each, which no fused form holds",
        form="LoRA with two A",
        tensor=second.name,
        file=second.file.path,
        expected=f"the values of {first.name}",
        hint="merge the adapter with the program that trained it, and convert the merged model",
    )
