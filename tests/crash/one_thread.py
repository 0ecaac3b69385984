"""The conversion that `campaign.py` disturbs: all its writing in one thread, so that system calls can be counted."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from crash.sizes import OPTIONS, shrink
from gemma4_moe import convert
from gemma4_moe.checkpoint.readers import allocate
from gemma4_moe.converter import write
from gemma4_moe.errors import Gemma4MoEError


def run_in_order(blocks, steps, memory):
    source, target = allocate(memory.buffer_bytes), allocate(memory.buffer_bytes)
    for block in blocks:
        facts = steps.compute(block, steps.read(block, source), target)
        steps.write(block, target, steps.digest(block, target, facts))


def main():
    source, target, overwrite = sys.argv[1:]
    shrink()
    write.run = run_in_order
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        convert(source, target, overwrite=overwrite == "True", **OPTIONS)
    except (Gemma4MoEError, KeyboardInterrupt) as error:
        return getattr(error, "exit_status", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
