"""Disturb a conversion from outside, with strace: a fault at each system call that changes the disk.

    python tests/crash/campaign.py [--directory DIR] [--every 1]

SIGKILL and SIGTERM at every write, fsync, rename and the like; ENOSPC and EIO at every one that can answer so; into a
new directory and over an old checkpoint. After each, the checks of `cases.py`. Prints a table in Markdown, and ends
with 1 if any point failed. Needs strace 5.3 or later.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from crash.cases import Case

WRITES = ("pwrite64", "write", "sendfile", "copy_file_range", "fallocate", "ftruncate", "mkdir")
OTHERS = ("fsync", "rename", "renameat2", "unlink", "unlinkat", "rmdir")
FAULTS = {
    "SIGKILL": ("signal=SIGKILL", WRITES + OTHERS),
    "SIGTERM": ("signal=SIGTERM", WRITES + OTHERS),
    "ENOSPC": ("error=ENOSPC", WRITES),
    "EIO": ("error=EIO", WRITES + OTHERS),
}
ONE_THREAD = Path(__file__).with_name("one_thread.py")


def traced(case, *strace):
    """Run the conversion of a case under strace."""
    program = [sys.executable, ONE_THREAD, case.source, case.target, case.options["overwrite"]]
    command = ["strace", "--follow-forks", "--seccomp-bpf", "--quiet=all", *strace, *map(str, program)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def count_calls(case):
    """Return how often an undisturbed run makes each system call."""
    with tempfile.NamedTemporaryFile("r") as log:
        done = traced(case, "-e", f"trace={','.join(WRITES + OTHERS)}", "-o", log.name)
        assert done.returncode == 0, done.stderr
        return Counter(re.findall(r"^\d+ +(\w+)\(", log.read(), re.MULTILINE))


def disturb(case, call, fault, number):
    traced(case, "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}", "-o", os.devnull)


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    options.add_argument("--directory", type=Path, help="where to work; a temporary directory by default")
    options.add_argument("--every", type=int, default=1, help="only every so many calls")
    given = options.parse_args()
    start, points, failures = time.monotonic(), Counter[tuple[str, str]](), []
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        for overwrite in (False, True):
            case = Case(Path(name) / f"overwrite-{overwrite}", overwrite=overwrite)
            calls = count_calls(case)
            for kind, (fault, where) in FAULTS.items():
                for call in where:
                    for number in range(1, calls[call] + 1, given.every):
                        points[kind, call] += 1
                        try:
                            case.check(partial(disturb, call=call, fault=fault, number=number))
                        except Exception as error:  # noqa: BLE001 - every failure is counted and told
                            failures.append(f"{kind} at {call} {number}, overwrite={overwrite}: {error!r}")
                            print(failures[-1], flush=True)
                            case = Case(Path(name) / f"again-{len(failures)}", overwrite=overwrite)
    columns = [call for call in WRITES + OTHERS if any(points[kind, call] for kind in FAULTS)]
    print(f"| fault | {' | '.join(columns)} | points |")
    print(f"|---|{'---:|' * (len(columns) + 1)}")
    for kind in FAULTS:
        row = [points[kind, call] for call in columns]
        print(f"| {kind} | {' | '.join(str(count or '–') for count in row)} | {sum(row)} |")
    print(f"\n{sum(points.values())} points, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
