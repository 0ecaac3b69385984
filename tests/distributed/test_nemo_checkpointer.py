"""NeMo AutoModel's own Checkpointer with our adapter installed: load, save consolidated, reload, on every placement."""

import gc
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from gemma4_moe import convert
from gemma4_moe.demo.small_models import build_model, logits, save_model
from gemma4_moe.errors import UsageError
from gemma4_moe.integrations import nemo_automodel
from support import peer, ranks
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import read_directory

State = dict[str, torch.Tensor]
TIED = "lm_head.weight"
TOLERANCE = 5e-6
SIX = [("six-fp32", "float32"), ("six-bf16", "bfloat16"), ("six-bf16", "float32")]
FOUR = [("four-fp32", "float32")]
#: Ranks, parallelism, cases of a base checkpoint and a model's dtype.
PLACEMENTS = {
    "one process": (1, {}, SIX),
    "ep 2": (2, {"ep_size": 2}, SIX),
    "ep 2 x ep_shard 2": (4, {"ep_size": 2}, SIX[::2]),
    "FSDP 2": (2, {}, SIX),
    "FSDP 3, one rank empty": (3, {}, FOUR),
    "HSDP 2 x 2": (4, {"dp_replicate_size": 2}, SIX[:2]),
}


@pytest.fixture(autouse=True, scope="module")
def nemo_is_imported_once():
    """It takes ten seconds or more."""
    modules = ("checkpoint.checkpointing", "distributed.mesh", "models.gemma4_moe.model", "moe.parallelizer")
    with ranks.preloading(*(f"nemo_automodel.components.{module}" for module in modules)):
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints as transformers publishes them, of six experts in two dtypes, and of four."""
    directory = tmp_path_factory.mktemp("bases")
    for name, dtype in (("six-fp32", "float32"), ("six-bf16", "bfloat16")):
        save_model(build_model("multimodal", seed=1, dtype=dtype), directory / name)
    save_model(of_four_experts(build_model("multimodal", seed=2)), directory / "four-fp32")
    return {path.name: path for path in directory.iterdir()}


def of_four_experts(model):
    """The same model without its last experts."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.text_config.num_experts = 4
    smaller = type(model)(config).eval()
    state = {
        name: tensor[:4] if ".experts." in name or name.endswith(("per_expert_scale", "router.proj.weight")) else tensor
        for name, tensor in model.state_dict().items()
    }
    smaller.load_state_dict(state)
    return smaller


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_load_save_consolidated_and_reload(placement, bases, tmp_path):
    world, sizes, cases = PLACEMENTS[placement]
    ranks.run(world, check_all, sizes, bases, tmp_path, cases)

    base, dtype = cases[0]
    source = load(bases[base])
    exported = load(tmp_path / f"{base}-{dtype}" / "model" / "consolidated")
    assert (logits(exported) - logits(source)).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("world", [1, 2])
def test_a_file_that_would_be_rounded_twice_is_refused(world, bases, tmp_path):
    ranks.run(world, check_refusal, {}, bases["six-fp32"], tmp_path)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_a_directory_in_the_nemo_layout_is_not_loaded(ours, bases, tmp_path):
    convert(bases["six-fp32"], tmp_path / "nemo")
    ranks.run(1, check_native_directory, ours, bases["six-fp32"], tmp_path / "nemo", tmp_path / "run")


def load(directory):
    from transformers import Gemma4ForConditionalGeneration

    model, names = Gemma4ForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(names.values()), names
    return model


def check_all(sizes, bases, target, cases):
    """Check each pair of a base checkpoint's name and the model's dtype, with our adapter installed."""
    gc.freeze()  # the Checkpointer collects garbage after each load, and would walk through all of NeMo's modules
    with nemo_automodel.installed():
        for name, dtype in cases:
            check(sizes, bases[name], target / f"{name}-{dtype}", getattr(torch, dtype))


def check(sizes, base, target, dtype):
    """Load an hf checkpoint, save it consolidated, and load both that and the shards again."""
    model, checkpointer = parallelized(sizes, base, target, dtype)
    expected = native(read_directory(base), dtype)
    exported = exported_like(base, expected)
    consolidated = target / "model" / "consolidated"

    check_load(model, checkpointer, base, expected)
    checkpointer.save_model(model, str(target))
    dist.barrier()
    assert_same_tensors(read_directory(consolidated), exported)

    forget(model)
    checkpointer.load_model(model, str(target / "model"))
    assert_same_tensors(whole_state(model), expected)
    check_load(model, checkpointer, consolidated, native(exported, dtype))
    checkpointer.close()


def check_load_alone(ours, base, target):
    """Load under FSDP, with our adapter or with theirs."""
    with nemo_automodel.installed() if ours else nullcontext():
        model, checkpointer = parallelized({}, base, target, torch.float32)
        check_load(model, checkpointer, base, native(read_directory(base), torch.float32))


