"""No wide instruction outside the functions that are chosen at run time, so that any x86-64 processor runs the rest."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CPP = Path(__file__).parents[2] / "cpp"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
OPTIONS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-Wno-psabi"]
#: Files whose functions name their own target.
WIDE = {"kernels_avx2.cpp", "kernels_avx512.cpp"}
#: The extension's binding is left out: it needs nanobind's headers, and holds no loop.
SOURCES = [path for path in sorted(CPP.glob("*.cpp")) if path.name != "module.cpp"]

FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:")
#: Instructions of AVX and later begin with a v; verr and verw are older.
WIDE_INSTRUCTION = re.compile(r"\s+[0-9a-f]+:\s+v(?!er[rw]\b)[a-z0-9]+")


def wide_functions(compiled: Path) -> set[str]:
    """Return the functions of an object file, by their linkers' names, that hold an instruction of AVX or later."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(compiled)]
    found, function = set(), ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if name := FUNCTION.fullmatch(line):
            function = name[1]
        elif WIDE_INSTRUCTION.match(line):
            found.add(function)
    return found


def visible_functions(compiled: Path) -> set[str]:
    """Return the functions that a linker may take for another file's: those that are not local to the file."""
    command = ["nm", "--extern-only", "--defined-only", "--format=just-symbols", str(compiled)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="is about x86-64 processors")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_wide_instructions_stay_in_functions_that_no_other_file_can_get(tmp_path: Path) -> None:
    def build(source: Path) -> Path:
        compiled = tmp_path / f"{source.stem}.o"
        subprocess.run([*COMPILER, *OPTIONS, "-c", str(source), "-o", str(compiled)], check=True)
        return compiled

    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip([source.name for source in SOURCES], pool.map(build, SOURCES), strict=True))
    wide = {name: wide_functions(compiled) for name, compiled in objects.items()}
    assert {name for name, functions in wide.items() if functions} == WIDE
    for name in WIDE:
        assert wide[name] & visible_functions(objects[name]) == set()
