"""The extension module as it was built: its stub, what it brings along, its instructions, and runs under sanitizers."""

from __future__ import annotations

import ast
import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import gemma4_moe.kernels
from gemma4_moe.kernels import _cpu

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
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
SANITIZERS = "address,undefined"


def test_the_stub_names_what_is_there():
    stub = Path(gemma4_moe.kernels.__file__).with_name("_cpu.pyi")
    functions = {node.name: node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert set(functions) == {name for name in vars(_cpu) if not name.startswith("__")}
    for name, function in functions.items():
        built = ast.parse(f"def {getattr(_cpu, name).__doc__.splitlines()[0]}: ...").body[0]
        assert isinstance(built, ast.FunctionDef)
        assert [each.arg for each in function.args.args] == [each.arg for each in built.args.args]


def test_no_openmp_beside_that_of_torch():
    binary = Path(_cpu.__file__).read_bytes()
    for trace in (b"libgomp", b"libomp", b"GOMP_", b"__kmpc_"):
        assert trace not in binary


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="the system has no large pages")
def test_new_results_may_come_in_large_pages():
    found = gemma4_moe.kernels.transpose_scale_cast(torch.ones(2, 2048, 4096))
    assert "hg" in flags_at(found.data_ptr() + found.nbytes // 2)


def flags_at(address: int) -> list[str]:
    """What the system says about the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and ":" not in name:
            begin, end = (int(bound, 16) for bound in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return rest
    raise AssertionError("no mapping holds the address")


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


def links(directory: Path, *options: str) -> bool:
    program = directory / "empty.cpp"
    program.write_text("int main() {}\n")
    command = [*COMPILER, *options, str(program), "-o", str(directory / "empty")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_no_access_outside_the_buffers_and_nothing_undefined(tmp_path):
    assert links(tmp_path), "no working C++ compiler"
    if not links(tmp_path, f"-fsanitize={SANITIZERS}"):
        pytest.skip(f"{COMPILER[0]} has no libraries for -fsanitize={SANITIZERS}")
    done = subprocess.run(
        ["sh", str(CPP / "tests" / "run.sh"), SANITIZERS], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("plain right")
