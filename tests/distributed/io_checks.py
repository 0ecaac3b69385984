"""`load_hf` and `save_hf` on each rank: shards of the formula's model, and files whose bytes don't know the ranks."""

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distributed.placement_checks import CASES, is_expert, same, shard
from gemma4_moe import Gemma4MoEStateDictAdapter, load_hf, plan, save_hf
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import ParallelError, StorageError
from support import forms, published
from support.checkpoints import flip_bit
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict

E, H, I = 5, 9, 11  # noqa: E741
MODEL = torch.float32


def native():
    """The nemo model of the checkpoint that the test wrote: bf16 on disk, fp32 in memory."""
    hf = random_hf_state_dict(E=E, H=H, I=I, layers=2)
    return {name: tensor.to(MODEL) for name, tensor in nemo_from_hf(hf, MODEL).items()}


def shard_all(state, mesh, placements):
    """Shard the experts by `placements` and every matrix beside them as FSDP does; vectors stay whole."""
    sharded = shard(state, mesh, placements)
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)
        if not is_expert(name) and tensor.ndim == 2
        else tensor
        for name, tensor in sharded.items()
    }


def check_load(world, source):
    for shape, placements, _ in CASES[world]:
        expected = shard_all(native(), init_device_mesh("cpu", shape), placements)
        model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
        model["lm_head.weight"] = model["model.language_model.embed_tokens.weight"]
        found = load_hf(model, source)
        del model["lm_head.weight"]
        same(model, expected)
        assert found.unexpected_keys == found.missing_keys == ()
        assert set(found.filled) == set(expected)


def check_save(world, source, target):
    for number, (shape, placements, _) in enumerate(CASES[world]):
        model = shard_all(native(), init_device_mesh("cpu", shape), placements)
        model["lm_head.weight"] = model["model.language_model.embed_tokens.weight"]
        saved = save_hf(model, target / f"{world}-{number}", config_from=source, max_shard_size=2000, dtype="bfloat16")
        total = sum(size for size in _everyones(saved.written_bytes))
        assert total == sum(tensor.nbytes for tensor in native().values()) // 2 + 2 * E * 2  # and two scales
        assert saved.tensors == len(native()) + 2


def check_save_pipeline(source, target):
    """Each rank has one of the two layers, and the first has the embedding."""
    rank = dist.get_rank()
    state = {n: t for n, t in native().items() if f"layers.{1 - rank}." not in n and (rank == 0 or "embed" not in n)}
    save_hf(state, target, config_from=source, max_shard_size=2000, dtype="bfloat16")


def check_load_pipeline(source):
    rank = dist.get_rank()
    expected = {name: tensor for name, tensor in native().items() if f"layers.{rank}." in name}
    model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
    found = load_hf(model, source)
    same(model, expected)
    assert set(found.unexpected_keys) == native().keys() - expected.keys()


def check_save_failures(source, target):
    """If ranks disagree on anything, all raise and nothing is published: a hole would read as zeros."""
    mesh = init_device_mesh("cpu", (2,))
    sharded = shard_all(native(), mesh, (Shard(0),))
    second = dist.get_rank() == 1
    scale, experts = (f"model.language_model.layers.0.moe.{rest}" for rest in ("gate.scale", "experts.down_projs"))
    cases = [
        (scale, native() | ({scale: native()[scale][:4]} if second else {}), {}),
        ("what to save", native(), {"dtype": "float16" if second else None}),
        ("what to save", native(), {"max_shard_size": 1000 if second else 2000}),
        (experts, {n: t for n, t in sharded.items() if not (second and n == experts)}, {}),
        (experts, sharded | ({experts: native()[experts]} if second else {}), {}),
    ]
    for words, state, arguments in cases:
        with pytest.raises(ParallelError) as caught:
            save_hf(state, target, config_from=source, **arguments)
        assert words in str(caught.value), str(caught.value)
        assert not target.exists()


def check_save_uneven(source, target):
    """Ranks that hold 6 and 5 of 11 rows of each expert gather the same blocks, whatever fits of their own rows."""
    from gemma4_moe.converter import blocks

    blocks.BLOCK_BYTES = 2 * 5 * H * MODEL.itemsize  # two experts of the second rank, one of the first
    model = shard_all(native(), init_device_mesh("cpu", (2,)), (Shard(1),))
    save_hf(model, target, config_from=source, max_shard_size="2kB", dtype="bfloat16")


def check_save_groups(source, target):
    """Two data-parallel groups that each hold all experts on a mesh of their own: one of them writes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    state = shard(native(), mesh["ep"], (Shard(0),))
    save_hf(state, target, config_from=source, max_shard_size=2000, dtype="bfloat16")


def check_save_read_back(source, target):
    """The last byte of the last rank's experts changes on the disk before the target appears: no rank publishes it."""
    from gemma4_moe.target import directory

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard_all(native(), mesh, (Shard(0),))
    copy_files = directory.copy_files

    def flipping(paths, out):
        file = out / "model.safetensors"
        with safe_open(file, "pt") as opened:
            last = opened.get_tensor("model.language_model.layers.1.experts.down_proj").numpy().tobytes()
        flip_bit(file, file.read_bytes().index(last) + len(last) - 1)
        return copy_files(paths, out)

    directory.copy_files = flipping
    with pytest.raises(StorageError if mesh.get_rank() == mesh.size() - 1 else ParallelError, match="other bytes"):
        save_hf(model, target, config_from=source)
    assert not target.exists()
    directory.copy_files = copy_files
    save_hf(model, target, config_from=source)


def _everyones(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_same_load(one, other):
    """Two directories are loaded into every placement of two ranks with the same bits."""
    shapes = {name: torch.zeros(tensor.shape) for name, tensor in plan(other).plan.tensors.items()}
    for shape, placements, _ in CASES[2]:
        models = [shard_all(shapes, init_device_mesh("cpu", shape), placements) for _ in range(2)]
        for model, source in zip(models, (one, other), strict=True):
            load_hf(model, source)
        same(*models)


def check_form(world, source, form):
    """A made-up form is loaded into every placement, from the directory and by `from_hf`."""
    forms.register()
    state = (forms.FORMS | published.FORMS)[form](random_hf_state_dict(E=E, H=H, I=I, layers=2))
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None, MODEL)
    for shape, placements, names in CASES[world]:
        mesh = init_device_mesh("cpu", shape)
        expected = shard_all(native(), mesh, placements)
        model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
        load_hf(model, source)
        same(model, expected)
        model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
        adapter.from_hf(state, out=model)
        same(model, expected)
        if names is not None and world > 1:
            named = init_device_mesh("cpu", shape, mesh_dim_names=names)
            found = adapter.from_hf(state, named)
            same({n: t for n, t in found.items() if is_expert(n)}, {n: t for n, t in expected.items() if is_expert(n)})


def check_form_of_dtensors(form):
    forms.register()
    state = forms.FORMS[form](random_hf_state_dict(E=E, H=H, I=I, layers=2))
    mesh = init_device_mesh("cpu", (1,))
    state = {name: distribute_tensor(tensor, mesh, [Replicate()]) for name, tensor in state.items()}
    with pytest.raises(ParallelError, match="several tensors for a role"):
        Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None, MODEL).from_hf(state)
