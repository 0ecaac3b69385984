"""Single modules of released SGLang and verl, loaded without the packages' dependencies.

Stubbed are the packages' own `__init__` files, which import FlashInfer, Ray and tensordict, and verl's devices, because
its releases know no CPU. All else is the released code.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

#: `make install` puts both here: verl's wheel has a package named tests, which would hide ours from other processes.
INSTALLED = Path(sys.prefix) / "engines"


def sglang_buckets(monkeypatch):
    """SGLang's module of flattened buckets."""
    _bare_packages(monkeypatch, "sglang", "srt", "weight_sync")
    return _loaded(monkeypatch, "sglang.srt.weight_sync.tensor_bucket")


def verl_bucketed_transfer(monkeypatch):
    """verl's sender and receiver of buckets, of its vLLM rollout, with a CPU as its device."""
    _bare_packages(monkeypatch, "verl", "workers", "rollout", "vllm_rollout")
    cpu = SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None, ipc_collect=lambda: None)
    devices = ModuleType("verl.utils.device")
    devices.get_device_id, devices.get_device_name = lambda: 0, lambda: "cpu"
    devices.get_torch_device, devices.is_support_ipc = lambda: cpu, lambda: False
    monkeypatch.setitem(sys.modules, "verl.utils", ModuleType("verl.utils"))
    monkeypatch.setitem(sys.modules, "verl.utils.device", devices)
    _stub_iterators(monkeypatch)
    return _loaded(monkeypatch, "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")


def _stub_iterators(monkeypatch):
    """Give verl's `ensure_async_iterator`, whose own module imports its web server."""

    async def ensure_async_iterator(iterable):
        for item in iterable:
            yield item

    utilities = ModuleType("verl.workers.rollout.utils")
    utilities.ensure_async_iterator = ensure_async_iterator
    monkeypatch.setitem(sys.modules, utilities.__name__, utilities)


def _bare_packages(monkeypatch, top, *below):
    """Put packages without their `__init__` in place."""
    assert (INSTALLED / top).is_dir(), f"{top} is not installed: run make install"
    for depth in range(len(below) + 1):
        package = ModuleType(".".join([top, *below[:depth]]))
        package.__path__ = [str(INSTALLED.joinpath(top, *below[:depth]))]
        monkeypatch.setitem(sys.modules, package.__name__, package)


def _loaded(monkeypatch, name):
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module
