"""Stand-ins for large checkpoints: headers (unpadded, as published ones are), index, config, and holes for the data."""

import json
import math
import struct
from pathlib import Path

REAL_MODEL = Path(__file__).parent.parent / "data" / "gemma-4-26B-A4B"


def real_names_and_shapes():
    """Name and shape of each of the 1,013 tensors of google/gemma-4-26B-A4B."""
    return json.loads((REAL_MODEL / "inventory.json").read_text())["shapes"]


def real_config():
    return json.loads((REAL_MODEL / "config.json").read_text())


def write_sparse_checkpoint(
    directory,
    names_and_shapes,
    dtype,
    config,
    max_shard_bytes=50 * 10**9,
):
    """Write the stand-in, tensors in the given order, into a new directory; return the file name of each tensor."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shards = [{}]
    for name, shape in names_and_shapes.items():
        nbytes = math.prod(shape) * dtype.bits // 8
        if shards[-1] and sum(shards[-1].values()) + nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = nbytes
    weight_map = {}
    for number, sizes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_header(directory / file, names_and_shapes, sizes, dtype)
        weight_map |= dict.fromkeys(sizes, file)
    if len(shards) > 1:
        total_size = sum(sum(sizes.values()) for sizes in shards)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def _write_header(path, names_and_shapes, sizes, dtype):
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, nbytes in sizes.items():
        begin, end = end, end + nbytes
        header[name] = {"dtype": dtype.tag, "shape": list(names_and_shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
