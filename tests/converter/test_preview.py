"""`plan`: the real model from headers alone, and the planner's own accounts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma4_moe import convert, plan
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.converter.space import Space, measure_space
from gemma4_moe.errors import UsageError
from gemma4_moe.layout.names import natural_key
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict


def test_the_real_model_has_the_published_counts_and_large_tensors_start_on_pages(real):
    preview = plan(real)
    assert (preview.source_tensors, preview.source_bytes) == (1013, 51_611_872_412)
    assert len(preview.plan.tensors) == 1013 - 30  # the scales are folded away
    entries = [entry for file in preview.plan.files for entry in file.entries]
    assert sum(entry.nbytes for entry in entries) == 51_611_872_412 - 30 * 128 * 2
    assert preview.memory.peak_bytes <= 2**30
    assert all(entry.start % 4096 == 0 for entry in entries if entry.nbytes >= 2**20)


def test_the_real_model_is_planned_by_the_command(real):
    command = [sys.executable, "-m", "gemma4_moe", "plan", "--format", "json", str(real)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert found["source"] | {"tensors": 1013, "bytes": 51_611_872_412} == found["source"]
    assert found["target"]["files"] == 11
    assert found["peak_memory_bytes"] <= 2**30


def test_the_plan_is_what_convert_does(tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    preview = plan(source, max_shard_size=2000)
    done = convert(source, tmp_path / "nemo", max_shard_size=2000)
    assert done.plan.files == preview.plan.files
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "nemo").glob("*.safetensors")}
    assert sizes == {file.name: file.size for file in preview.plan.files}
    assert sum(sizes.values()) == preview.plan.target_bytes


def test_free_space_is_that_of_the_disk_and_a_shortfall_is_told(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    preview = plan(source)
    assert preview.space.free_bytes == 1000
    side_files = sum((source / name).stat().st_size for name in preview.side_files)
    assert preview.space.missing_bytes == preview.plan.target_bytes + side_files - 1000


def test_work_that_an_unfinished_run_has_left_for_the_source_is_no_space_of_the_target(tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    before = plan(source).space.target_bytes
    (tmp_path / ".hf.gemma4-moe").mkdir()
    (tmp_path / ".hf.gemma4-moe/left").write_bytes(bytes(5000))
    assert plan(source).space.target_bytes == before


def test_a_budget_below_one_block_is_refused_with_what_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4_moe.converter.blocks.BLOCK_BYTES", 1)
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict(H=64, I=48))
    expert = 2 * 48 * 64 * 2 + 2 * 4096  # three whole pages, and the pages around them
    with pytest.raises(UsageError) as caught:
        plan(source, max_memory=2 * expert - 1)
    assert f"at least {2 * expert} bytes" in str(caught.value)
    assert plan(source, max_memory=2 * expert).memory.peak_bytes == 2 * expert


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "hf"}, "is in the hf layout already"),
        ({"to": "megatron"}, "no such layout"),
        ({"dtype": "int8"}, "no dtype"),
        ({"max_shard_size": "5 parsecs"}, "not a size"),
        ({"max_memory": 0}, "positive"),
    ],
)
def test_arguments_without_meaning_are_usage_errors(tmp_path, arguments, words):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    with pytest.raises(UsageError, match=words):
        plan(source, **arguments)


def test_names_sort_as_a_person_would():
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "layers", "1", "10", "2"]
    assert sorted(names, key=natural_key) == ["1", "2", "10", "layers", "layers.2.a", "layers.2.b", "layers.10.a"]


@pytest.mark.parametrize(
    ("space", "missing", "without_cache"),
    [
        (Space(100, 100), 0, 0),
        (Space(100, 93), 7, 7),
        (Space(100, 150, cache_bytes=50), 0, 0),
        (Space(100, 130, cache_bytes=50), 20, 0),
        (Space(100, 90, cache_bytes=50), 60, 10),
        (Space(100, 130, cache_bytes=50, cache_free_bytes=50), 0, 0),
        (Space(100, 130, cache_bytes=50, cache_free_bytes=46), 4, 0),
        (Space(100, 97, cache_bytes=50, cache_free_bytes=46), 7, 3),
        (Space(100, 97, cache_bytes=50, cache_free_bytes=1000), 3, 3),
        (Space(100, 1000, cache_bytes=50, cache_free_bytes=0), 50, 0),
    ],
)
def test_what_is_missing(space, missing, without_cache):
    assert (space.missing_bytes, space.missing_without_cache) == (missing, without_cache)


@pytest.mark.parametrize(("device", "cache_free"), [(1, None), (2, 2000)])
def test_the_cache_s_disk_is_that_of_the_nearest_directory_there_is(device, cache_free, tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    cache, target = tmp_path / "caches", tmp_path / "targets"
    cache.mkdir()
    target.mkdir()
    stat = Path.stat

    def stat_on_disks(path, **options):
        devices = {cache: device, target: 1}
        return SimpleNamespace(st_dev=devices[path]) if path in devices else stat(path, **options)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "not/made/yet"))
    monkeypatch.setattr("gemma4_moe.converter.space.bytes_to_fetch", lambda checkpoint: checkpoint.total_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2000 if path == cache else 3000))
    monkeypatch.setattr(Path, "stat", stat_on_disks)
    with open_checkpoint(source) as checkpoint:
        fetched = checkpoint.total_bytes
        assert measure_space([checkpoint], 500, target, stream=False) == Space(500, 3000, fetched, cache_free)
        assert measure_space([checkpoint], 500, target, stream=True) == Space(500, 3000)
