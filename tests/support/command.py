"""The command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = (sys.executable, "-m", "gemma4_moe")


def run(
    *arguments: object, status: int = 0, cwd: Path | None = None, program: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command, or a `program` that calls it, and require an exit status."""
    command = COMMAND if program is None else (sys.executable, "-c", program)
    done = subprocess.run(
        (*command, *map(str, arguments)),
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done
