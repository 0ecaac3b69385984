"""Quantised weights of a checkpoint, read as if they were stored in bfloat16. A form is a file here and in `FORMS`.

`dequantised` is the one place that decides which tensors make up a weight and which stay as they are: names, dtypes and
shapes decide, and the config must agree. Everything after it knows plain tensors alone; their values are computed when
they are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.config import CONFIG_NAME
from gemma4_moe.checkpoint.quantised import compressed_tensors, modelopt, transformers_fp8
from gemma4_moe.checkpoint.quantised.claims import Claims, read_claims
from gemma4_moe.checkpoint.quantised.file import in_files
from gemma4_moe.checkpoint.quantised.weights import QuantisedWeight
from gemma4_moe.errors import CheckpointFormatError
from gemma4_moe.layout.dtypes import FLOAT8_E4M3
from gemma4_moe.layout.foreign import FOREIGN
from gemma4_moe.layout.names import fold_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.quantised.form import Form
    from gemma4_moe.checkpoint.stored import StoredTensor

#: Every form.
FORMS = (*compressed_tensors.FORMS, *transformers_fp8.FORMS, *modelopt.FORMS)

#: How the names end that no weight has by itself: those of packed numbers and of scales.
_SIGNS = tuple(
    {
        *(f".{last}" for form in FORMS for last in (form.scale, form.second) if last),
        *(f".{form.weight}" for form in FORMS if form.weight != "weight"),
        *(end for form in FORMS for end in (form.fused, form.fused_second) if end),
        *(f"{joint}{last}" for form in FORMS for last in form.beside for joint in (".", "_")),
        ".pre_quant_scale",  # ModelOpt's AWQ: it multiplies inputs, and belongs to no form that is read
    }
)
_SCALES = tuple(sign for sign in _SIGNS if sign not in {f".{form.weight}" for form in FORMS})

_OWN_FILES = "get the checkpoint again, all of its files from one place; or start from the unquantised checkpoint"


def dequantised(directory: Path, tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], str | None]:
    """Return a checkpoint's tensors with each quantised weight as one tensor, and without scales.

    Returns:
        The tensors in their order, and a note on the forms that were read; None if nothing is quantised.

    Raises:
        CheckpointFormatError: The config and the tensors contradict each other, or a weight's tensors do.
        ConfigError: The config can't be read, or says nothing sensible of the quantised weights.
    """
    has_config = (directory / CONFIG_NAME).is_file()  # `diff` compares float8 tensors of no model, too
    numbers = has_config and any(tensor.dtype == FLOAT8_E4M3 for tensor in tensors.values())
    quantised = numbers or any(name.endswith(_SIGNS) for name in tensors)
    if not quantised or any(_is_of_unread_form(name) for name in tensors):
        return dict(tensors), None
    claims = read_claims(directory)
    found = {weight.weight.name: (form, weight) for form, weight in _weights(tensors, claims)}
    _check_leftovers(tensors, found.values())
    _check_left(tensors, found, claims)
    plain = in_files(weight for _, weight in found.values())
    kept = {}
    for name, tensor in tensors.items():
        if name in found:
            weight = found[name][1]
            if weight.name != name and weight.name in tensors:
                raise _contradiction("two spellings of one tensor", tensors[weight.name], f"also {name}")
            kept[weight.name] = plain[weight.name]
        elif not name.endswith(_SIGNS):
            kept[name] = tensor
    forms = " and ".join(dict.fromkeys(form.name for form, _ in found.values()))
    return kept, f"{len(found):,} weights are dequantised: {forms}"


def _is_of_unread_form(name: str) -> bool:
    return any(form.tensor is not None and form.tensor.fullmatch(name) for form in FOREIGN if not form.dequantised)


def _weights(tensors: Mapping[str, StoredTensor], claims: Claims) -> Iterator[tuple[Form, QuantisedWeight]]:
    """Yield every quantised weight and its form."""
    first: tuple[Form, StoredTensor] | None = None
    for tensor in tensors.values():
        if tensor.name.endswith(_SCALES):
            continue
        fits = [form for form in FORMS if form.stores(tensor.dtype) and form.names(tensor.name) is not None]
        own = [form for form in fits if any(name in tensors for name in _names(form, tensor))]
        if not own and tensor.dtype != FLOAT8_E4M3 and not tensor.name.endswith(_SIGNS):
            continue
        form = _form(tensor, own or fits, claims)
        if first is not None and first[0].library != form.library:
            found = f"{tensor.name} of {form.name}, {first[1].name} of {first[0].name}"
            raise _contradiction("two conventions of quantised weights in one checkpoint", tensor, found)
        first = first or (form, tensor)
        yield form, _weight(form, tensor, tensors, claims)


def _names(form: Form, tensor: StoredTensor) -> list[str]:
    return [name for name in form.names(tensor.name) or () if name]


def _form(tensor: StoredTensor, fits: list[Form], claims: Claims) -> Form:
    """Return the form of a weight: the one of the library that the config names, whose tensors it has."""
    own = [form for form in fits if form.library == claims.library]
    if len(own) == 1:
        return own[0]
    libraries = " or ".join(dict.fromkeys(form.library for form in fits or FORMS))
    if claims.library is None:
        problem = "quantised weights, and a config that does not say which library quantised them"
        raise _contradiction(problem, tensor, f"no quant_method in {claims.file}", libraries)
    problem = "quantised weights that are not those of the library that the config names"
    raise _contradiction(problem, tensor, f"quant_method {claims.library} in {claims.file}", libraries)


def _weight(form: Form, tensor: StoredTensor, tensors: Mapping[str, StoredTensor], claims: Claims) -> QuantisedWeight:
    """Return one quantised weight; all of its tensors must be there, fit each other, and be called for."""
    names = form.names(tensor.name)
    assert names is not None, "a form that has this name"
    scale, second = (None if name is None else tensors.get(name) for name in names)
    for name, stored in zip(names, (scale, second), strict=True):
        if name is not None and stored is None:
            raise _contradiction(f"a quantised weight without its scale ({form.name})", tensor, "no such tensor", name)
    assert scale is not None, "checked above"
    module = tensor.name.removesuffix(f".{form.weight}")
    if pattern := _pattern_of(form, module, claims):
        problem = "a quantised weight whose layer the config leaves as it was"
        raise _contradiction(problem, tensor, f"{pattern!r} in {claims.file}", "a weight that is not quantised")
    shape = form.shape_of(tensor)
    grid = form.grid(shape, scale, claims.block) if len(shape) in (2, 3) and 0 not in shape else None
    if grid is None or not form.takes(scale):
        found = f"{scale.dtype.tag} {list(scale.shape)} for {tensor.dtype.tag} {list(tensor.shape)}"
        raise _contradiction("scales that don't fit their weight", scale, found, f"scales of {form.name}")
    if second is not None and not form.fits_second(shape, second):
        found = f"{second.dtype.tag} {list(second.shape)}"
        raise _contradiction("scales that don't fit their weight", second, found, "one F32 number")
    return QuantisedWeight(
        form.plain_name(tensor.name),
        shape,
        form.dtype_of(scale),
        form.numbers,
        tensor,
        scale,
        grid,
        second,
        form.divides,
    )


def _pattern_of(form: Form, module: str, claims: Claims) -> str | None:
    """Return the config's pattern that leaves a module as it is, or None."""
    return next((pattern for pattern in claims.patterns if form.leaves(pattern, module)), None)


