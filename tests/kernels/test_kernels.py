"""The extension module as it was built: its stub, and what it must not bring along."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import gemma4_moe.kernels
from gemma4_moe.kernels import _cpu

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


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
