"""Space for a target and for the Hub's cache, on one disk or on two."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.converter.preview import Space, measure_space
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict


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
def test_what_is_missing(space: Space, missing: int, without_cache: int) -> None:
    assert (space.missing_bytes, space.missing_without_cache) == (missing, without_cache)


@pytest.mark.parametrize(("device", "cache_free"), [(1, None), (2, 2000)])
def test_the_cache_s_disk_is_that_of_the_nearest_directory_there_is(
    device: int, cache_free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    cache, target = tmp_path / "caches", tmp_path / "targets"
    for directory in (cache, target):
        directory.mkdir()
    stat = Path.stat

    def stat_on_disks(path: Path, **options: bool) -> object:
        found = stat(path, **options)
        return (
            SimpleNamespace(st_dev=device) if path == cache else SimpleNamespace(st_dev=1) if path == target else found
        )

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "not/made/yet"))
    monkeypatch.setattr("gemma4_moe.converter.preview.bytes_to_fetch", lambda checkpoint: checkpoint.total_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2000 if path == cache else 3000))
    monkeypatch.setattr(Path, "stat", stat_on_disks)
    with open_checkpoint(source) as checkpoint:
        fetched = checkpoint.total_bytes
        assert measure_space([checkpoint], 500, target, stream=False) == Space(500, 3000, fetched, cache_free)
        assert measure_space([checkpoint], 500, target, stream=True) == Space(500, 3000)
