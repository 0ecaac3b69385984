"""The contents of a set of tensors: each name explained, each shape and dtype checked, each layer complete.

Everything that takes tensors in does so through an `Inventory`, so that all refuse the same things in the same words.
An inventory sees names, shapes and dtypes alone, never values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.errors import DuplicateTensorError, IncompleteExpertsError, TensorShapeError
from gemma4_moe.layout.dtypes import require_expert_dtype
from gemma4_moe.layout.names import LayerKey, MoEName, lookup, parse
from gemma4_moe.layout.spellings import WHOLE, Part
from gemma4_moe.layout.table import Layout, Operation, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

#: The tensors of one role of a layer, by the share of it that each holds: full name and dtype.
Parts = dict[Part, tuple[str, str | None]]

_COMPLETE = "give all of a layer's tensors together; a shard file of the checkpoint may be missing"


class Inventory:
    """The tensors of one state dict or checkpoint in one layout.

    Sizes of E, H and I that are given hold for every layer. Those that aren't are learned from the first tensor that
    shows them, for each prefix on its own, and must agree from there on. With `any_router` the shapes of the router's
    tensors are not checked, which both layouts share.

    Attributes:
        leaves_out: Returns whether a tensor is not converted, by name: a layer may lack it.
        names: The meaning of each name, in the order in which they were added; None if both layouts have the name.
        layers: For each layer, the row of every tensor seen and the tensors that make it up.
    """

    def __init__(
        self,
        layout: Layout,
        sizes: Mapping[str, int] | None = None,
        *,
        any_router: bool = False,
        leaves_out: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.layout = layout
        self.leaves_out = leaves_out
        self.names: dict[str, MoEName | None] = {}
        self.layers: dict[LayerKey, dict[Rule, Parts]] = {}
        self._given = dict(sizes or {})
        self._learned: dict[str, dict[str, tuple[int, str]]] = {}
        self._seen: set[str] = set()
        self._left_out: set[tuple[LayerKey, Rule]] = set()
        self._any_router = any_router

    def add(self, name: str, shape: Sequence[int] | None, dtype: str | None = None) -> MoEName | None:
        """Take in one tensor and return the meaning of its name, or None if the name is the same in both layouts.

        Args:
            name: Its name.
            shape: Its whole shape; None if it is not known.
            dtype: torch's name of its dtype; None if it is not known.

        Raises:
            UnknownTensorError: A name in the experts or the router that the layout does not have.
            DuplicateTensorError: A second tensor of the same meaning.
            TensorShapeError: A shape that its row, the given sizes or the other tensors rule out; or a dtype that
                experts may not have, or that is not the one of the role's other tensors.
        """
        if name in self._seen:
            raise DuplicateTensorError("two entries of one name", tensor=name, hint="keep one of them")
        self._seen.add(name)
        parsed = parse(name, self.layout)
        if parsed is not None:
            parts = self.layers.setdefault(parsed.layer_key, {}).setdefault(parsed.rule, {})
            self._check_single(name, parsed, parts)
            parts[parsed.part] = name, dtype
            if shape is not None and not self._is_free(parsed.rule):
                self._check_shape(name, parsed, tuple(shape))
            if parsed.rule.operation is not Operation.KEEP and dtype is not None:
                require_expert_dtype(name, dtype)
                _check_same_dtype(name, dtype, parts)
        self.names[name] = parsed
        return parsed

    def leave_out(self, name: str) -> None:
        """Take note of a tensor that is left out under this name: its layer does not lack it."""
        parsed = lookup(name, self.layout)
        if parsed is not None:
            self._left_out.add((parsed.layer_key, parsed.rule))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the sizes of E, H and I under `prefix`, as far as they are known."""
        learned = {axis: size for axis, (size, _) in self._learned.get(prefix, {}).items()}
        return learned | self._given

    def require_complete(self, rules: Iterable[Rule]) -> None:
        """Check that every layer that has any of the experts' tensors has all of `rules`, but for what is left out.

        Raises:
            IncompleteExpertsError: A role is missing, or the tensor of an expert.
        """
        wanted = tuple(rules)
        for key, seen in self.layers.items():
            missing = [rule for rule in wanted if rule not in seen and (key, rule) not in self._left_out]
            path = MoEName(*key, wanted[0]).layer_path
            missing = [rule for rule in missing if not self.leaves_out(path + rule.name(self.layout))]
            if missing and any(rule in seen for rule in wanted):
                names = [name for rule, parts in seen.items() if rule in wanted for name, _ in parts.values()]
                raise IncompleteExpertsError(
                    f"Incomplete expert weights for layer {key[1]}: {', '.join(rule.role for rule in missing)} missing",
                    tensor=path + missing[0].name(self.layout),
                    expected=", ".join(rule.name(self.layout) for rule in wanted),
                    found=", ".join(name.removeprefix(path) for name in _few(names)),
                    hint=_COMPLETE,
                )
            for rule, parts in seen.items():
                if rule in wanted and WHOLE not in parts:
                    self._check_parts(key, rule, parts)

    def _check_parts(self, key: LayerKey, rule: Rule, parts: Parts) -> None:
        """Check that a role that is stored in several tensors has all of them."""
        parsed = self.names[next(iter(parts.values()))[0]]
        assert parsed is not None, "a tensor of a layer"
        experts = self.sizes(parsed.prefix).get("E", 1 + max(part.expert or 0 for part in parts))
        wanted = {part: parsed.layer_path + rest for rest, part in parsed.spelling.parts(rule, experts)}
        missing = [name for part, name in wanted.items() if part not in parts]
        if missing:
            raise IncompleteExpertsError(
                f"Incomplete expert weights for layer {key[1]}: part of {rule.role} missing",
                tensor=missing[0],
                expected=f"{len(wanted)} tensors",
                found=f"{len(parts)} tensors, without {', '.join(_few(missing))}",
                hint=_COMPLETE,
            )

    def _check_single(self, name: str, parsed: MoEName, parts: Parts) -> None:
        """Check that a tensor has the spelling of the role's others, and that none of them holds a value that it holds.

        Tensors of one role in two spellings may be of two models, even if each expert is there once.
        """
        if not parts:
            return
        first, _ = next(iter(parts.values()))
        known, _ = parts.get(parsed.part, (None, None))
        seen = self.names.get(first)
        if known is None and seen is not None and seen.spelling is not parsed.spelling:
            known = first
        if known is not None:
            found = f"also {known}"
            raise DuplicateTensorError("two spellings of one tensor", tensor=name, found=found, hint="keep one of them")

    def _is_free(self, rule: Rule) -> bool:
        """Return whether a tensor of this row may have any shape."""
        return not rule.axes(self.layout) or (self._any_router and rule.operation is Operation.KEEP)

    def _check_shape(self, name: str, parsed: MoEName, shape: tuple[int, ...]) -> None:
        axes = parsed.part.axes(parsed.rule.axes(self.layout))
        learned = self._learned.setdefault(parsed.prefix, {})
        if len(shape) == len(axes):
            for axis, size in zip(axes, shape, strict=True):
                letter, value = ("I", size // 2) if axis == "2I" else (axis, size)
                if letter not in self._given and value > 0:
                    learned.setdefault(letter, (value, name))
        known = self.sizes(parsed.prefix)
        doubled = known | ({"2I": 2 * known["I"]} if "I" in known else {})
        expected = [doubled.get(axis, axis) for axis in axes]
        beyond = parsed.part.expert is not None and parsed.part.expert >= known.get("E", parsed.part.expert + 1)
        if beyond or list(shape) != expected:
            origins = {axis: learned[axis][1] if axis in learned else "the config" for axis in known}
            sources = ", ".join(f"{axis} = {size} from {origins[axis]}" for axis, size in sorted(known.items()))
            raise TensorShapeError(
                "an expert that the model does not have" if beyond else "a tensor of the wrong shape",
                tensor=name,
                expected=f"[{', '.join(axes)}] = {expected} ({sources})",
                found=list(shape),
                hint="check that the config and the tensors belong to the same model, and that this is the "
                f"{self.layout} layout",
            )


def _check_same_dtype(name: str, dtype: str, parts: Parts) -> None:
    """Check that a tensor has the dtype of the first one of its role."""
    first, known = next(iter(parts.values()))
    if known is not None and known != dtype:
        problem, hint = "tensors of one role with different dtypes", "give all tensors of a role in one dtype"
        raise TensorShapeError(problem, tensor=name, expected=f"{known}, as {first} has", found=dtype, hint=hint)


def _few(names: Sequence[str]) -> list[str]:
    return [*names[:8], *(["..."] if len(names) > 8 else [])]
