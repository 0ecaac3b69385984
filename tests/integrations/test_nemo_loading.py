"""Loads of NeMo AutoModel's Checkpointer that would round twice are refused, all others go on; one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.errors import UsageError
from gemma4_moe.integrations import nemo_automodel
from gemma4_moe.integrations.nemo_automodel import refuse_two_roundings
from support import peer
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict, read_directory

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DOWN, SCALE = "layers.1.experts.down_proj", "layers.1.router.per_expert_scale"
TIED = "lm_head.weight"


def destinations(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    native = nemo_from_hf(random_hf_state_dict(prefix=""), dtype)
    return Gemma4MoEStateDictAdapter(None, None, None).to_hf(native, for_checkpoint_load=True)


@pytest.mark.parametrize("model", [BF16, FP16, FP32])
@pytest.mark.parametrize("file", [BF16, FP16, FP32])
def test_down_proj_is_refused_where_a_cast_loses_a_value(file: torch.dtype, model: torch.dtype) -> None:
    holds_all = torch.finfo(model).eps <= torch.finfo(file).eps and torch.finfo(model).max >= torch.finfo(file).max
    loaded = destinations(model)
    files = dict.fromkeys(loaded, file) | {SCALE: FP32}
    if holds_all:
        refuse_two_roundings(loaded, files, "DIR")
        return
    with pytest.raises(UsageError, match="round twice") as refused:
        refuse_two_roundings(loaded, files, "DIR")
    message = str(refused.value)
    assert all(part in message for part in (str(file)[6:], str(model)[6:], "down_proj", "DIR", "load_hf"))


def test_a_scale_in_double_precision_is_refused_and_gate_up_never_is() -> None:
    loaded = destinations(FP32)
    gate_up = {name: torch.float64 for name in loaded if name.endswith("gate_up_proj")}
    refuse_two_roundings(loaded, dict.fromkeys(loaded, FP32) | gate_up, "DIR")
    with pytest.raises(UsageError, match="float64") as refused:
        refuse_two_roundings(loaded, dict.fromkeys(loaded, FP32) | {SCALE: torch.float64}, "DIR")
    assert refused.value.facts["tensor"] == SCALE


def test_a_tensor_that_the_checkpoint_lacks_is_left_to_the_reader() -> None:
    loaded = destinations(BF16)
    refuse_two_roundings(loaded, dict.fromkeys(set(loaded) - {DOWN}, BF16), "DIR")


def checkpointer(base: Path, target: Path, **options: Any) -> Any:
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig

    return CheckpointingConfig(checkpoint_dir=target, model_repo_id=str(base), **options).build(0, 0, 0)


def load_base(model: torch.nn.Module, base: Path) -> None:
    checkpointer(base, base).load_base_model(model, torch.device("cpu"), str(base), str(base))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != TIED}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(build_model("multimodal", seed=3), tmp_path / "base")
    return tmp_path / "base"


def test_the_checkpointer_refuses_before_it_reads(base: Path) -> None:
    with nemo_automodel.installed():
        model = peer.model(build_model("multimodal").config).to(BF16)
        before = weights(model)
        with pytest.raises(UsageError, match="the checkpoint has float32, its destination bfloat16"):
            load_base(model, base)
    assert_same_tensors(weights(model), before)


def test_the_refusal_ends_with_the_installation(base: Path) -> None:
    with nemo_automodel.installed():
        model = peer.model(build_model("multimodal").config).to(BF16)
    load_base(model, base)
    correct = nemo_from_hf(read_directory(base), BF16)
    found = weights(model)
    wrong = [name for name in correct if not torch.equal(found[name], correct[name].to(BF16))]
    assert wrong
    assert all(name.endswith("moe.experts.down_projs") for name in wrong)


@pytest.mark.parametrize("form", ["safetensors", "torch_save"])
def test_training_checkpoints_are_loaded_and_their_dtypes_looked_at_too(form: str, base: Path, tmp_path: Path) -> None:
    with nemo_automodel.installed():
        model = peer.model(build_model("multimodal").config)
        load_base(model, base)
        before = weights(model)
        engine = checkpointer(base, tmp_path, model_save_format=form, save_consolidated=False)
        engine.save_model(model, str(tmp_path))
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        engine.load_model(model, str(tmp_path / "model"))
        assert_same_tensors(weights(model), before)
        with pytest.raises(UsageError, match="round twice"):
            engine.load_model(model.to(BF16), str(tmp_path / "model"))
