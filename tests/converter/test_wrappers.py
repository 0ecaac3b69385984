"""A directory whose names have the components of torch's wrappers: named everywhere, and converted when asked to."""

import pytest

from gemma4_moe import convert, inspect, load_hf, plan, verify
from gemma4_moe.errors import DuplicateTensorError, UnknownTensorError
from support.checkpoints import write_checkpoint
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict, read_directory, rename_tensors

WRAPPERS = [
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module.{name}",
    lambda name: name.replace(".layers.1.", ".layers.1._checkpoint_wrapped_module."),
    lambda name: f"_fsdp_wrapped_module.{name}",
]


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return request.param


@pytest.fixture(params=["hf", "nemo"])
def wrapped(request, wrap, tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=2, E=6, H=40, I=24))
    if request.param == "nemo":
        convert(source, tmp_path / "nemo")
        source = tmp_path / "nemo"
    state = read_directory(source)
    rename_tensors(source, wrap)
    return source, state


def test_it_is_named_with_the_command_that_mends_it(wrapped, tmp_path):
    source, state = wrapped
    found = inspect(source)
    assert found.spelling == "wrapped"
    (problem,) = found.problems
    assert "names of a wrapped module" in str(problem)
    assert f"convert {source} DST --strip-wrappers" in problem.hint
    for call in (
        lambda: convert(source, tmp_path / "out"),
        lambda: plan(source),
        lambda: verify(source, source),
        lambda: load_hf(nemo_from_hf(random_hf_state_dict(layers=2, E=6, H=40, I=24)), source),
    ):
        with pytest.raises(UnknownTensorError, match="names of a wrapped module") as refused:
            call()
        assert refused.value.facts["expected"] in state
    assert not (tmp_path / "out").exists()


def test_it_is_converted_without_them_and_verified(wrapped, tmp_path):
    source, state = wrapped
    before = read_directory(source)
    convert(source, tmp_path / "out", strip_wrappers=True)
    is_native = any("moe.experts" in name for name in state)
    expected = hf_from_nemo(state) if is_native else nemo_from_hf(state)
    assert_same_tensors(read_directory(tmp_path / "out"), expected)
    assert not verify(source, tmp_path / "out", strip_wrappers=True).different
    assert not verify(tmp_path / "out").wrong
    assert plan(source, strip_wrappers=True).plan.tensors.keys() == expected.keys()
    assert_same_tensors(read_directory(source), before)


def test_names_that_become_one_are_refused(tmp_path):
    state = random_hf_state_dict(layers=2, E=6, H=40, I=24)
    name = "model.language_model.embed_tokens.weight"
    source = write_checkpoint(tmp_path / "twice", state | {f"module.{name}": state[name].clone()})
    with pytest.raises(DuplicateTensorError, match=f"(?s)become one.*{name}"):
        convert(source, tmp_path / "out", strip_wrappers=True)
