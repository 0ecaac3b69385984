"""A tensor of a checkpoint: its name and form, and what its bytes are read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.header import TensorEntry

if TYPE_CHECKING:
    import numpy as np

    from gemma4_moe.checkpoint.readers import Readable


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorEntry):
    """One tensor of a checkpoint: its name and form, and its bytes (start, end) in a file, or joined from parts."""

    file: Readable

    def read(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return all elements with their own bits, in the tensor's shape. Raises what `read_into` raises."""
        import numpy as np  # headers are read without it

        raw = np.empty(self.nbytes, np.uint8)
        self.read_into(raw.data)
        return raw.view(self.dtype.numpy()).reshape(self.shape)

    def read_into(self, destination: memoryview, offset: int = 0) -> None:
        """Fill `destination` with the tensor's bytes from `offset` on. Raises what the file's `read_into` raises."""
        if offset < 0 or offset + destination.nbytes > self.nbytes:
            raise ValueError(f"[{offset}, {offset + destination.nbytes}) is outside of {self.nbytes} bytes")
        self.file.read_into(self.start + offset, destination)
