"""nemo → hf beside a manifest: an expert gets its scale back exactly where scale and weights fold to its bits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemma4_moe import convert, verify
from gemma4_moe.checkpoint import hashing
from gemma4_moe.checkpoint.readers import PageReader
from gemma4_moe.converter import unfold
from gemma4_moe.errors import CheckpointFormatError, UsageError
from gemma4_moe.target import ledger
from support import rounding
from support.checkpoints import contents, write_checkpoint
from support.formulas import assert_same_tensors, hf_from_nemo
from support.models import random_hf_state_dict, read_directory
from support.rounding import BF16, FP16, FP32

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

E = 6
LAYER = "model.language_model.layers.1."
DOWN, SCALE, DOWNS = (
    LAYER + name for name in ("experts.down_proj", "router.per_expert_scale", "moe.experts.down_projs")
)
DTYPES = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
MANIFEST = "gemma4_moe.json"

State = dict[str, torch.Tensor]


def unfolded(
    native: torch.Tensor, scale: torch.Tensor, source: torch.dtype, target: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule by its formula: down_proj [E, H, I] and scale [E], in `target`, of native [E, I, H]."""
    down, scales = native.to(target, copy=True), torch.full((len(native),), 1.0, dtype=target)
    for expert, s in enumerate(scale.to(target)):
        if not torch.isfinite(s) or s == 0 or s.float() != scale[expert].float():
            continue
        bits, factor = numpy_of(native[expert]), np.array([s.item()], np.float32)
        with np.errstate(all="ignore"):
            quotient = bits.astype(np.float64) / factor
        quotient = np.where(np.isnan(bits.astype(np.float32)), bits.astype(np.float64), quotient)
        candidate = rounded_to(rounded_to(rounding.rounded(quotient, FP32).astype(np.float32), source), target)
        again = rounding.expected(candidate[None], factor, bits.dtype)[0]
        if np.array_equal(rounding.codes(again), rounding.codes(bits)):
            down[expert] = torch.from_numpy(rounding.codes(candidate).view(f"i{candidate.itemsize}")).view(target)
            scales[expert] = s
    return down.transpose(1, 2).contiguous(), scales


def rounded_to(values: rounding.Array, dtype: torch.dtype) -> rounding.Array:
    return rounding.expected(values, None, DTYPES[dtype])


def numpy_of(tensor: torch.Tensor) -> rounding.Array:
    array: rounding.Array = tensor.contiguous().view(torch.uint8).numpy().view(DTYPES[tensor.dtype])
    return array


def expected(native: State, state: State, source: torch.dtype, target: torch.dtype) -> State:
    """The hf state of a native one whose manifest names the scales of `state` and the dtype `source`."""
    hf = {name: tensor.to(target) for name, tensor in hf_from_nemo(native).items()}
    for name in native:
        if name.endswith("moe.experts.down_projs"):
            layer = name.removesuffix("moe.experts.down_projs")
            scale = layer + "router.per_expert_scale"
            hf[layer + "experts.down_proj"], hf[scale] = unfolded(native[name], state[scale], source, target)
    return hf


def edit(directory: Path, change: Callable[[State], None]) -> None:
    """Change values of a converted directory of one weight file, as training would, and leave its manifest."""
    file = directory / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def state() -> State:
    return random_hf_state_dict()


@pytest.fixture
def source(tmp_path: Path, state: State) -> Path:
    return write_checkpoint(tmp_path / "hf", state)


