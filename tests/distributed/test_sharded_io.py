"""`load_hf` and `save_hf` for every placement: the bytes don't tell how many ranks wrote."""

import re
import shutil
from functools import partial

import pytest
import torch

from distributed import io_checks, plain_pytorch
from gemma4_moe import load_hf, save_hf
from gemma4_moe.errors import (
    Gemma4MoEError,
    StorageError,
    TargetBusyError,
    TensorShapeError,
    UnknownTensorError,
    UsageError,
)
from gemma4_moe.target.directory import TargetFiles
from gemma4_moe.target.manifest import check_manifest
from gemma4_moe.target.transaction import Transaction
from support import ranks
from support.checkpoints import contents, flip_bit, write_checkpoint
from support.formulas import hf_from_nemo
from support.models import random_hf_state_dict, read_directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    state = random_hf_state_dict(E=io_checks.E, H=io_checks.H, I=io_checks.I, layers=2)
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", state)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_load(world, source):
    ranks.run(world, io_checks.check_load, world, source)


def test_save_gives_the_same_bytes_on_any_ranks(source, tmp_path):
    for world in (1, 2, 4):
        ranks.run(world, io_checks.check_save, world, source, tmp_path)
    ranks.run(2, io_checks.check_save_pipeline, source, tmp_path / "pipeline")
    ranks.run(4, io_checks.check_save_groups, source, tmp_path / "groups")
    ranks.run(2, io_checks.check_save_uneven, source, tmp_path / "uneven")
    expected = hf_from_nemo({name: tensor.bfloat16() for name, tensor in io_checks.native().items()})
    found = read_directory(tmp_path / "1-0")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    first = without_manifest(tmp_path / "1-0")
    assert "tokenizer.json" in first
    directories = sorted(tmp_path.iterdir())
    assert len(directories) == 2 + 3 + 6 + 3
    for directory in directories:
        assert without_manifest(directory) == first, directory
        assert check_manifest(directory).wrong == (), directory


def without_manifest(directory):
    """The content of each file, but of the manifest: its pieces tell how the ranks have cut the files."""
    found = contents(directory)
    del found["gemma4_moe.json"]
    return found


def test_a_check_against_the_manifest_finds_whatever_is_not_as_it_was_saved(source, tmp_path):
    save_hf(io_checks.native(), tmp_path / "hf", config_from=source, max_shard_size="12kB")
    found = check_manifest(tmp_path / "hf")
    assert found.wrong == ()
    names = {path.name for path in (tmp_path / "hf").iterdir()} - {"gemma4_moe.json"}
    assert found.files == len(names) > 4
    assert found.nbytes == sum((tmp_path / "hf" / name).stat().st_size for name in names)
    for name in names:
        flip_bit(tmp_path / "hf" / name, -1)
        assert [words.partition(" in ")[0] for words in check_manifest(tmp_path / "hf").wrong] == [
            f"{name}: other bytes"
        ]
        flip_bit(tmp_path / "hf" / name, -1)
    (tmp_path / "hf/stranger").write_text("x")
    (tmp_path / "hf/tokenizer.json").unlink()
    assert check_manifest(tmp_path / "hf").wrong == (
        "tokenizer.json: missing",
        "stranger: the manifest does not name it",
    )


def test_pipeline_stages_load_their_layers(source):
    ranks.run(2, io_checks.check_load_pipeline, source)


