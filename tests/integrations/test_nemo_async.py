"""NeMo AutoModel's asynchronous save with our adapter installed: what is saved is what the weights were at the call."""

import pytest
import torch
import torch.distributed as dist

from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.integrations import nemo_automodel
from support import peer
from support.formulas import assert_same_tensors, hf_from_nemo
from support.models import read_directory

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: so does NeMo's stager"),
    pytest.mark.filterwarnings("ignore"),  # torch and NeMo warn of each other
]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_asynchronous_save(tmp_path):
    from transformers import AutoConfig

    base = tmp_path / "base"
    save_model(build_model("multimodal", seed=3), base)
    with nemo_automodel.installed():
        model = peer.model(AutoConfig.from_pretrained(base)).to("cuda")
        adapter = model.state_dict_adapter
        model._pre_shard_hf_state_dict_keys = adapter.get_hf_state_dict_keys(model.state_dict())
        generator = torch.Generator("cuda").manual_seed(5)
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight":
                tensor.copy_(torch.randn(tensor.shape, device="cuda", generator=generator))
        native = {n: t.cpu().clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}

        options = {"model_repo_id": str(base), "save_consolidated": True, "is_async": True, "wait_for_staging": True}
        checkpointer = peer.checkpointer(tmp_path / "saved", **options)
        checkpointer.save_model(model, str(tmp_path / "saved"))
        checkpointer.maybe_wait_for_staging()
        for tensor in model.state_dict().values():  # the next step of training, while the files are being written
            tensor.fill_(7.0)
        checkpointer.async_wait()
        checkpointer.close()
    assert_same_tensors(read_directory(tmp_path / "saved" / "model" / "consolidated"), hf_from_nemo(native))