def _check_leftovers(tensors: Mapping[str, StoredTensor], found: Iterable[tuple[Form, QuantisedWeight]]) -> None:
    """Check that every scale belongs to a weight, but for those of activations, which no weight needs."""
    used, beside = set(), set()
    for form, weight in found:
        used |= {each.name for each in (weight.weight, weight.scale, weight.second) if each is not None}
        beside |= {f"{joint}{last}" for last in form.beside for joint in (".", "_")}
    for tensor in tensors.values():
        if tensor.name.endswith(_SIGNS) and tensor.name not in used and not tensor.name.endswith(tuple(beside)):
            problem = "a scale of no quantised weight, or a second convention beside that of its weight"
            raise _contradiction(problem, tensor, f"{tensor.dtype.tag} {list(tensor.shape)}")


def _check_left(
    tensors: Mapping[str, StoredTensor], found: Mapping[str, tuple[Form, QuantisedWeight]], claims: Claims
) -> None:
    """Check that a weight is quantised if its like are, in other layers or experts, unless the config leaves it."""
    forms = {weight.name: form for form, weight in found.values()}
    names = {*forms, *(name for name in tensors if name not in found and not name.endswith(_SIGNS))}
    for members in fold_names(sorted(names)).values():
        like = [forms[name] for name in members if name in forms]
        for name in members if like else ():
            if name not in forms and _pattern_of(like[0], name.removesuffix(".weight"), claims) is None:
                problem = "a weight that is not quantised, where the config leaves none"
                said = f"{tensors[name].dtype.tag}, and no pattern for it in {claims.file}"
                raise _contradiction(problem, tensors[name], said, f"{like[0].name}, as its like have")


def _contradiction(
    problem: str, tensor: StoredTensor, found: str, expected: str | None = None
) -> CheckpointFormatError:
    return CheckpointFormatError(
        problem, tensor=tensor.name, file=tensor.file.path, expected=expected, found=found, hint=_OWN_FILES
    )
