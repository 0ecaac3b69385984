"""Names of an adapter's tensors, explained in any of the three forms."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.errors import UnknownTensorError, UnsupportedCheckpointError
from gemma4_moe.layout.lora import ADAPTER_PREFIX, EXPERTS, LORA_ROWS, LoraForm, LoraRow
from gemma4_moe.layout.names import layer_of
from gemma4_moe.layout.table import MOE_MODULES, ROUTER_MODULE, Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEMO = {row.nemo: row for row in LORA_ROWS}
_PEFT = re.compile(rf"{re.escape(EXPERTS)}\.(?P<inner>base_layer\.)?lora_(?P<side>[AB])\.weight")
_VLLM = re.compile(
    rf"{re.escape(EXPERTS)}\.(?P<expert>0|[1-9][0-9]{{0,6}})\.(?P<projection>\w+)\.lora_(?P<side>[AB])\.weight",
    re.ASCII,
)
_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight", re.DOTALL)
_ROUTER = {layout: name.removesuffix(".") for layout, name in ROUTER_MODULE.items()}


class LoraName(NamedTuple):
    """The meaning of one name.

    Attributes:
        path: The name of its layer with its last dot, or "" for a module outside all layers.
        module: The module's name after `path`, in the hf layout; "" for experts.
        side: "A" or "B"; for experts in PEFT's form, the letter that the stored tensor has.
        form: The form that alone has such a name, or None.
        row: Its row of the table, for NeMo's form.
        is_inner: Whether PEFT's wrapper is around another one, for PEFT's form.
        expert: The expert, for vLLM's form.
        projection: The projection, for vLLM's form.
    """

    path: str
    module: str
    side: str
    form: LoraForm | None = None
    row: LoraRow | None = None
    is_inner: bool = False
    expert: int = -1
    projection: str = ""


def explain(name: str) -> LoraName:
    """Return the meaning of a name in an adapter's file.

    Raises:
        UnknownTensorError: No form has such a name.
        UnsupportedCheckpointError: It belongs to a method that is not carried.
    """
    own = name.removeprefix(ADAPTER_PREFIX)
    key = layer_of(own)
    path = "" if key is None else f"{key[0]}layers.{key[1]}."
    rest = own.removeprefix(path)
    if path and (row := _NEMO.get(rest)) is not None:
        return LoraName(path, "", row.side, LoraForm.NEMO, row)
    if path and (match := _PEFT.fullmatch(rest)) is not None:
        return LoraName(path, "", match["side"], LoraForm.PEFT, is_inner=match["inner"] is not None)
    if path and (match := _VLLM.fullmatch(rest)) is not None:
        projections = {projection for row in LORA_ROWS for projection in row.projections}
        if match["projection"] in projections:
            expert, projection = int(match["expert"]), match["projection"]
            return LoraName(path, "", match["side"], LoraForm.VLLM, expert=expert, projection=projection)
    match = _LINEAR.fullmatch(rest)
    if match is not None and match["module"] == _ROUTER[Layout.NEMO]:
        return LoraName(path, _ROUTER[Layout.HF], match["side"], LoraForm.NEMO)
    if match is not None and (match["module"] == _ROUTER[Layout.HF] or rest.split(".")[0] not in MOE_MODULES):
        return LoraName(path, match["module"], match["side"])
    if "lora_magnitude" in rest:
        hint = "merge it with the program that trained it, and convert the merged model"
        raise UnsupportedCheckpointError("a DoRA adapter, which is not carried", form="DoRA", tensor=name, hint=hint)
    raise UnknownTensorError(
        "a tensor in an adapter that no form of it has",
        tensor=name,
        expected=f"{ADAPTER_PREFIX}MODULE.lora_A.weight, or a name of experts in NeMo's, PEFT's or vLLM's form",
        hint="an adapter that only one program reads can be merged by that program: convert the merged model",
    )


def form_of(names: Mapping[str, LoraName], *, has_native_document: bool) -> LoraForm:
    """Return the form of an adapter's names. Linear modules alone are PEFT's, or NeMo's beside its document.

    Raises:
        UnknownTensorError: The names are of two forms.
    """
    found: dict[LoraForm, str] = {}
    for name, meaning in names.items():
        if meaning.form is not None:
            found.setdefault(meaning.form, name)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        problem, hint = "names of two forms in one adapter", "save it again with the program that trained it"
        raise UnknownTensorError(
            problem, tensor=second, expected=f"the {one} form, as {first} has", found=other, hint=hint
        )
    return next(iter(found), LoraForm.NEMO if has_native_document else LoraForm.PEFT)


def linear_in(module: str, form: LoraForm) -> str:
    """Return the name that a linear module of the hf layout has in a form."""
    if form is not LoraForm.NEMO or not is_router(module):
        return module
    return module.removesuffix(_ROUTER[Layout.HF]) + _ROUTER[Layout.NEMO]


def is_router(module: str) -> bool:
    """Return whether a module of the hf layout is a router's projection."""
    key = layer_of(module)
    return key is not None and module == f"{key[0]}layers.{key[1]}.{_ROUTER[Layout.HF]}"
