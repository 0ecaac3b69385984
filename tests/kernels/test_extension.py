"""The extension module: its stub, instructions and dependencies, runs under sanitizers, its threads, forks, the GIL."""

import ast
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma4_moe import kernels
from gemma4_moe.kernels import _cpu
from support.rounding import FP32, assert_same_bits, expected, random_codes

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
CPP = Path(__file__).parents[2] / "cpp"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
OPTIONS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-Wno-psabi"]
#: Files whose functions name their own target.
WIDE = {"kernels_avx2.cpp", "kernels_avx512.cpp", "product.cpp"}
#: The extension's binding is left out: it needs nanobind's headers, and holds no loop.
SOURCES = [path for path in sorted(CPP.glob("*.cpp")) if path.name != "module.cpp"]

FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:")
#: Instructions of AVX and later begin with a v; verr and verw are older.
WIDE_INSTRUCTION = re.compile(r"\s+[0-9a-f]+:\s+v(?!er[rw]\b)[a-z0-9]+")
SANITIZERS = "address,undefined"

X = random_codes(np.random.default_rng(8), (4, 300, 501), FP32)
FACTORS = np.array([1.37, 1.0, -0.3, 1e20], np.float32)
WANTED = np.ascontiguousarray(expected(X, FACTORS, FP32).swapaxes(1, 2))


def test_the_stub_names_what_is_there():
    stub = Path(kernels.__file__).with_name("_cpu.pyi")
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
    found = kernels.transpose_scale_cast(torch.ones(2, 2048, 4096))
    assert "hg" in flags_at(found.data_ptr() + found.nbytes // 2)


def flags_at(address):
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


def wide_functions(compiled):
    """Return the functions of an object file, by their linkers' names, that hold an instruction of AVX or later."""
    found, function = set(), ""
    for line in output("objdump", "--disassemble", "--no-show-raw-insn", compiled).splitlines():
        if name := FUNCTION.fullmatch(line):
            function = name[1]
        elif WIDE_INSTRUCTION.match(line):
            found.add(function)
    return found


def visible_functions(compiled):
    """Return the functions that a linker may take for another file's: those that are not local to the file."""
    return set(output("nm", "--extern-only", "--defined-only", "--format=just-symbols", compiled).split())


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="is about x86-64 processors")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_wide_instructions_stay_in_functions_that_no_other_file_can_get(tmp_path):
    def build(source):
        compiled = tmp_path / f"{source.stem}.o"
        subprocess.run([*COMPILER, *OPTIONS, "-c", str(source), "-o", str(compiled)], check=True)
        return compiled

    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip([source.name for source in SOURCES], pool.map(build, SOURCES), strict=True))
    wide = {name: wide_functions(compiled) for name, compiled in objects.items()}
    assert {name for name, functions in wide.items() if functions} == WIDE
    for name in WIDE:
        assert wide[name] & visible_functions(objects[name]) == set()


def links(directory, *options):
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


def convert(threads):
    return kernels.transpose_scale_cast(X, scale=FACTORS, threads=threads, kernel="cpu")


@pytest.mark.parametrize("threads", [0, 1, 2, 7, 64])
def test_any_number_of_threads(threads):
    assert_same_bits(convert(threads), WANTED)


def test_calls_from_several_threads_share_the_pool():
    with ThreadPoolExecutor(6) as callers:
        for found in callers.map(convert, [3] * 40):
            assert_same_bits(found, WANTED)


def child(connection):
    connection.send(bool((convert(3).view(np.uint32) == WANTED.view(np.uint32)).all()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads():
    convert(3)
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    assert receiver.poll(60), "the child hangs"
    assert receiver.recv()
    process.join()


def test_other_python_threads_run_meanwhile():
    x = np.zeros((8, 2000, 2000), np.float32)
    done = threading.Event()
    seen = 0

    def work():
        kernels.transpose_scale_cast(x, scale=np.full(8, np.nan, np.float32), threads=1, kernel="cpu")
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        seen += 1
        time.sleep(0.001)
    worker.join()
    assert seen > 3
