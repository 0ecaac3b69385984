"""Tensors of a checkpoint against those that its model has: missing ones, unknown ones, others of another shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.errors import ConfigError, InputError, TensorShapeError, UnknownTensorError
from gemma4_moe.layout.model_tensors import AUDIO, called_for
from gemma4_moe.layout.names import fold_names, lookup
from gemma4_moe.layout.prefixes import TEXT_PREFIX
from gemma4_moe.layout.table import Layout, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.config import ConfigFile
    from gemma4_moe.layout.inventory import Inventory
    from gemma4_moe.layout.targets import Described

    Shapes = Mapping[str, tuple[int, ...]]


def expected_shapes(config: ConfigFile, weights: Shapes | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a config's model, by hf name.

    Args:
        config: The model's config.json. Where weights are given it may lack fields that decide a name or a shape.
        weights: Those of a checkpoint of the same model, by hf name, if there is one: the audio tower, which the config
            does not tell, is known from them.

    Raises:
        ConfigError: The config lacks such a field, and there are no weights.
    """
    try:
        called = called_for(config.document)
    except ConfigError as error:
        if weights is None:
            raise ConfigError(error.problem, file=config.path, **error.facts, hint=error.hint) from error
        return dict(weights)
    return called | dict(weights or {})


def check_complete(
    found: Shapes, expected: Shapes, config: ConfigFile, weights: Path | None, *, allow_missing: bool
) -> list[str]:
    """Check tensors against those that a model has, and return the names of those that are missing.

    Args:
        found: Shapes by hf name.
        expected: Those of `expected_shapes`.
        config: The model's config.
        weights: The directory of the weights that `expected` was taken from, if any.
        allow_missing: Whether tensors may be missing.

    Raises:
        UnknownTensorError: Tensors that the model does not have.
        TensorShapeError: A tensor of another shape.
        InputError: Tensors are missing.
    """
    origin = config.path if weights is None else weights
    unknown = [name for name in found if name not in expected and not (weights is None and name.startswith(AUDIO))]
    missing = [name for name in expected if name not in found]
    if unknown:
        raise UnknownTensorError(
            f"tensors that the model of {origin} does not have",
            tensor=unknown[0],
            expected=f"names of the {len(expected)} tensors of the model",
            found=f"{len(unknown)} others: {_folded(unknown)}",
            hint=_cause(unknown, expected, config),
        )
    for error in _other_shapes(found, expected, origin):
        raise error
    if missing and not allow_missing:
        hint = "give the state of the whole model, buffers included; or, for a part such as a pipeline stage, "
        raise _lacks(missing, expected, origin, hint + "allow_partial=True")
    return missing


def incomplete(tensors: Iterable[Described], inventory: Inventory, config: ConfigFile) -> Iterator[InputError]:
    """Yield the errors for tensors that the config calls for and that are missing, or have another shape.

    The inventory holds the tensors, and has found no fault in them. Nothing is yielded where `unsaid` names a field.
    """
    expected, found = _called(config), _hf_shapes(tensors, inventory)
    if not isinstance(expected, dict):
        return
    yield from _other_shapes(found, expected, config.path)
    if missing := [name for name in expected if name not in found]:
        hint = "save the model again with all its tensors, buffers included, or get the checkpoint again"
        yield _lacks(missing, expected, config.path, hint)


def uncalled(names: Iterable[str], layout: Layout, config: ConfigFile) -> list[str]:
    """Return the names of a layout that the config does not call for; none where `unsaid` names a field.

    An output head that is the embedding, and the audio tower, are not among them.
    """
    expected = _called(config)
    if not isinstance(expected, dict):
        return []
    expected |= {"lm_head.weight": ()}
    same = (name for name in names if lookup(name, layout) is None)  # all others are in layers that the config counts
    return [name for name in same if name not in expected and not name.startswith(AUDIO)]


def unsaid(config: ConfigFile) -> str | None:
    """Return the field that a config lacks to say which tensors its model has, as "a sensible <field>", or None."""
    called = _called(config)
    return called if isinstance(called, str) else None


def _called(config: ConfigFile) -> dict[str, tuple[int, ...]] | str:
    """Return the shapes that a config calls for, or the field that it lacks to say so."""
    try:
        return called_for(config.document)
    except ConfigError as error:
        return error.facts["expected"]


def known_shapes(config: ConfigFile) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a config calls for, by the names in both layouts; none where `unsaid` names a field."""
    called = _called(config)
    if not isinstance(called, dict):
        return {}
    names = [name for each in called if (name := lookup(each, Layout.HF)) is not None and name.rule.in_nemo]
    return {name.nemo: shape_of(name.rule, Layout.NEMO, config.sizes) for name in names} | called


def _hf_shapes(tensors: Iterable[Described], inventory: Inventory) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by hf name, current spelling."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        name = inventory.names[tensor.name]
        if name is None or not name.rule.hf_axes:
            shapes[tensor.name if name is None else name.hf] = tensor.shape
            continue
        rules = name.rule.yields(Layout.HF) if inventory.layout is Layout.NEMO else (name.rule,)
        sizes = inventory.sizes(name.prefix)
        shapes |= {name.sibling(rule).hf: shape_of(rule, Layout.HF, sizes) for rule in rules}
    return shapes


def _other_shapes(found: Shapes, expected: Shapes, origin: Path) -> Iterator[InputError]:
    for name, shape in expected.items():
        if name in found and tuple(found[name]) != tuple(shape):
            yield TensorShapeError(
                f"a tensor of another shape than in the model of {origin}",
                tensor=name,
                expected=list(shape),
                found=list(found[name]),
                hint="give the config of the same model",
            )


def _lacks(missing: list[str], expected: Shapes, origin: Path, hint: str) -> InputError:
    return InputError(
        f"tensors of the model of {origin} are missing",
        tensor=missing[0],
        expected=f"all {len(expected)} tensors of the model",
        found=f"without {len(missing)}: {_folded(missing)}",
        hint=hint,
    )


def folded(names: Iterable[str]) -> list[str]:
    """Return names folded over their numbers, each with the count of those that it stands for if it is several."""
    return [f"{name} ({len(members)})" if len(members) > 1 else name for name, members in fold_names(names).items()]


def _folded(names: Iterable[str]) -> str:
    shown = folded(names)
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _cause(unknown: list[str], expected: Shapes, config: ConfigFile) -> str:
    """Return the next step for names that a model lacks: most often they belong to its other kind."""
    own = TEXT_PREFIX.get(str(config.model_type), "")
    for kind, prefix in TEXT_PREFIX.items():
        if prefix != own and any(own + name.removeprefix(prefix) in expected for name in unknown):
            said = (
                "text-only names under a multimodal config" if kind == "gemma4_text" else "names of a multimodal model"
            )
            return f"these are {said}: give config_from a directory whose config.json has model_type {kind}"
    return "leave tensors that are no part of the model out of the state"