def test_a_disagreement_fails_on_all_ranks_and_leaves_nothing(source, tmp_path):
    ranks.run(2, io_checks.check_save_failures, source, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


FLIPPED = {
    "a header": ("model-00001-of-", 0),
    "the first tensor": ("model-00001-of-", 4096),
    "the last tensor": ("model-00002-of-", -1),
    "a side file": ("tokenizer.json", 1),
    "the index": ("model.safetensors.index.json", -2),
    "the manifest": ("gemma4_moe.json", -2),
}


@pytest.mark.parametrize("place", FLIPPED)
@pytest.mark.parametrize("read_back", [True, False])
def test_bytes_that_the_disk_changed_are_not_published(place, read_back, source, tmp_path, monkeypatch):
    name, position = FLIPPED[place]
    complete = TargetFiles.complete

    def flipping(files, *others):
        written = complete(files, *others)
        flip_bit(next(path for path in files.out.iterdir() if path.name.startswith(name)), position)
        return written

    monkeypatch.setattr(TargetFiles, "complete", flipping)
    save = partial(save_hf, io_checks.native(), tmp_path / "hf", config_from=source, max_shard_size="12kB")
    if read_back:
        with pytest.raises(StorageError, match="other bytes"):
            save()
        assert list(tmp_path.iterdir()) == []
    else:
        save(read_back=False)
        assert (tmp_path / "hf").is_dir()


def test_a_bit_that_flips_in_another_ranks_experts_stops_all(source, tmp_path):
    ranks.run(2, io_checks.check_save_read_back, source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("owner", "after", "confirmed"), [(TargetFiles, "complete", 0), (Transaction, "publish", 15 + 2)]
)
def test_a_long_save_gives_signs_of_life_and_stops_when_its_lock_is_broken(
    owner, after, confirmed, source, tmp_path, monkeypatch
):
    """At each of 15 tensors and 2 scales while it writes, then at every piece that it reads back."""
    calls = []

    def broken(self):
        calls.append(self.target)
        if len(calls) > confirmed + 2:
            raise TargetBusyError("another process has broken this lock", hint="let only one of them run")

    monkeypatch.setattr(Transaction, "confirm", broken)
    monkeypatch.setattr(owner, after, lambda *_, **__: pytest.fail(f"{after} was reached"))
    with pytest.raises(TargetBusyError):
        save_hf(io_checks.native(), tmp_path / "hf", config_from=source)
    assert not (tmp_path / "hf").exists()


def test_a_state_that_is_no_whole_model_is_not_saved(source, tmp_path):
    router = "model.language_model.layers.0.moe.gate.proj.weight"
    incomplete = {name: tensor for name, tensor in io_checks.native().items() if name != router}
    arrays = {name: tensor.numpy() for name, tensor in io_checks.native().items()}
    meta = {name: tensor.to("meta") for name, tensor in io_checks.native().items()}
    for state, words in (
        ({}, "no expert tensor"),
        (incomplete, "router.* missing"),
        (arrays, "no values"),
        (meta, "meta"),
    ):
        with pytest.raises(Gemma4MoEError, match=words):
            save_hf(state, tmp_path / "hf", config_from=source)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_storage_or_have_odd_strides_are_all_written(source, tmp_path):
    model = io_checks.native()
    scales = [name for name in model if name.endswith("moe.gate.scale")]
    shared = torch.rand(io_checks.H)
    model |= dict.fromkeys(scales, shared)
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in model.items()}
    save_hf(strided, tmp_path / "hf", config_from=source)
    again = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    load_hf(again, tmp_path / "hf")
    assert all(torch.equal(again[name], tensor) for name, tensor in model.items())


LAYER = "model.language_model.layers.1."
EMBEDDING = "model.language_model.embed_tokens.weight"
TURNS = [lambda tensor: tensor.double(), lambda tensor: tensor.int()]


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (UnknownTensorError, LAYER + "extra.weight", lambda _: torch.zeros(2)),
        (TensorShapeError, LAYER + "moe.gate.scale", lambda _: torch.zeros(8)),
        (UsageError, LAYER + "moe.gate.scale", lambda tensor: tensor.to("meta")),
        *((TensorShapeError, LAYER + "moe.experts.down_projs", turn) for turn in TURNS),
        *((TensorShapeError, EMBEDDING, turn) for turn in TURNS),
    ],
)
def test_a_tensor_that_the_checkpoint_can_not_fill_is_named_before_anything_is_filled(error, name, change, source):
    model = io_checks.native()
    model[name] = change(model.get(name))
    before = {key: tensor.clone() for key, tensor in model.items()}
    with pytest.raises(error, match=re.escape(name)):
        load_hf(model, source)
    assert all(tensor.is_meta or torch.equal(model[key], tensor) for key, tensor in before.items())


def test_a_plain_fsdp_program_saves_the_model_that_it_loaded(tmp_path):
    """Experts over ep, all parameters over FSDP: the same bytes on 1, 2 and 4 ranks, and the source's logits."""
    from transformers import Gemma4ForConditionalGeneration

    from gemma4_moe.demo.small_models import build_model, logits, save_model

    model = build_model("multimodal")
    save_model(model, tmp_path / "hf")
    for world, ep, dp in ((1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2)):
        ranks.run(world, plain_pytorch.run, tmp_path / "hf", tmp_path / f"{world}-{ep}", ep, dp)
        assert without_manifest(tmp_path / f"{world}-{ep}") == without_manifest(tmp_path / "1-1")
    result = Gemma4ForConditionalGeneration.from_pretrained(tmp_path / "4-2")
    assert (logits(result) - logits(model)).abs().max() < 5e-6


def test_a_tilde_is_the_home_directory_and_results_say_in_a_line_what_was_done(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = io_checks.native()
    shutil.copytree(source, tmp_path / "hf")
    saved = save_hf(model, "~/saved", config_from="~/hf")
    assert (tmp_path / "saved/model.safetensors").is_file()
    size = (tmp_path / "saved/model.safetensors").stat().st_size / 1000
    assert repr(saved).startswith(f"<Saved in {tmp_path}/saved: {len(model) + 2} tensors, 1 files, {size:.2f} kB; ")
    loaded = load_hf({name: tensor for name, tensor in model.items() if "layers.1." in name}, "~/saved")
    unexpected = len(loaded.unexpected_keys)
    words = rf"<Loaded {len(loaded.filled)} tensors, [\d.]+ kB; 0 missing, {unexpected} unexpected>"
    assert re.fullmatch(words, repr(loaded))
    assert loaded.filled
    assert loaded.unexpected_keys
