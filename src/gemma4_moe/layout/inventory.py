"""What a set of names and shapes holds: each name explained, each shape checked, each layer complete.

The adapter, the planner and `inspect` read their input through an `Inventory`, so that all refuse the same things with
the same words. It sees names and shapes alone, never values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.errors import DuplicateTensorError, IncompleteExpertsError, TensorShapeError
from gemma4_moe.layout.names import MoEName, parse
from gemma4_moe.layout.table import Layout, Rule, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Owner = tuple[str, int]


class Inventory:
    """The names of one state dict or checkpoint in one layout.

    Sizes of E, H and I that are given hold for every layer. Those that aren't are learned from the first tensor that
    shows them, for each prefix on its own, and must agree from there on.

    Attributes:
        layout: The layout in which names are explained.
        layers: For each layer, by prefix and number, the row and the full name of every tensor seen.
    """

    def __init__(self, layout: Layout, sizes: dict[str, int] | None = None) -> None:
        self.layout = layout
        self.layers: dict[Owner, dict[Rule, str]] = {}
        self._given = dict(sizes or {})
        self._learned: dict[str, dict[str, tuple[int, str]]] = {}
        self._seen: set[str] = set()

    def add(self, name: str, shape: Sequence[int]) -> MoEName | None:
        """Take in one tensor and return what its name means, None where it is the same in both layouts.

        Raises:
            UnknownTensorError: A name in the experts or the router that the layout does not have.
            DuplicateTensorError: A second tensor of the same meaning.
            TensorShapeError: A shape that its row, the given sizes or the other tensors rule out.
        """
        if name in self._seen:
            raise DuplicateTensorError("two entries of one name", tensor=name, hint="keep one of them")
        self._seen.add(name)
        parsed = parse(name, self.layout)
        if parsed is None:
            return None
        seen = self.layers.setdefault(parsed.owner, {})
        if parsed.rule in seen:
            raise DuplicateTensorError(
                "two spellings of one tensor", tensor=name, found=f"also {seen[parsed.rule]}", hint="keep one of them"
            )
        seen[parsed.rule] = name
        self._check_shape(name, parsed, tuple(shape))
        return parsed

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return what is known of E, H and I under `prefix`."""
        learned = {axis: size for axis, (size, _) in self._learned.get(prefix, {}).items()}
        return learned | self._given

    def require_complete(self, rules: Iterable[Rule]) -> None:
        """Check that every layer that has any of the experts' tensors has all of `rules`.

        Raises:
            IncompleteExpertsError: One is missing.
        """
        wanted = tuple(rules)
        for (prefix, layer), seen in self.layers.items():
            missing = [rule for rule in wanted if rule not in seen]
            if missing and any(rule in seen for rule in wanted):
                path = MoEName(prefix, layer, missing[0]).layer_path
                raise IncompleteExpertsError(
                    f"Incomplete expert weights for layer {layer}: {', '.join(rule.role for rule in missing)} missing",
                    tensor=path + missing[0].name(self.layout),
                    expected=", ".join(rule.name(self.layout) for rule in wanted),
                    found=", ".join(name.removeprefix(path) for rule, name in seen.items() if rule in wanted),
                    hint="give all of a layer's tensors together; a shard file of the checkpoint may be missing",
                )

    def _check_shape(self, name: str, parsed: MoEName, shape: tuple[int, ...]) -> None:
        axes = parsed.rule.axes(self.layout)
        learned = self._learned.setdefault(parsed.prefix, {})
        if len(shape) == len(axes):
            for axis, size in zip(axes, shape, strict=True):
                letter, value = ("I", size // 2) if axis == "2I" else (axis, size)
                if letter not in self._given and value > 0:
                    learned.setdefault(letter, (value, name))
        known = self.sizes(parsed.prefix)
        unbound = any(axis.removeprefix("2") not in known for axis in axes)
        if unbound or shape != shape_of(parsed.rule, self.layout, known):
            sources = ", ".join(
                f"{letter} = {size} from {learned[letter][1] if letter in learned else 'the config'}"
                for letter, size in sorted(known.items())
            )
            expected = [known.get(a, a) if a != "2I" else (2 * known["I"] if "I" in known else a) for a in axes]
            raise TensorShapeError(
                "a tensor of the wrong shape",
                tensor=name,
                expected=f"[{', '.join(axes)}] = {expected} ({sources})",
                found=list(shape),
                hint="check that the config and the tensors belong to the same model, and that this is the "
                f"{self.layout} layout",
            )
