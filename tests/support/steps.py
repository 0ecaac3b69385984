"""Directories of parts as NeMo AutoModel's ranks leave them, cut by NumPy: each rank's file and the config."""

import json
from itertools import pairwise, product

from safetensors.torch import save_file

from support.models import read_directory


def cut(tensor, *cuts):
    """(offsets, values) of each part of a tensor that is cut at the given indices of its axes, as (axis, index...)."""
    edges = [[0, size] for size in tensor.shape]
    for axis, *indices in cuts:
        edges[axis] = sorted({*edges[axis], *indices})
    ranges = [list(pairwise(own)) for own in edges]
    for box in product(*ranges):
        offsets = [start for start, _ in box]
        yield offsets, tensor[tuple(slice(start, end) for start, end in box)].contiguous()


def write_parts(directory, files):
    """Write one file for each mapping of names to (offsets, values)."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, own in enumerate(files, 1):
        info = {name: {"saved_offsets": list(offsets)} for name, (offsets, _) in own.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        tensors = {name: values for name, (_, values) in own.items()}
        save_file(tensors, directory / f"shard-{number:05}-model-00001-of-00001.safetensors", metadata)


def spread(state, ways, experts_on_axis_1=1):
    """What each rank saves of a state: the part of its number along axis 0; experts also along their last axis."""
    ranks = [{} for _ in range(ways * experts_on_axis_1)]
    for name, tensor in state.items():
        wide = tensor.ndim == 3 and experts_on_axis_1 > 1
        cuts = [(0, *even(tensor.shape[0], ways))] if tensor.ndim else []
        cuts += [(2, *even(tensor.shape[2], experts_on_axis_1))] if wide else []
        for rank, part in enumerate(cut(tensor, *cuts)):
            ranks[rank][name] = part
    return ranks


def even(size, ways):
    """Where torch.chunk cuts."""
    return list(range(0, size, -(-size // ways)))[1:]


def write_step(step, source, ways, **more):
    """Write the step that `ways` ranks would save of the hf checkpoint `source`, config beside it; return model/."""
    model = step / "model"
    write_parts(model, spread(read_directory(source), ways, **more))
    (model / ".hf_metadata").mkdir()
    for name in ("config.json", "tokenizer.json"):
        if (source / name).exists():
            (model / ".hf_metadata" / name).write_bytes((source / name).read_bytes())
    (model / "consolidate.sh").write_text("exit 1\n")
    return model
