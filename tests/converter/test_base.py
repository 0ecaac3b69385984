"""`--base`: an expert that is still the base's, folded, comes back as the base's own bits; all others keep theirs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma4_moe import convert, plan, verify
from gemma4_moe.converter import base as base_module
from gemma4_moe.errors import SourceChangedError, TensorShapeError, UnknownTensorError, UsageError
from support.checkpoints import contents, write_checkpoint
from support.formulas import assert_same_tensors, hf_from_nemo
from support.models import random_hf_state_dict, read_directory, respell_as_legacy

LAYER = "model.language_model.layers.1."
DOWN, SCALE, DOWNS = (
    LAYER + name for name in ("experts.down_proj", "router.per_expert_scale", "moe.experts.down_projs")
)
MANIFEST = "gemma4_moe.json"

State = dict[str, torch.Tensor]


@pytest.fixture
def state():
    state = random_hf_state_dict()
    state[SCALE] = torch.tensor([0.7, -1.3, 0.0, 1.0, 2.0, 3e-3], dtype=torch.bfloat16)
    return state


@pytest.fixture
def base(tmp_path, state):
    return write_checkpoint(tmp_path / "hf", state)


def edit(directory, change):
    """Change values of a converted directory of one weight file, as training would."""
    native = load_file(directory / "nemo.safetensors")
    change(native)
    save_file(native, directory / "nemo.safetensors", {"format": "pt"})


def train(native):
    native[DOWNS][4, -1, -1] *= 1.5  # the last element: nothing tells it before
    native[DOWNS][5] += 1


@pytest.mark.parametrize("pieces", [True, False])
def test_what_was_not_trained_comes_back_with_the_base_own_bits(pieces, base, state, tmp_path, monkeypatch):
    if pieces:
        monkeypatch.setattr(base_module, "_FIRST", 2 * 7)
        monkeypatch.setattr(base_module, "_PIECE", 3 * 7)
    convert(base, tmp_path / "nemo")
    edit(tmp_path / "nemo", train)
    native = read_directory(tmp_path / "nemo")
    done = convert(tmp_path / "nemo", tmp_path / "back", base=base)
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    alone = hf_from_nemo(native)
    wanted[DOWN][4:] = alone[DOWN][4:]
    wanted[SCALE][4:] = 1
    assert_same_tensors(read_directory(tmp_path / "back"), wanted)
    assert not verify(tmp_path / "nemo", tmp_path / "back").different
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_tensors(read_directory(tmp_path / "again"), native)
    assert len([note for note in done.notes if "all zero" not in note]) == 1  # one scale is zero
    assert done.notes[-1].startswith("10 of 12 experts are the base's, folded")


def test_a_model_in_fp32_comes_back_to_the_base_file_by_file(base, state, tmp_path):
    convert(base, tmp_path / "nemo", dtype="float32")
    convert(tmp_path / "nemo", tmp_path / "bf16", dtype="bfloat16", base=base)
    assert_same_tensors(read_directory(tmp_path / "bf16"), state)
    convert(tmp_path / "nemo", tmp_path / "fp32", base=base)
    assert_same_tensors(read_directory(tmp_path / "fp32"), {name: tensor.float() for name, tensor in state.items()})


def test_a_base_in_the_legacy_spelling_is_the_same(base, state, tmp_path):
    convert(base, tmp_path / "nemo")
    respell_as_legacy(base)
    convert(tmp_path / "nemo", tmp_path / "back", base=base)
    assert_same_tensors(read_directory(tmp_path / "back"), state)


def test_another_model_as_the_base_does_no_harm(base, tmp_path):
    convert(base, tmp_path / "nemo")
    native = read_directory(tmp_path / "nemo")
    other = write_checkpoint(tmp_path / "other", random_hf_state_dict(seed=1))
    convert(tmp_path / "nemo", tmp_path / "back", base=other)
    assert_same_tensors(read_directory(tmp_path / "back"), hf_from_nemo(native))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda state: {name: t.float() for name, t in state.items()}, UsageError, "does not hold the base's values"),
        (lambda state: {name: t for name, t in state.items() if LAYER not in name}, UsageError, "lacks a layer"),
        (lambda _: random_hf_state_dict(prefix="model."), UnknownTensorError, "text-only names"),
        (lambda _: random_hf_state_dict(E=5), TensorShapeError, "another shape"),
        (lambda _: random_hf_state_dict(H=12), TensorShapeError, "another shape"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(change, error, words, base, state, tmp_path):
    convert(base, tmp_path / "nemo")
    other = write_checkpoint(tmp_path / "other", change(state))
    for attempt in (
        lambda: convert(tmp_path / "nemo", tmp_path / "back", base=other),
        lambda: plan(tmp_path / "nemo", base=other),
    ):
        with pytest.raises(error, match=words) as caught:
            attempt()
        assert "other" in str(caught.value)
        assert caught.value.hint
    assert not (tmp_path / "back").exists()


def test_the_base_of_a_conversion_to_nemo_and_a_base_in_nemo_are_refused(base, tmp_path):
    with pytest.raises(UsageError, match="for the conversion to hf"):
        convert(base, tmp_path / "nemo", to="nemo", base=base)
    convert(base, tmp_path / "nemo")
    with pytest.raises(UsageError, match="wrong layout"):
        convert(tmp_path / "nemo", tmp_path / "back", base=tmp_path / "nemo")
    with pytest.raises(UsageError, match=r"inside|lies in"):
        convert(tmp_path / "nemo", base / "back", base=base)


def interrupt(source, target, base, last):
    """Interrupt a conversion once all but the `last` bytes are written."""

    def stop(done, total):
        if done > total - last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, base=base, max_memory=60_000, progress=stop)


@pytest.mark.usefixtures("small_blocks")
def test_resuming_does_not_show_and_wants_the_same_base(base, tmp_path):
    convert(base, tmp_path / "nemo", dtype="float32")
    edit(tmp_path / "nemo", train)
    convert(tmp_path / "nemo", tmp_path / "whole", base=base)
    interrupt(tmp_path / "nemo", tmp_path / "back", base, last=1600)  # most experts, and no scale
    shutil.copytree(base, tmp_path / "copy")
    for other in (None, tmp_path / "copy"):
        with pytest.raises(UsageError, match="another one"):
            convert(tmp_path / "nemo", tmp_path / "back", base=other, resume=True)
    convert(tmp_path / "nemo", tmp_path / "back", base=base, max_memory=60_000, resume=True)
    assert contents(tmp_path / "back") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_blocks")
def test_no_expert_is_judged_twice(base, state, tmp_path, monkeypatch):
    """Interrupted at the first scale, when all experts are written: a resumed run knows them from the journal."""
    judged = []
    whole = base_module.Unfolding.unfold

    def noted(self, name, number, native, out):
        judged.append((name, number))
        return whole(self, name, number, native, out)

    convert(base, tmp_path / "nemo")
    monkeypatch.setattr(base_module.Unfolding, "unfold", noted)
    interrupt(tmp_path / "nemo", tmp_path / "back", base, last=2 * 6 * 2)  # two scales of six experts in bf16
    convert(tmp_path / "nemo", tmp_path / "back", base=base, resume=True)
    assert len(judged) == len(set(judged)) == 2 * 6
    assert_same_tensors(read_directory(tmp_path / "back"), state)


def test_the_manifest_says_which_base_it_was_and_a_complete_target_is_not_taken_for_another(base, tmp_path):
    convert(base, tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back", base=base)
    files = json.loads((tmp_path / "nemo" / MANIFEST).read_text())["source"]["files"]
    said = json.loads((tmp_path / "back" / MANIFEST).read_text())["options"]["base"]
    assert said == {name: file["header_sha256"] for name, file in files.items()}
    with pytest.raises(UsageError, match="exists"):
        convert(tmp_path / "nemo", tmp_path / "back", base=base, resume=True)


def test_a_base_that_changes_meanwhile_stops_the_run(base, tmp_path):
    convert(base, tmp_path / "nemo")

    def change(_done, _total):
        (base / "model-00001-of-00002.safetensors").touch()

    with pytest.raises(SourceChangedError, match="changed while it was read"):
        convert(tmp_path / "nemo", tmp_path / "back", base=base, progress=change)
    assert not (tmp_path / "back").exists()


def with_scales_in_fp32(state, change=None):
    """The state with each `per_expert_scale` in fp32, and one value that `change` makes of another."""
    found = {name: t.float() if name.endswith("per_expert_scale") else t for name, t in state.items()}
    if change is not None:
        found[SCALE][1] = change(found[SCALE][1])
    return found


def test_an_fp32_scale_whose_values_are_exact_is_taken_and_another_refused(state, tmp_path):
    base = write_checkpoint(tmp_path / "base", with_scales_in_fp32(state))
    convert(base, tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back", base=base)
    assert_same_tensors(read_directory(tmp_path / "back"), state)
    assert not verify(tmp_path / "nemo", tmp_path / "back").different
    inexact = write_checkpoint(tmp_path / "inexact", with_scales_in_fp32(state, lambda value: value * (1 + 2**-20)))
    with pytest.raises(UsageError, match="does not hold the base's values"):
        convert(tmp_path / "nemo", tmp_path / "again", base=inexact)


def test_tokenizer_and_template_that_the_source_lacks_are_the_bases(base, tmp_path):
    convert(base, tmp_path / "nemo")
    for name, text in (("chat_template.jinja", "{{ x }}"), ("README.md", "the base's"), ("tokenizer.json", "{}")):
        (base / name).write_text(text)
    (base / "special_tokens_map.json").write_text('{"eos": 1}')
    done = convert(tmp_path / "nemo", tmp_path / "back", base=base)
    assert "from the base, which the source lacks: chat_template.jinja, special_tokens_map.json" in done.notes
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "nemo" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "back" / "README.md").exists()
    assert not verify(tmp_path / "back").wrong
    assert not any("from the base" in note for note in convert(tmp_path / "nemo", tmp_path / "alone").notes)
