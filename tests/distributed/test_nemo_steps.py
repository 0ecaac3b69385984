"""Steps that NeMo AutoModel's own Checkpointer leaves in parts, as sources: on every placement, from both adapters."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from distributed.test_nemo_checkpointer import exported_like, fill, load, native, of_four_experts, parallelized
from gemma4_moe import convert, diff, inspect, load_hf, publish, verify
from gemma4_moe.demo.small_models import build_model, logits, save_model
from gemma4_moe.integrations import nemo_automodel
from support import ranks
from support.formulas import assert_same_tensors
from support.models import read_directory

#: Ranks, parallelism, the experts of the model, and whether our adapter is installed.
PLACEMENTS = {
    "one process": (1, {}, "six", True),
    "ep 2": (2, {"ep_size": 2}, "six", True),
    "ep 2, experts whole on one rank": (2, {"ep_size": 2}, "six", False),
    "FSDP 2": (2, {}, "six", True),
    "FSDP 3, one rank empty": (3, {}, "four", True),
    "HSDP 2 x 2": (4, {"dp_replicate_size": 2}, "six", True),
    "ep 2 x ep_shard 2": (4, {"ep_size": 2}, "six", True),
}
#: Each weight of down was multiplied by its scale and rounded to bf16 once; a lost scale changes logits by 0.3 or more.
TOLERANCE_BF16 = 0.05
MODULES = ("checkpoint.checkpointing", "distributed.mesh", "models.gemma4_moe.model", "moe.parallelizer")


@pytest.fixture(autouse=True, scope="module")
def nemo_is_imported_once():
    with ranks.preloading(*(f"nemo_automodel.components.{module}" for module in MODULES)):
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    save_model(build_model("multimodal", seed=3, dtype="bfloat16"), directory / "six")
    save_model(of_four_experts(build_model("multimodal", seed=4)).bfloat16(), directory / "four")
    return {path.name: path for path in directory.iterdir()}


@pytest.fixture(params=PLACEMENTS)
def step(request, bases, tmp_path):
    """A step in parts, and the native weights in it."""
    world, sizes, experts, ours = PLACEMENTS[request.param]
    trained = native(read_directory(bases[experts]), torch.bfloat16)
    ranks.run(world, save, sizes, bases[experts], tmp_path / "run" / "epoch_0_step_7", ours)
    return tmp_path / "run" / "epoch_0_step_7", bases[experts], trained


def save(sizes, base, step, ours, **options):
    """Save the native weights of a base as a step, without consolidating it."""
    with nemo_automodel.installed() if ours else nullcontext():
        options = {"save_consolidated": False} | options
        model, checkpointer = parallelized(sizes, base, step.parent, torch.bfloat16, **options)
        fill(model, native(read_directory(base), torch.bfloat16))
        checkpointer.save_model(model, str(step))
        dist.barrier()
        checkpointer.close()


def test_a_step_in_parts_is_a_source(step, tmp_path):
    place, base, trained = step
    exported = exported_like(base, trained)
    found = inspect(place.parent)
    assert (found.problems, found.tensors, found.layout) == ((), len(exported), "hf")
    assert str(place / "model") in found.notes[0]

    convert(place, tmp_path / "nemo")
    assert_same_tensors(read_directory(tmp_path / "nemo"), trained)
    assert verify(place, tmp_path / "nemo").different == ()

    publish(place, tmp_path / "exported")
    assert_same_tensors(read_directory(tmp_path / "exported"), exported)
    assert diff(tmp_path / "exported", place).different == ()

    publish(place.parent, tmp_path / "published", base=base)
    assert_same_tensors(read_directory(tmp_path / "published"), read_directory(base))
    source, again = load(base), load(tmp_path / "exported")
    assert (logits(again) - logits(source)).abs().max().item() <= TOLERANCE_BF16

    model = {name: torch.full_like(tensor, float("nan"), dtype=torch.float32) for name, tensor in trained.items()}
    load_hf(model, place)
    assert_same_tensors(model, native(exported, torch.float32))


@pytest.mark.parametrize("placement", ["one process", "ep 2", "FSDP 3, one rank empty", "ep 2 x ep_shard 2"])
def test_a_step_of_torch_save_is_a_source_with_the_config_of_its_base(placement, bases, tmp_path):
    world, sizes, experts, ours = PLACEMENTS[placement]
    base, step = bases[experts], tmp_path / "run" / "epoch_1_step_12"
    ranks.run(world, save_torch, sizes, base, step, ours)
    trained = native(read_directory(base), torch.bfloat16)
    convert(step, tmp_path / "nemo", config_from=base)
    assert_same_tensors(read_directory(tmp_path / "nemo"), trained)
    assert verify(step, tmp_path / "nemo", config_from=base).different == ()


def save_torch(sizes, base, step, ours):
    save(sizes, base, step, ours, model_save_format="torch_save")
