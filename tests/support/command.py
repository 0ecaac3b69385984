"""The command in a process of its own."""

import os
import subprocess
import sys

COMMAND = (sys.executable, "-m", "gemma4_moe")


def run(*arguments, status=0, cwd=None, program=None, **environment):
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
