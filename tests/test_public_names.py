"""The public names: all there, and the same before and after every submodule has been imported."""

import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest

import gemma4_moe
from support.command import run

FUNCTIONS = ["convert", "convert_lora", "diff", "inspect", "load_hf", "merge", "plan", "publish", "save_hf", "verify"]
CLASSES = ["Gemma4MoEError", "Gemma4MoEStateDictAdapter", "WeightStream"]


def import_every_submodule():
    found = [module.name for module in pkgutil.walk_packages(gemma4_moe.__path__, "gemma4_moe.")]
    names = [name for name in found if not name.endswith(("__main__", "triton_kernel"))]
    for name in names:
        importlib.import_module(name)
    return names


def test_the_list_of_public_names_is_complete():
    assert sorted(gemma4_moe.__all__) == sorted([*FUNCTIONS, *CLASSES, "__version__"])


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_public_names_are_the_same_before_and_after_all_submodules_are_imported(name):
    first = getattr(gemma4_moe, name)
    assert isinstance(first, types.FunctionType if name in FUNCTIONS else type)
    assert f"gemma4_moe.{name}" not in import_every_submodule()
    assert getattr(gemma4_moe, name) is first
    assert first.__doc__


def test_a_fresh_process_takes_them_in_either_order():
    take = f"from gemma4_moe import {', '.join(FUNCTIONS)}"
    check = f"assert all(callable(f) for f in ({', '.join(FUNCTIONS)}))"
    load = "import gemma4_moe.converter.convert, gemma4_moe.verifier.verify, gemma4_moe.converter.inspect"
    for order in ([take, load], [load, take]):
        run(program="\n".join([*order, check, take, check]))


def test_every_name_is_imported_under_type_checking_from_where_it_is_found():
    source = Path(gemma4_moe.__file__).read_text()
    imported = dict(
        reversed(pair) for pair in re.findall(r"from gemma4_moe\.([\w.]+) import (\w+) as \2$", source, re.M)
    )
    assert imported == gemma4_moe._HOME


@pytest.mark.parametrize(
    "path", ["adapter.BackendConfig", "adapter.MoEConfig", "adapter.StateDictAdapter", "layout.Layout"]
)
def test_a_name_of_a_package_is_imported_from_it_and_not_from_the_top(path):
    package, name = path.split(".")
    module = importlib.import_module(f"gemma4_moe.{package}")
    assert isinstance(getattr(module, name), type)
    assert name in module.__all__
    assert not hasattr(gemma4_moe, name)


def test_an_adapter_needs_no_argument():
    adapter = gemma4_moe.Gemma4MoEStateDictAdapter()
    assert (adapter.config, adapter.moe_config, adapter.backend) == (None, None, None)


def test_names_are_listed_and_unknown_ones_refused():
    assert set(gemma4_moe.__all__) <= set(dir(gemma4_moe))
    with pytest.raises(AttributeError, match="no attribute 'converting'"):
        gemma4_moe.converting  # noqa: B018
    with pytest.raises(ImportError):
        from gemma4_moe import planning  # noqa: F401


def test_the_version_is_the_distributions():
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{gemma4_moe.__version__}"\n' in pyproject
