"""The tensors that a converted checkpoint should have, from the source's names and headers alone.

They follow from the table's names and axes, without the converter's planner, so that a mistake there can't repeat here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.layout.dtypes import EXPERT_DTYPES, DType
from gemma4_moe.layout.table import DOWN, SCALE, Layout
from gemma4_moe.verifier.assembled import assembled
from gemma4_moe.verifier.differences import Difference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.names import MoEName
    from gemma4_moe.verifier.additions import Addition
    from gemma4_moe.verifier.assembled import Values


@dataclass(frozen=True, slots=True)
class Expectation:
    """One expected tensor of the target.

    Attributes:
        source: The source tensor that it comes from; None for a `per_expert_scale` of ones.
        transposed: Whether its last two axes are those of `source`, exchanged.
        scale: The source tensor whose values multiply its experts, or None.
        scale_name: The target's tensor that multiplies its experts, or None. It should be ones, or the source's scale
            if the layout is the source's.
        own_scale: The source tensor that multiplies its experts and stays a tensor, if the layout is the source's.
        addition: What an adapter adds to it, or None.
    """

    source: Values | None
    shape: tuple[int, ...]
    transposed: bool = False
    scale: StoredTensor | None = None
    scale_name: str | None = None
    own_scale: StoredTensor | None = None
    addition: Addition | None = None

    def dtypes(self, cast: DType | None) -> tuple[DType, ...]:
        """Return the dtypes that it may have if floats are cast to `cast`; a scale of ones may have several."""
        if self.source is None:
            return EXPERT_DTYPES
        own = self.source.dtype
        return (own if cast is None or own.float_format is None else cast,)


def expectations(
    source: Checkpoint, names: Mapping[str, MoEName | None], layout: Layout, to: Layout
) -> dict[str, Expectation]:
    """Return the expected tensors of a target in layout `to`, by name in current spelling.

    `names` has the meaning of each name of the source. If the source's layout is the target's, every tensor stays as it
    is.
    """
    scales = {name.layer_key: source.tensors[own] for own, name in names.items() if name and name.rule is SCALE}
    expected = {}
    for own, (name, stored) in assembled(source.tensors, names, layout).items():
        if name is not None and layout is to is Layout.HF and name.rule is DOWN:
            scale_name = name.sibling(SCALE).hf
            own_scale = scales[name.layer_key]
            expected[name.hf] = Expectation(stored, stored.shape, own_scale=own_scale, scale_name=scale_name)
        elif name is None or layout is to or name.rule.hf_axes == name.rule.nemo_axes:
            expected[own if name is None else name.name(to)] = Expectation(stored, stored.shape)
        elif name.rule.in_nemo:
            experts, rows, columns = stored.shape
            shape = (experts, columns, rows)
            if name.rule is not DOWN:
                expected[name.name(to)] = Expectation(stored, shape, transposed=True)
            elif to is Layout.NEMO:
                expected[name.nemo] = Expectation(stored, shape, transposed=True, scale=scales[name.layer_key])
            else:
                scale_name = name.sibling(SCALE).hf
                expected[name.hf] = Expectation(stored, shape, transposed=True, scale_name=scale_name)
                expected[scale_name] = Expectation(None, (experts,))
    return expected


def common_dtype(expected: Mapping[str, Expectation], found: Mapping[str, Values]) -> DType | None:
    """Return the dtype, or None for no cast, that explains the dtypes of most of the target's tensors."""
    pairs = [(tensor, found[name].dtype) for name, tensor in expected.items() if name in found]
    return max((None, *EXPERT_DTYPES), key=lambda cast: sum(dtype in tensor.dtypes(cast) for tensor, dtype in pairs))


def compare_headers(
    expected: Mapping[str, Expectation], found: Mapping[str, Values], cast: DType | None
) -> tuple[list[Difference], dict[str, Values]]:
    """Compare names, dtypes and shapes.

    Returns:
        The differences, and the tensors of the target whose values can be compared, by name in current spelling.
    """
    missing, wrong, comparable = [], [], {}
    for name, tensor in expected.items():
        dtypes = tensor.dtypes(cast)
        tags, stored = ", ".join(dtype.tag for dtype in dtypes), found.get(name)
        if stored is None:
            missing.append(Difference(name, "missing", f"{tags} {list(tensor.shape)}", None))
            continue
        if stored.dtype in dtypes and stored.shape == tensor.shape:
            comparable[name] = stored
        if stored.dtype not in dtypes:
            wrong.append(Difference(stored.name, "dtype", tags, stored.dtype.tag))
        if stored.shape != tensor.shape:
            wrong.append(Difference(stored.name, "shape", str(list(tensor.shape)), str(list(stored.shape))))
    extra = [
        Difference(tensor.name, "extra", None, f"{tensor.dtype.tag} {list(tensor.shape)}")
        for name, tensor in found.items()
        if name not in expected
    ]
    return [*missing, *extra, *wrong], comparable
