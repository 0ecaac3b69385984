import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import UnsupportedCheckpointError

ARRAYS = {"a": np.arange(3, dtype=np.float32)}


@pytest.mark.parametrize(
    ("names", "format_name"),
    [
        (["model-Q4_K_M.gguf", "config.json"], "GGUF"),
        (["pytorch_model.bin", "config.json"], "pickled weights"),
        (["consolidated.00.pth"], "pickled weights"),
        (["model.pt"], "pickled weights"),
        (["_CHECKPOINT_METADATA", "d/"], "Orbax"),
        (["manifest.ocdbt", "_METADATA", "d/"], "Orbax"),
        (["__0_0.distcp", "__1_0.distcp"], "torch.distributed.checkpoint without its metadata"),
        (["model_world_size_8_rank_0.pt", "model_world_size_8_rank_1.pt", "config.json"], "rank files of verl"),
        (["pytorch_model_fsdp_0/", "optimizer_0/", "config.json"], "a sharded state of Accelerate"),
        (["global_step200/", "latest", "zero_to_fp32.py", "config.json"], "DeepSpeed ZeRO"),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], "DeepSpeed ZeRO"),
        (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter"),
        (["adapter_config.json", "adapter_model.bin"], "PEFT adapter"),
    ],
)
def test_other_formats_are_refused_by_name_with_a_next_step(tmp_path, names, format_name):
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        elif name.endswith(".safetensors"):
            save_file(ARRAYS, tmp_path / name)
        else:
            (tmp_path / name).touch()
    with pytest.raises(UnsupportedCheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.problem == f"a checkpoint of another format: {format_name}"
    assert caught.value.facts["file"] == str(tmp_path)
    assert caught.value.facts["found"] in names
    assert caught.value.hint is not None
    assert "{" not in caught.value.hint


def test_a_single_foreign_file_is_named_too(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UnsupportedCheckpointError, match="GGUF"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["mmproj.gguf", "training_args.bin", "optimizer.pt"])
def test_what_lies_beside_whole_safetensors_is_left_behind(tmp_path, name):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    (tmp_path / name).touch()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.skipped == (name,)
