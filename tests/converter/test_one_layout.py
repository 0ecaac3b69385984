"""From hf to hf: the parts of a step made whole, and experts given back to a base, in one pass."""

import pytest
import torch

from gemma4_moe import convert, plan, verify
from gemma4_moe.errors import UsageError
from support.checkpoints import write_checkpoint
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import DOWN, GATE_UP, SCALE, random_hf_state_dict, read_directory, rename_tensors
from support.steps import write_step

SIZES = {"E": 6, "H": 40, "I": 24}


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base", random_hf_state_dict(**SIZES))


@pytest.fixture
def trained():
    """What a run exports: folded weights under a scale of ones; experts 1 and 4 of the first layer have changed."""
    state = hf_from_nemo(nemo_from_hf(random_hf_state_dict(**SIZES)))
    state[DOWN] = state[DOWN].clone()
    state[DOWN][[1, 4], 3, 5] += 0.5
    state[GATE_UP] = state[GATE_UP] + 1
    return state


def given_back(trained):
    """The trained state with all that training left alone as in the base, by plain copies."""
    base = random_hf_state_dict(**SIZES)
    expected = dict(trained)
    for name in trained:
        if name.endswith(("down_proj", "per_expert_scale")) and "layers.1." in name:
            expected[name] = base[name]
    for name in (DOWN, SCALE):
        expected[name] = base[name].clone()
        expected[name][[1, 4]] = trained[name][[1, 4]]
    return expected


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("ways", [0, 3])
def test_a_base_is_applied_to_an_export_whole_or_in_parts(ways, small, base, trained, tmp_path, request):
    if small:
        request.getfixturevalue("small_blocks")
    source = write_checkpoint(tmp_path / "whole", trained)
    if ways:
        source = write_step(tmp_path / "step", source, ways, experts_on_axis_1=2)
    done = convert(source, tmp_path / "hf", base=base)
    assert_same_tensors(read_directory(tmp_path / "hf"), given_back(trained))
    assert "10 of 12 experts are the base's" in done.notes[0]
    assert verify(source, tmp_path / "hf").different == ()


def test_an_expert_under_another_scale_that_folds_alike_is_the_bases(base, tmp_path):
    state = random_hf_state_dict(**SIZES)
    state[DOWN], state[SCALE] = state[DOWN].clone(), state[SCALE].clone()
    state[DOWN][2] *= 2
    state[SCALE][2] /= 2
    source = write_checkpoint(tmp_path / "hf", state)
    convert(source, tmp_path / "back", base=base)
    assert_same_tensors(read_directory(tmp_path / "back"), random_hf_state_dict(**SIZES))
    assert verify(source, tmp_path / "back").different == ()


def test_an_expert_that_differs_keeps_its_own_scale(base, tmp_path):
    state = random_hf_state_dict(**SIZES)
    state[DOWN] = state[DOWN].clone()
    state[DOWN][2, 0, 0] += 3
    convert(write_checkpoint(tmp_path / "hf", state), tmp_path / "again", base=base)
    assert_same_tensors(read_directory(tmp_path / "again"), state)


@pytest.mark.parametrize(("name", "different"), [(DOWN, {DOWN, SCALE}), (SCALE, {DOWN, SCALE}), (GATE_UP, {GATE_UP})])
def test_verify_finds_a_wrong_value(name, different, base, trained, tmp_path):
    source = write_checkpoint(tmp_path / "whole", trained)
    convert(source, tmp_path / "hf", base=base)
    wrong = read_directory(tmp_path / "hf")
    wrong[name] = wrong[name].clone()
    wrong[name].view(-1)[0] *= 1.5
    for file in (tmp_path / "hf").glob("*.safetensors"):
        file.unlink()
    found = verify(source, write_checkpoint(tmp_path / "wrong", wrong))
    assert {difference.name for difference in found.different} == different


@pytest.mark.parametrize("ways", [2, 5])
def test_a_step_in_parts_becomes_whole(ways, tmp_path):
    state = random_hf_state_dict(**SIZES)
    step = write_step(tmp_path / "step", write_checkpoint(tmp_path / "whole", state), ways)
    done = convert(step, tmp_path / "hf", to="hf")
    assert not any("per_expert_scale" in note for note in done.notes)
    assert_same_tensors(read_directory(tmp_path / "hf"), state)
    assert verify(step, tmp_path / "hf").different == ()
    convert(step, tmp_path / "fp32", to="hf", dtype="float32")
    assert_same_tensors(read_directory(tmp_path / "fp32"), {name: tensor.float() for name, tensor in state.items()})
    assert verify(step, tmp_path / "fp32").different == ()


def test_native_parts_become_whole_too(tmp_path):
    native = nemo_from_hf(random_hf_state_dict(**SIZES))
    whole = write_checkpoint(tmp_path / "whole", random_hf_state_dict(**SIZES))
    convert(whole, tmp_path / "native")
    step = write_step(tmp_path / "step", tmp_path / "native", 2)
    convert(step, tmp_path / "nemo", to="nemo")
    assert_same_tensors(read_directory(tmp_path / "nemo"), native)


def test_the_same_layout_without_parts_or_a_base_is_refused(base):
    with pytest.raises(UsageError, match="in the hf layout already"):
        plan(base, to="hf")
    with pytest.raises(UsageError, match="a base is for the conversion to hf"):
        plan(base, to="nemo", base=base)
    assert plan(base, base=base).plan.target_layout == "hf"


def test_the_legacy_spelling_becomes_the_current_one(base, trained, tmp_path):
    from support.formulas import legacy_name

    source = write_checkpoint(tmp_path / "legacy", trained)
    rename_tensors(source, legacy_name)
    convert(source, tmp_path / "hf", base=base)
    assert_same_tensors(read_directory(tmp_path / "hf"), given_back(trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_is_resumed(dtype, base, tmp_path, small_blocks, monkeypatch):
    state = {k: v.to(dtype) for k, v in hf_from_nemo(nemo_from_hf(random_hf_state_dict(**SIZES), dtype)).items()}
    source = write_checkpoint(tmp_path / "whole", state)
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "hf", base=base, dtype="bfloat16", progress=stop)
    convert(source, tmp_path / "hf", base=base, dtype="bfloat16", resume=True)
    assert_same_tensors(read_directory(tmp_path / "hf"), read_directory(base))
