"""`convert`: the right bits in the right files, whatever the block size, and a directory that is absent or complete."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from gemma4_moe import convert
from gemma4_moe.converter import blocks, conversion, write
from gemma4_moe.errors import UsageError
from support.checkpoints import contents, write_checkpoint
from support.formulas import assert_same_tensors, folded, hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict, read_directory, respell_as_legacy

State = dict[str, torch.Tensor]


@pytest.fixture
def state():
    return random_hf_state_dict(layers=3)


@pytest.fixture
def source(tmp_path, state):
    return write_checkpoint(tmp_path / "hf", state)


@pytest.mark.parametrize("manifest", [True, False])
def test_there_and_back_keeps_native_bits_and_a_note_names_the_base(manifest, source, tmp_path):
    convert(source, tmp_path / "nemo")
    native = read_directory(tmp_path / "nemo")
    if not manifest:
        (tmp_path / "nemo/gemma4_moe.json").unlink()
    done = convert(tmp_path / "nemo", tmp_path / "back")
    (note,) = done.notes
    assert "--base" in note
    assert_same_tensors(read_directory(tmp_path / "back"), hf_from_nemo(native))
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_tensors(read_directory(tmp_path / "again"), native)


def test_legacy_spelling_gives_the_same_target(source, tmp_path):
    convert(source, tmp_path / "from-current")
    respell_as_legacy(source)
    convert(source, tmp_path / "from-legacy")
    assert_same_tensors(read_directory(tmp_path / "from-legacy"), read_directory(tmp_path / "from-current"))


@pytest.mark.parametrize(("prefix", "model_type"), [("model.language_model.", "gemma4"), ("model.", "gemma4_text")])
def test_nemo_is_the_fold_by_formula_and_names_keep_their_prefix(prefix, model_type, tmp_path):
    state = random_hf_state_dict(layers=3, prefix=prefix)
    source = write_checkpoint(tmp_path / "hf", state, {"model_type": model_type, "num_experts": 6})
    convert(source, tmp_path / "nemo")
    assert_same_tensors(read_directory(tmp_path / "nemo"), nemo_from_hf(state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_casts_every_floating_point_tensor_and_rounds_a_fold_once(tmp_path, dtype):
    state = random_hf_state_dict(dtype=torch.float32) | {"model.position_ids": torch.arange(5)}
    done = convert(write_checkpoint(tmp_path / "hf", state), tmp_path / "nemo", dtype=dtype)
    target = getattr(torch, dtype)

    def cast(state):
        return {name: tensor.to(target) if tensor.is_floating_point() else tensor for name, tensor in state.items()}

    expected, twice_rounded = cast(nemo_from_hf(state, target)), nemo_from_hf(cast(state))
    assert_same_tensors(read_directory(tmp_path / "nemo"), expected)
    assert (dtype == "float32") == (not any("rounded" in note for note in done.notes))
    down = "model.language_model.layers.1.moe.experts.down_projs"
    assert (dtype == "float32") == torch.equal(expected[down], twice_rounded[down])


@pytest.mark.parametrize(
    "how", [{"max_memory": 24_576}, {"max_memory": 50_000}, {"max_memory": 100_000}, {"buffered": True}], ids=str
)
def test_the_budget_and_the_way_to_the_disk_do_not_show_in_the_bytes(how, source, tmp_path):
    convert(source, tmp_path / "plain", max_shard_size=2000)
    done = convert(source, tmp_path / "other", max_shard_size=2000, **how)
    assert done.memory.peak_bytes <= how.get("max_memory", 2**30)
    assert contents(tmp_path / "other") == contents(tmp_path / "plain")


@pytest.mark.parametrize(("block_bytes", "files"), [(1, 2), (300, 2), (1000, 2), (5000, 2), (2**25, 5)])
def test_the_size_of_blocks_and_the_files_of_the_source_do_not_show_in_the_weights(
    block_bytes, files, source, state, tmp_path, monkeypatch
):
    convert(source, tmp_path / "plain")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    convert(write_checkpoint(tmp_path / "files", state, files=files), tmp_path / "other")
    plain, other = contents(tmp_path / "plain"), contents(tmp_path / "other")
    assert plain.pop("gemma4_moe.json") != other.pop("gemma4_moe.json")
    assert other == plain


def test_shard_size_bounds_files_and_a_larger_tensor_has_its_own(source, tmp_path):
    convert(source, tmp_path / "nemo", max_shard_size=1000)
    convert(tmp_path / "nemo", tmp_path / "back", max_shard_size=1000)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(
        p.name for p in (tmp_path / "back").glob("*.safetensors")
    )
    for layout in ("nemo", "back"):
        files = sorted(path.name for path in (tmp_path / layout).glob("*.safetensors"))
        assert len(files) > 3
        total = 0
        for file in files:
            tensors = load_file(tmp_path / layout / file)
            size = sum(tensor.nbytes for tensor in tensors.values())
            total += size
            assert size <= 1000 or len(tensors) == 1
            assert layout == "nemo" or {index["weight_map"][name] for name in tensors} == {file}
    assert index["metadata"] == {"total_size": total}


def test_side_files_are_copied_byte_for_byte_and_others_are_not(source, tmp_path):
    (source / "modeling_custom.py").write_text("raise SystemExit")
    (source / "LICENSE").write_bytes(b"as it is\r\n")
    done = convert(source, tmp_path / "nemo")
    assert done.skipped == ("modeling_custom.py",)
    copied = {"LICENSE", "config.json", "tokenizer.json"}
    assert contents(tmp_path / "nemo").keys() == copied | {"gemma4_moe.json", "nemo.safetensors"}
    for name in copied:
        assert (tmp_path / "nemo" / name).read_bytes() == (source / name).read_bytes()


def test_data_starts_at_a_page_and_modes_follow_the_umask(source, tmp_path):
    before = os.umask(0o027)
    try:
        convert(source, tmp_path / "nemo")
    finally:
        os.umask(before)
    assert (tmp_path / "nemo").stat().st_mode & 0o777 == 0o750
    for path in (tmp_path / "nemo").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path
    raw = (tmp_path / "nemo/nemo.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.5])
def test_unusual_scales_are_kept_and_said(tmp_path, value):
    state = random_hf_state_dict()
    layer = "model.language_model.layers.1."
    state[layer + "router.per_expert_scale"][2] = value
    source = write_checkpoint(tmp_path / "hf", state)
    done = convert(source, tmp_path / "nemo")
    found = read_directory(tmp_path / "nemo")[layer + "moe.experts.down_projs"]
    expected = folded(state[layer + "experts.down_proj"], state[layer + "router.per_expert_scale"], torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    (note,) = done.notes
    assert layer in note
    assert "1 " in note


def test_overwrite_replaces_a_checkpoint_or_an_empty_directory_and_only_that(source, tmp_path):
    target = tmp_path / "nemo"
    target.mkdir()
    convert(source, target, max_shard_size=1000)
    with pytest.raises(UsageError, match="exists"):
        convert(source, target)
    convert(source, target, overwrite=True)
    assert [path.name for path in target.glob("*.safetensors")] == ["nemo.safetensors"]
    (target / "notes.txt").write_text("mine")
    before = contents(target)
    with pytest.raises(UsageError, match="no checkpoint accounts for") as caught:
        convert(source, target, overwrite=True)
    assert "notes.txt" in str(caught.value)
    assert contents(target) == before


def test_the_manifest_has_hashes_of_both_sides_and_what_was_done(source, state, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)
    convert(source, tmp_path / "nemo", sha256=True, read_back=False)
    manifest = json.loads((tmp_path / "nemo/gemma4_moe.json").read_text())
    assert manifest["options"] == {"dtype": "keep", "max_shard_size": 5 * 10**9, "to": "nemo", "read_back": False}
    assert manifest["files"].keys() | {"gemma4_moe.json"} == {path.name for path in (tmp_path / "nemo").iterdir()}
    for where, directory in ((manifest["files"], tmp_path / "nemo"), (manifest["source"]["files"], source)):
        for name, said in where.items():
            raw = (directory / name).read_bytes()
            assert said["bytes"] == len(raw)
            assert said["sha256"] == hashlib.sha256(raw).hexdigest()
    for name, said in manifest["files"].items():
        raw, before = (tmp_path / "nemo" / name).read_bytes(), 0
        for start, end, digest in said["pieces"]:
            assert start == before
            assert digest == blake3(raw[start:end]).hexdigest()
            before = end
        assert before == said["bytes"]
    assert len(manifest["files"]["nemo.safetensors"]["pieces"]) > 50
    assert manifest["source"]["blocks"] == blocks_by_hand(state, 200)
    for name, scale in manifest["folded_scales"].items():
        layer = name.removesuffix("moe.experts.down_projs")
        assert scale == state[layer + "router.per_expert_scale"].float().tolist()


def blocks_by_hand(state, block_bytes):
    """The digest of the source bytes of each block of at most `block_bytes`, by the nemo names."""
    found = {}
    for name, tensor in state.items():
        raw = tensor.view(torch.uint8).numpy().tobytes()
        native = name.replace("experts.gate_up_proj", "moe.experts.gate_and_up_projs")
        native = native.replace("experts.down_proj", "moe.experts.down_projs")
        step, extra = block_bytes, None
        if native != name:
            step = max(1, block_bytes // tensor[0].nbytes) * tensor[0].nbytes
        if name.endswith("experts.down_proj"):
            scale = state[name.replace("experts.down_proj", "router.per_expert_scale")]
            extra = scale.view(torch.uint8).numpy().tobytes(), 2 * step // tensor[0].nbytes
        native = native.replace("router.proj", "moe.gate.proj").replace("router.scale", "moe.gate.scale")
        if not name.endswith("per_expert_scale"):
            pieces = [raw[start : start + step] for start in range(0, len(raw), step)]
            if extra is not None:
                pieces = [
                    piece + extra[0][number * extra[1] : (number + 1) * extra[1]] for number, piece in enumerate(pieces)
                ]
            found[native] = [blake3(piece).hexdigest() for piece in pieces]
    return found


def test_peak_memory_does_not_grow_with_layers(tmp_path):
    """Measured from outside, at 2 and at 8 layers that are each larger than all buffers together."""
    program = """
        import re, sys
        from pathlib import Path
        from gemma4_moe import convert
        convert(sys.argv[1], sys.argv[2], max_memory="8MiB")
        print(re.search(r"VmHWM:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text())[1])
    """
    peaks = []
    for layers in (2, 8):
        state = random_hf_state_dict(layers=layers, E=12, H=256, I=240)  # 4.4 MB a layer
        source = write_checkpoint(tmp_path / f"hf{layers}", state)
        command = [sys.executable, "-c", textwrap.dedent(program), source, tmp_path / f"nemo{layers}"]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout) * 1024)
    assert abs(peaks[1] - peaks[0]) < 4 * 2**20, peaks


@pytest.mark.parametrize(
    ("launched", "asked", "workers"), [(None, None, 6), ("4", None, 1), ("2", None, 3), ("8", None, 1), ("2", 5, 5)]
)
def test_ranks_of_one_host_share_its_cores(launched, asked, workers, source, tmp_path, monkeypatch):
    used = []
    write_weights = write.write_weights

    def note(job, *others):
        used.append(job.threads)
        return write_weights(job, *others)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(conversion, "write_weights", note)
    if launched is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", launched)
    convert(source, tmp_path / "nemo", workers=asked)
    assert used == [workers]


def test_a_tilde_is_the_home_directory(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(source, "~/nemo").target == tmp_path / "nemo"
    assert (tmp_path / "nemo/nemo.safetensors").is_file()
