"""A bucket of a stream as SGLang's flattened bucket, the input of `load_format="flattened_bucket"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gemma4_moe.refit.buckets import Bucket


def sglang_bucket(bucket: Bucket) -> Any:
    """Return a bucket as a `sglang.srt.weight_sync.tensor_bucket.FlattenedTensorBucket`, without a copy.

    Its metadata have our offsets, in bytes; the gaps that keep tensors aligned are no tensor's. The flattened tensor
    can be sent to the engine's process. Keep `bucket` until the engine has loaded it: a handle does not count as a
    holder of its memory. On the CPU the first use of a buffer copies it into shared memory.
    """
    from sglang.srt.weight_sync.tensor_bucket import (  # type: ignore[import-not-found]
        FlattenedTensorBucket,
        FlattenedTensorMetadata,
    )

    metadata = [
        FlattenedTensorMetadata(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=getattr(torch, entry.dtype),
            start_idx=entry.offset,
            end_idx=entry.offset + entry.nbytes,
            numel=entry.nbytes,
        )
        for entry in bucket.entries
    ]
    return FlattenedTensorBucket(flattened_tensor=bucket.shareable(), metadata=metadata)
