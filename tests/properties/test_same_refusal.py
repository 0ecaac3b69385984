"""What one entrance refuses, all refuse, in the same words: experts of a dtype that is not converted."""

import pytest

from gemma4_moe import Gemma4MoEStateDictAdapter, convert, inspect, load_hf, plan, save_hf
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import TensorShapeError
from gemma4_moe.refit import WeightStream
from support.checkpoints import write_checkpoint
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict

PATH = "model.language_model.layers.1."
HF_NAME, NEMO_NAME = PATH + "experts.gate_up_proj", PATH + "moe.experts.gate_and_up_projs"
GOOD = random_hf_state_dict()
HF = GOOD | {HF_NAME: GOOD[HF_NAME].double()}
NEMO = nemo_from_hf(HF)
ADAPTER = Gemma4MoEStateDictAdapter(None, MoEConfig(6, 10, 7), None)


def inspected(directory):
    (problem,) = inspect(directory).problems
    raise problem


ENTRANCES = {
    "inspect": lambda tmp: inspected(tmp / "hf"),
    "plan": lambda tmp: plan(tmp / "hf"),
    "convert": lambda tmp: convert(tmp / "hf", tmp / "nemo"),
    "convert as bfloat16": lambda tmp: convert(tmp / "hf", tmp / "nemo", dtype="bfloat16"),
    "load_hf": lambda tmp: load_hf(nemo_from_hf(GOOD), tmp / "hf"),
    "save_hf": lambda tmp: save_hf(NEMO, tmp / "saved", config_from=tmp / "hf"),
    "save_hf as bfloat16": lambda tmp: save_hf(NEMO, tmp / "saved", config_from=tmp / "hf", dtype="bfloat16"),
    "stream": lambda _: WeightStream(NEMO, ADAPTER),
    "stream as bfloat16": lambda _: WeightStream(NEMO, ADAPTER, dtype="bfloat16"),
    "from_hf": lambda _: ADAPTER.from_hf(HF),
    "to_hf": lambda _: ADAPTER.to_hf(NEMO),
    "convert_single_tensor_to_hf": lambda _: ADAPTER.convert_single_tensor_to_hf(NEMO_NAME, NEMO[NEMO_NAME]),
    "get_hf_state_dict_keys": lambda _: ADAPTER.get_hf_state_dict_keys(NEMO),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_experts_in_float64_are_refused(entrance, tmp_path):
    write_checkpoint(tmp_path / "hf", HF)
    with pytest.raises(TensorShapeError) as caught:
        ENTRANCES[entrance](tmp_path)
    name = HF_NAME if caught.value.facts["tensor"] == HF_NAME else NEMO_NAME
    assert str(caught.value) == (
        "an expert tensor of a dtype that is not converted\n"
        f"  tensor: {name}\n"
        "  expected: one of bfloat16, float16, float32\n"
        "  found: float64\n"
        "  next: cast the experts to one of these dtypes, or start from unquantised weights"
    )
    assert not (tmp_path / "nemo").exists()
    assert not (tmp_path / "saved").exists()