def check_save_alone(ours, base, target):
    """Save under FSDP what torch has put in place, with our adapter or with theirs."""
    with nemo_automodel.installed() if ours else nullcontext():
        model, checkpointer = parallelized({}, base, target, torch.float32)
        expected = native(read_directory(base), torch.float32)
        fill(model, expected)
        checkpointer.save_model(model, str(target))
        dist.barrier()
    assert_same_tensors(read_directory(target / "model" / "consolidated"), exported_like(base, expected))


def check_refusal(sizes, base, target):
    """Values of fp32 are not read into bf16 storage, on no rank, and the weights stay as they are."""
    with nemo_automodel.installed():
        model, checkpointer = parallelized(sizes, base, target, torch.bfloat16)
        fill(model, dict.fromkeys(model.state_dict(), torch.tensor(2.0)))
        with pytest.raises(UsageError, match="round twice") as refused:
            checkpointer.load_base_model(model, torch.device("cpu"), str(base), str(base))
    assert refused.value.facts["found"] == "float32"
    assert all(bool((local_of(tensor) == 2).all()) for tensor in model.state_dict().values())


def check_native_directory(ours, base, native_directory, target):
    """docs/directories.md: the Checkpointer asks for hf names, with our adapter or with theirs."""
    with nemo_automodel.installed() if ours else nullcontext():
        model, checkpointer = parallelized({}, base, target, torch.float32)
        with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*experts\.\w+_proj"):
            checkpointer.load_base_model(
                model, torch.device("cpu"), str(native_directory.parent), str(native_directory)
            )


def check_load(model, checkpointer, directory, expected):
    forget(model)
    checkpointer.load_base_model(model, torch.device("cpu"), str(directory.parent), str(directory))
    assert_same_tensors(whole_state(model), expected)


def native(published, dtype):
    return {name: tensor.to(dtype) for name, tensor in nemo_from_hf(published, dtype).items()}


def exported_like(base, expected):
    """Return NeMo's export of native weights: the hf layout in the dtype of the base checkpoint."""
    dtype = next(iter(read_directory(base).values())).dtype
    return {name: tensor.to(dtype) for name, tensor in hf_from_nemo(expected).items()}


def parallelized(sizes, base, target, dtype, **changes):
    """NeMo's model of a checkpoint's config, sharded by NeMo's parallelizer over NeMo's meshes, and a Checkpointer."""
    from nemo_automodel.components.distributed.config import FSDP2Config
    from nemo_automodel.components.distributed.mesh import MeshContext, ParallelismSizes
    from nemo_automodel.components.moe.parallelizer import parallelize_model
    from transformers import AutoConfig

    model = peer.model(AutoConfig.from_pretrained(base)).to(dtype)
    model._pre_shard_hf_state_dict_keys = model.state_dict_adapter.get_hf_state_dict_keys(model.state_dict())
    world, moe_mesh = dist.get_world_size(), None
    if world > 1:
        mesh = MeshContext.build(FSDP2Config(), ParallelismSizes(**sizes), world_size=world)
        parallelize_model(model, mesh.device_mesh, mesh.moe_mesh, **mesh.parallelize_axis_kwargs())
        moe_mesh = mesh.moe_mesh
    options = {"model_repo_id": str(base), "save_consolidated": True} | changes
    return model, peer.checkpointer(target, dist.get_rank(), moe_mesh, **options)


def fill(model, values):
    """Give every weight its value, sharded by torch as the weight is."""
    for name, tensor in model.state_dict().items():
        value = values["model.language_model.embed_tokens.weight" if name == TIED else name].expand(tensor.shape)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value.contiguous(), tensor.device_mesh, tensor.placements, src_data_rank=None)
        local_of(tensor).copy_(local_of(value))


def forget(model):
    """Make every weight NaN, so that one which is not loaded shows."""
    for tensor in model.state_dict().values():
        local_of(tensor).fill_(float("nan"))


def whole_state(model):
    """Every weight and persistent buffer, gathered by torch; the head must be the embedding, and is left out."""
    state = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    assert torch.equal(state.pop(TIED), state["model.language_model.embed_tokens.weight"])
    return state


def local_of(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


THEIRS = pytest.mark.xfail(strict=True, raises=AssertionError, reason="NeMo's own adapter takes a part for the whole")


@pytest.mark.parametrize("ours", [True, pytest.param(False, marks=THEIRS)], ids=["ours", "theirs"])
@pytest.mark.parametrize("part", [check_load_alone, check_save_alone], ids=["load", "save"])
def test_fsdp_on_two_ranks_with_our_adapter_and_with_theirs(part, ours, bases, tmp_path):
    ranks.run(2, part, ours, bases["six-fp32"], tmp_path)
