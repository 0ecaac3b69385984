"""Kill, tear, stop or refuse a conversion at calls that change the disk: nothing is lost, nothing is half done.

Every nineteenth call in an ordinary run, each kind of fault beginning with another one; all of them with
GEMMA4_MOE_CRASH_STEP=1. The program `campaign.py` does the same from outside of the process, at system calls.
"""

import os
from functools import partial

import pytest

from crash.cases import Case
from crash.faults import Fault, convert_with
from gemma4_moe.converter import blocks
from gemma4_moe.target import journal

KINDS = ("kill", "tear", "ENOSPC", "EIO", "term")


@pytest.fixture(autouse=True)
def sizes_as_they_were(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", blocks.BLOCK_BYTES)
    monkeypatch.setattr(journal, "FLUSH_BYTES", journal.FLUSH_BYTES)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_calls_that_change_the_disk(kind, overwrite, tmp_path):
    case = Case(tmp_path / "work", overwrite=overwrite)
    calls = convert_with(case, Fault(-1, "none"))
    assert {"pwrite", "fsync", "mkdir", "unlink", "exchange" if overwrite else "rename"} <= set(calls)
    step = int(os.environ.get("GEMMA4_MOE_CRASH_STEP", "19"))
    for at in range(KINDS.index(kind) % step, len(calls), step):
        try:
            case.check(partial(convert_with, fault=Fault(at, kind)))
        except AssertionError as error:
            raise AssertionError(f"{kind} at call {at}, {calls[at]}: {error}") from error
