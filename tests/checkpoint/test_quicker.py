"""Two ways to read a file: each is tried by turns, and then the quicker one is kept, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from gemma4_moe import convert
from gemma4_moe.checkpoint import readers
from gemma4_moe.checkpoint.readers import QuickerReader
from support.checkpoints import contents, write_checkpoint
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Way:
    """A reader that takes some seconds for each byte and fills what it reads with its letter."""

    letter: bytes
    seconds: float
    clock: Clock
    closed: int = 0
    offsets: list[int] = field(default_factory=list)

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        self.clock.now += self.seconds * size
        self.offsets.append(offset)
        buffer[:size] = self.letter * size
        return buffer[:size]

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(("direct", "buffered", "kept"), [(1.0, 0.9, "b"), (0.9, 1.0, "d"), (1.0, 1.0, "d")])
def test_each_way_is_tried_twice_and_the_quicker_one_kept(
    direct: float, buffered: float, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "TRIAL_BYTES", 30)
    clock = Clock()
    ways = Way(b"d", direct, clock), Way(b"b", buffered, clock)
    reader = QuickerReader(*ways, clock)
    buffer = memoryview(bytearray(16))
    read = [bytes(reader.read(10 * n, 10, buffer)) for n in range(20)]
    assert b"".join(letters[:1] for letters in read).decode() == "dddbbbdddbbb" + 8 * kept
    assert all(letters == letters[:1] * 10 for letters in read)
    assert sorted(ways[0].offsets + ways[1].offsets) == [10 * n for n in range(20)]
    reader.close()
    assert (ways[0].closed, ways[1].closed) == (1, 1)


def test_it_does_not_matter_that_one_way_has_read_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "TRIAL_BYTES", 30)
    clock = Clock()
    reader = QuickerReader(Way(b"d", 1.0, clock), Way(b"b", 1.5, clock), clock)
    buffer = memoryview(bytearray(100))
    for size in (29, 70, 31, 40):  # ways d, d, b, b: 99 bytes in 99 seconds, then 71 in 106.5
        reader.read(0, size, buffer)
    assert bytes(reader.read(0, 1, buffer)) == b"d"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("trial", [1, 5_000])
def test_the_target_is_the_same_whichever_way_the_source_was_read(
    trial: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=2, E=6, H=40, I=24))
    convert(source, tmp_path / "buffered", buffered=True)
    monkeypatch.setattr(readers, "TRIAL_BYTES", trial)
    convert(source, tmp_path / "nemo", max_memory=60_000)
    assert contents(tmp_path / "nemo") == contents(tmp_path / "buffered")