def test_powers_of_two_come_back_with_the_source_own_bits(tmp_path: Path, state: State) -> None:
    for name in state:
        if name.endswith("per_expert_scale"):
            state[name] = torch.tensor([0.5, 2.0, -4.0, 0.125, 1.0, 2.0**-9], dtype=torch.bfloat16)
    convert(write_checkpoint(tmp_path / "hf", state), tmp_path / "nemo")
    done = convert(tmp_path / "nemo", tmp_path / "back")
    assert_same_tensors(read_directory(tmp_path / "back"), state)
    assert any("10 of 10 experts" in note for note in done.notes)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_a_bf16_model_trained_in_fp32_comes_back_where_it_was_not_changed(
    target: torch.dtype, source: Path, state: State, tmp_path: Path
) -> None:
    def train(native: State) -> None:
        native[DOWNS][3, 2, 5] += 1e-3

    convert(source, tmp_path / "nemo", dtype="float32")
    edit(tmp_path / "nemo", train)
    native = read_directory(tmp_path / "nemo")
    done = convert(tmp_path / "nemo", tmp_path / "back", dtype=str(target).removeprefix("torch."))
    found = read_directory(tmp_path / "back")
    trained = native[DOWNS][3].T.to(target)
    for name, tensor in state.items():
        wanted = tensor.to(target)
        if name == DOWN:
            wanted[3] = trained
        if name == SCALE:
            wanted[3] = 1
        assert torch.equal(found[name], wanted), name
    assert any("11 of 12 experts" in note for note in done.notes)
    assert not verify(tmp_path / "nemo", tmp_path / "back").different
    if target == torch.float32:
        convert(tmp_path / "back", tmp_path / "again")
        assert_same_tensors(read_directory(tmp_path / "again"), native)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_folded_the_way_back_is_the_formula_and_loses_no_bit(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
    kept, cast = data.draw(dtypes), data.draw(dtypes)
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 0.5, -2.0, 3.0, 1e-38, 3e38, 1e-45]
    scale = data.draw(st.lists(st.sampled_from(special) | st.floats(-3, 3, width=16), min_size=E, max_size=E))
    state = random_hf_state_dict(dtype=kept, seed=data.draw(st.integers(0, 9)))
    state[SCALE] = torch.tensor(scale, dtype=torch.float32).to(kept)
    few = data.draw(st.lists(st.sampled_from([*special, 6e4, 1e-7]), min_size=3, max_size=3))
    state[DOWN][data.draw(st.integers(0, E - 1)), 1, :3] = torch.tensor(few).to(kept)
    directory = tmp_path_factory.mktemp("unfolding")
    convert(write_checkpoint(directory / "hf", state), directory / "nemo", dtype=str(cast).removeprefix("torch."))
    native = read_directory(directory / "nemo")
    convert(directory / "nemo", directory / "back")
    assert_same_tensors(read_directory(directory / "back"), expected(native, state, kept, cast))
    convert(directory / "back", directory / "again")
    assert_same_tensors(read_directory(directory / "again"), native)
    assert not verify(directory / "nemo", directory / "back").different


