"""What a power cut would leave: nothing is named, in a journal or by the rename, that is not on the device before."""

import json

import pytest

from gemma4_moe import convert
from gemma4_moe.target import journal
from support.order import Order

CONTROL = ".nemo.gemma4-moe"
OUT = f"{CONTROL}/out"

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("buffered", [False, True])
def test_a_conversion_syncs_what_it_is_about_to_name(buffered, source, tmp_path, monkeypatch):
    order = Order(tmp_path, monkeypatch)
    named = []
    append = journal.Journal.append

    def noted(self, **record):
        rows = record.get("pieces", [])
        named.append((len(order.calls), {file for file, *_ in rows}))
        append(self, **record)

    monkeypatch.setattr(journal.Journal, "append", noted)
    convert(source, tmp_path / "nemo", max_shard_size=60_000, max_memory=60_000, buffered=buffered)
    files = {path.name for path in (tmp_path / "nemo").iterdir()}
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) > 1
    assert len(files) == len(weights) + 3

    assert order.synced_holding(CONTROL, {"journal-00000"}) < order.calls.index(("fsync", f"{CONTROL}/journal-00000"))
    assert order.synced_holding(OUT, weights) < next(number for number, names in named if names)
    before = 0
    for number, names in named:
        synced = {call[1] for call in order.calls[before:number]}
        assert {f"{OUT}/{name}" for name in names} <= synced, "a piece is journalled that is not on the device"
        assert order.calls[number] == ("fsync", f"{CONTROL}/journal-00000")
        before = number
    assert sum(len(names) for _, names in named) > 5

    publishing = order.calls.index(("rename", OUT, "nemo"))
    assert order.synced_holding(OUT, files) < publishing
    for name in files:
        assert ("fsync", f"{OUT}/{name}") in order.calls[:publishing], name
    assert order.calls[publishing + 1] == ("fsync", ".")
    assert json.loads((tmp_path / "nemo/gemma4_moe.json").read_text())["files"].keys() == files - {"gemma4_moe.json"}
