"""How much of a tensor is in memory at once where a model is loaded or saved: a block, or one row if that is larger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.converter.blocks import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gemma4_moe.converter.plan import PlannedTensor


def rows_at_once(row_bytes: int) -> int:
    """Return how many rows of `row_bytes` bytes make a block: at least one."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def source_row_bytes(planned: PlannedTensor) -> int:
    """Return what the file has for one index of a native tensor's first axis, in bytes; of a scalar, all of it."""
    assert planned.source is not None, "every nemo tensor comes from an hf tensor"
    return planned.source.nbytes // max(1, planned.source.shape[0] if planned.source.shape else 1)


def load_staging_bytes(tensors: Iterable[PlannedTensor]) -> int:
    """Return what a load needs beside the model, in bytes; the file's dtypes decide, not the model's."""
    return max([BLOCK_BYTES, *map(source_row_bytes, tensors)])