def test_nothing_is_divided_out_of_nan_by_zero_or_infinity(source: Path, tmp_path: Path) -> None:
    scale = torch.tensor([0.0, float("inf"), -float("inf"), float("nan"), 0.5, -2.0])
    convert(source, tmp_path / "nemo")
    names = [0.0, "inf", "-inf", "nan", 0.5, -2.0]
    edit_manifest(tmp_path / "nemo", lambda manifest: manifest["folded_scales"].update({DOWNS: names}))
    edit(tmp_path / "nemo", lambda native: native[DOWNS].fill_(float("nan")))
    native = read_directory(tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back")
    back = read_directory(tmp_path / "back")
    down, wanted = unfolded(native[DOWNS], scale, torch.bfloat16, torch.bfloat16)
    assert_same_tensors({"scale": back[SCALE], "down": back[DOWN]}, {"scale": wanted, "down": down})
    assert back[SCALE].tolist() == [1, 1, 1, 1, 0.5, -2]


def test_a_scale_that_the_target_dtype_does_not_hold_is_not_used(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "nemo", dtype="float32")
    edit_manifest(tmp_path / "nemo", lambda manifest: manifest["folded_scales"].update({DOWNS: [1 + 2**-20] * E}))
    edit(tmp_path / "nemo", lambda native: native.update({DOWNS: torch.zeros_like(native[DOWNS])}))
    convert(tmp_path / "nemo", tmp_path / "fp32")
    assert set(read_directory(tmp_path / "fp32")[SCALE].tolist()) == {1 + 2**-20}
    convert(tmp_path / "nemo", tmp_path / "bf16", dtype="bfloat16")
    assert set(read_directory(tmp_path / "bf16")[SCALE].tolist()) == {1.0}


def test_without_a_manifest_every_scale_is_one(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "nemo", dtype="float32")
    native = read_directory(tmp_path / "nemo")
    (tmp_path / "nemo" / MANIFEST).unlink()
    done = convert(tmp_path / "nemo", tmp_path / "back")
    assert_same_tensors(read_directory(tmp_path / "back"), hf_from_nemo(native))
    assert done.notes == ()


def test_a_manifest_that_names_other_scales_does_no_harm(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "nemo", dtype="float32")
    native = read_directory(tmp_path / "nemo")
    edit_manifest(
        tmp_path / "nemo", lambda manifest: manifest["folded_scales"].update({DOWNS: [0.7, 3.0, 1e9, -1.0, 2.0, 5.0]})
    )
    convert(tmp_path / "nemo", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_tensors(read_directory(tmp_path / "again"), native)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["folded_scales"].update({DOWNS: [2.0] * (E - 1)}),
        lambda manifest: manifest["folded_scales"].update({DOWNS: [2.0] * (E - 1) + ["two"]}),
        lambda manifest: manifest["folded_scales"].update({DOWNS: [2.0] * (E - 1) + [10**400]}),
        lambda manifest: manifest["folded_scales"].update({DOWNS: [2.0] * (E - 1) + [True]}),
        lambda manifest: manifest["folded_scales"].update({DOWNS: {"0": 2.0}}),
        lambda manifest: manifest["source_dtypes"].update({DOWNS: "int8"}),
        lambda manifest: manifest["source_dtypes"].update({DOWNS: ["bfloat16"]}),
        lambda manifest: manifest["source_dtypes"].pop(DOWNS),
        lambda manifest: manifest.update(folded_scales=[1.0]),
        lambda manifest: manifest.pop("folded_scales"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "nemo")
    edit_manifest(tmp_path / "nemo", change)
    with pytest.raises(CheckpointFormatError) as caught:
        convert(tmp_path / "nemo", tmp_path / "back")
    assert MANIFEST in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "back").exists()


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the journal know of every few blocks."""
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(ledger, "FLUSH_BYTES", 4096)


def convert_in_part(source: Path, target: Path, budget: int, share: float = 0.3) -> None:
    """Interrupt a conversion after a share of its bytes."""

    def stop(done: int, total: int) -> None:
        if done > total * share:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, max_memory=budget, progress=stop)


@pytest.mark.parametrize("budget", [24_576, 60_000])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_blocks_and_resuming_do_not_show_in_the_bytes(
    share: float, budget: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(native: State) -> None:
        native[DOWNS][::2] *= 1.0009765625

    small_chunks(monkeypatch)
    convert(source, tmp_path / "nemo", dtype="float32")
    edit(tmp_path / "nemo", train)
    convert(tmp_path / "nemo", tmp_path / "whole")
    convert_in_part(tmp_path / "nemo", tmp_path / "back", budget, share)
    seen: list[int] = []
    convert(
        tmp_path / "nemo",
        tmp_path / "back",
        max_memory=budget,
        resume=True,
        progress=lambda _, total: seen.append(total),
    )
    assert seen[-1] < sum(file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors"))
    assert contents(tmp_path / "back") == contents(tmp_path / "whole")


def test_a_run_is_not_resumed_with_another_manifest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch)
    convert(source, tmp_path / "nemo", dtype="float32")
    convert_in_part(tmp_path / "nemo", tmp_path / "back", 60_000)
    edit_manifest(tmp_path / "nemo", lambda manifest: manifest["folded_scales"].update({DOWNS: [2.0] * E}))
    with pytest.raises(UsageError, match="another one"):
        convert(tmp_path / "nemo", tmp_path / "back", resume=True)


def test_an_expert_is_looked_at_to_its_last_row(
    source: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(native: State) -> None:
        native[DOWNS][3, -1, -1] += 1e-3

    rows = state[DOWN].shape[2]
    monkeypatch.setattr(unfold, "_FIRST", 2 * state[DOWN].shape[1])
    monkeypatch.setattr(unfold, "_PIECE", 3 * state[DOWN].shape[1])
    assert (rows - 2) % 3 != 0, "the last piece is a shorter one"
    convert(source, tmp_path / "nemo", dtype="float32")
    edit(tmp_path / "nemo", train)
    native = read_directory(tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back")
    assert_same_tensors(read_directory(tmp_path / "back"), expected(native, state, torch.bfloat16, torch.float32))


def test_each_expert_is_read_once_where_one_run_does_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(native: State) -> None:
        native[DOWNS][::2] *= 1.0009765625

    read: dict[tuple[int, int], int] = {}
    page_read = PageReader.read

    def counting(reader: PageReader, offset: int, size: int, buffer: memoryview) -> memoryview:
        if reader._file.path == tmp_path / "nemo/model.safetensors":
            read[offset, size] = read.get((offset, size), 0) + 1
        return page_read(reader, offset, size, buffer)

    convert(source, tmp_path / "nemo", dtype="float32")
    edit(tmp_path / "nemo", train)
    monkeypatch.setattr(PageReader, "read", counting)
    convert(tmp_path / "nemo", tmp_path / "back", read_back=False, max_memory=60_000)
    assert set(read.values()) == {1}
    stored = sum(tensor.nbytes for tensor in read_directory(tmp_path / "nemo").values())
    assert sum(size for _, size in read) == stored
