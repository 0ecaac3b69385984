"""The conversion that `campaign.py` disturbs: all its writing in one thread, so that system calls can be counted."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from gemma4_moe import convert
from gemma4_moe.checkpoint.readers import allocate
from gemma4_moe.converter import blocks as block_module
from gemma4_moe.converter import write
from gemma4_moe.errors import Gemma4MoEError
from gemma4_moe.target import journal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gemma4_moe.converter.blocks import Block, Memory
    from gemma4_moe.converter.steps import ConversionSteps


def run_in_order(blocks: Iterable[Block], steps: ConversionSteps, memory: Memory) -> None:
    source, target = allocate(memory.buffer_bytes), allocate(memory.buffer_bytes)
    for block in blocks:
        facts = steps.compute(block, steps.read(block, source), target)
        steps.write(block, target, steps.digest(block, target, facts))


def terminated(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    source, target, shard_size, memory, block_bytes, flush_bytes, overwrite = sys.argv[1:]
    block_module.BLOCK_BYTES, journal.FLUSH_BYTES = int(block_bytes), int(flush_bytes)
    write.run = run_in_order
    signal.signal(signal.SIGTERM, terminated)
    try:
        convert(
            source,
            target,
            workers=1,
            max_shard_size=int(shard_size),
            max_memory=int(memory),
            overwrite=overwrite == "True",
        )
    except (Gemma4MoEError, KeyboardInterrupt) as error:
        return getattr(error, "exit_status", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
