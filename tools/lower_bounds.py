"""Print the lower bound of each dependency in pyproject.toml as a constraint for pip, one on a line.

    python tools/lower_bounds.py [pyproject.toml]

`make test-oldest` installs these versions. A dependency without one bound, or two bounds for one name, is an error: a
version that no run can choose is not claimed.
"""

import re
import sys
import tomllib
from pathlib import Path

#: A requirement such as "triton>=3.6.0; sys_platform == 'linux'".
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?>=(?P<version>[\d.]+)\s*(;.*)?")

#: Its tools read the project and don't run it.
_LEFT_OUT = "lint"


def lower_bounds(project: dict) -> dict[str, str]:
    """Return each dependency's lower bound by its name.

    Raises:
        ValueError: A requirement is not a name with one lower bound, or two requirements disagree.
    """
    groups = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        *(group for name, group in project["dependency-groups"].items() if name != _LEFT_OUT),
    ]
    bounds: dict[str, str] = {}
    for requirement in (requirement for group in groups for requirement in group):
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} is not a name with one lower bound")
        if bounds.setdefault(match["name"], match["version"]) != match["version"]:
            raise ValueError(f"{match['name']} has two lower bounds: {bounds[match['name']]} and {match['version']}")
    return bounds


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "pyproject.toml")
    for name, version in sorted(lower_bounds(tomllib.loads(path.read_text())).items()):
        print(f"{name}=={version}")
