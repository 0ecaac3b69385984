"""install, uninstall and the class that NeMo AutoModel gets: what it looks for, and what is put back."""

import dataclasses
import importlib
import inspect
import sys
import types
import warnings

import pytest

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.demo.small_models import build_model
from gemma4_moe.errors import UsageError
from gemma4_moe.integrations import nemo_automodel, nemo_contract
from support import peer

MODULES = ["models.gemma4_moe.model", "models.gemma4_moe.state_dict_adapter", "checkpoint.checkpointing"]
ADAPTER = "Gemma4MoEStateDictAdapter"
#: The names that may be replaced, and where they are.
NAMES = [(MODULES[0], ADAPTER), (MODULES[1], ADAPTER), ("Checkpointer", "_do_load")]


@pytest.fixture(autouse=True)
def nothing_installed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NeMo warns when it is first imported
        nemo_contract.find()
    yield
    nemo_automodel.uninstall()


def all_names():
    """Everything in the modules, and in the Checkpointer's class, that `install` touches."""
    modules = {module: importlib.import_module(f"nemo_automodel.components.{module}") for module in MODULES}
    checkpointer = modules["checkpoint.checkpointing"].Checkpointer
    return {name: dict(vars(module)) for name, module in modules.items()} | {"Checkpointer": dict(vars(checkpointer))}


def objects_under_the_names():
    everything = all_names()
    return [everything[place][name] for place, name in NAMES]


def test_it_replaces_three_names_and_puts_back_exactly_what_was_there_however_often_it_is_called():
    before, everything = objects_under_the_names(), all_names()
    nemo_automodel.uninstall()
    nemo_automodel.install()
    once = objects_under_the_names()
    assert all(now is not then for now, then in zip(once, before, strict=True))
    assert once[0] is once[1] is nemo_automodel.adapter_class()
    nemo_automodel.install()
    assert objects_under_the_names() == once
    for _ in range(2):
        nemo_automodel.uninstall()
        assert all(now is then for now, then in zip(objects_under_the_names(), before, strict=True))
        assert all_names() == everything


def test_with_blocks_nest_and_end_when_the_outermost_does_even_by_an_error():
    before = objects_under_the_names()

    def fail_inside():
        with nemo_automodel.installed():
            with nemo_automodel.installed():
                inside = objects_under_the_names()
            assert objects_under_the_names() == inside != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert objects_under_the_names() == before
    nemo_automodel.install()
    with nemo_automodel.installed():
        pass
    assert objects_under_the_names()[0] is nemo_automodel.adapter_class(), "it was installed before the block"


def test_the_class_is_theirs_by_every_isinstance_and_ours_in_every_method():
    from nemo_automodel.components.checkpoint.state_dict_adapter import StateDictAdapter
    from nemo_automodel.components.moe.state_dict_mixin import MoESplitExpertsStateDictMixin

    found = nemo_automodel.adapter_class()
    assert found is nemo_automodel.adapter_class()
    assert issubclass(found, Gemma4MoEStateDictAdapter)
    assert issubclass(found, StateDictAdapter)
    assert issubclass(found, MoESplitExpertsStateDictMixin)
    assert not inspect.isabstract(found)
    for name in ("from_hf", "to_hf", "convert_single_tensor_to_hf", "supports_low_memory_dcp_load"):
        assert inspect.getattr_static(found, name) is inspect.getattr_static(Gemma4MoEStateDictAdapter, name)


def test_nemo_rl_finds_our_class_by_the_ending_of_its_name():
    nemo_automodel.install()
    model = importlib.import_module("nemo_automodel.components.models.gemma4_moe.model").Gemma4ForConditionalGeneration
    beside = importlib.import_module(model.__module__.rpartition(".")[0] + ".state_dict_adapter")
    classes = inspect.getmembers(beside, inspect.isclass)
    first = next(found for name, found in classes if name.endswith("StateDictAdapter"))
    assert first is nemo_automodel.adapter_class()
    assert not getattr(first.convert_single_tensor_to_hf, "__isabstractmethod__", False)


def test_models_built_while_it_is_installed_have_our_adapter_and_keep_it_and_nemo_reads_its_attributes():
    config = build_model("multimodal").config
    with nemo_automodel.installed():
        model = peer.model(config)
    assert not isinstance(peer.model(config).state_dict_adapter, Gemma4MoEStateDictAdapter)
    adapter, state = model.state_dict_adapter, model.state_dict()
    assert type(adapter) is nemo_automodel.adapter_class()
    assert adapter.moe_config.n_routed_experts == 6
    assert adapter.supports_low_memory_dcp_load is adapter._supports_low_memory_dcp_load is True
    assert adapter.view_loaded_native_keys == set()  # from_hf returns every key, those loaded in place too
    aliases = adapter.checkpoint_key_aliases
    prefix = "model.language_model.layers.1."
    assert aliases[f"{prefix}experts.down_proj"] == f"{prefix}moe.down_proj"
    assert aliases[f"{prefix}router.per_expert_scale"] == f"{prefix}moe.per_expert_scale"
    assert not hasattr(adapter, "forced_hf_dtype_mapping")  # the export keeps the base checkpoint's dtypes
    assert not hasattr(adapter, "set_expert_storage_format")  # NeMo then refuses MXFP4 experts in its own words
    adapter._paramwrapper_layout_hint = None  # set around each from_hf
    names = adapter.get_hf_state_dict_keys(state | {"model.language_model.layers.0.mlp._extra_state": None})
    assert names == list(adapter.to_hf(state))


def test_without_nemo_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_automodel.components.checkpoint.checkpointing", None)
    with pytest.raises(UsageError, match="can't be imported") as refused:
        nemo_automodel.install()
    assert refused.value.hint == "pip install nemo-automodel==0.7.0"
    assert refused.value.facts["expected"] == "nemo_automodel.components.checkpoint.checkpointing"


def test_a_class_that_moved_is_named(monkeypatch):
    monkeypatch.delattr("nemo_automodel.components.moe.state_dict_mixin.MoESplitExpertsStateDictMixin")
    with pytest.raises(UsageError, match="not where") as refused:
        nemo_automodel.install()
    assert refused.value.facts["expected"].startswith("MoESplitExpertsStateDictMixin in nemo_automodel.components.moe")


def without(module, *names, **changed):
    return types.SimpleNamespace(**{k: v for k, v in vars(module).items() if k not in names} | changed)


class Elsewhere:
    """Has the methods that are looked for, and none does what is expected."""

    __abstractmethods__ = frozenset({"from_hf", "a_new_method"})

    def __init__(self, config, moe_config): ...

    def _do_load(self, state_dict, path): ...

    def load_model(self): ...


class Looking(Elsewhere):
    def load_model(self):
        self._do_load(1, 2)


def loading_as_nemo_does(nemo, base):
    return type("Checkpointer", (base,), {"_do_load": nemo.checkpointer._do_load})


CHANGES = {
    "has the adapter's class": lambda nemo: {"model": without(nemo.model, nemo_contract.ADAPTER)},
    "is made from config": lambda nemo: {
        "model": without(nemo.model, Gemma4MoEStateDictAdapter=Elsewhere),
        "adapter_module": without(nemo.adapter_module, Gemma4MoEStateDictAdapter=Elsewhere),
    },
    "looks Gemma4MoEStateDictAdapter up": lambda nemo: {
        "model": without(nemo.model, Gemma4ForConditionalGeneration=Elsewhere)
    },
    "is abstract that our adapter lacks": lambda _: {"interface": Elsewhere},
    "Mixin is a class": lambda nemo: {"mixin": nemo.mixin.__init__},
    "_do_load takes": lambda _: {"checkpointer": Elsewhere},
    "load_model reads with": lambda nemo: {"checkpointer": loading_as_nemo_does(nemo, Elsewhere)},
    "for_checkpoint_load": lambda nemo: {"checkpointer": loading_as_nemo_does(nemo, Looking)},
    "calls to_hf": lambda nemo: {"checkpointing": without(nemo.checkpointing, "_maybe_adapt_state_dict_to_hf")},
    "calls from_hf": lambda nemo: {
        "checkpointing": without(nemo.checkpointing, _maybe_adapt_state_dict_from_hf=lambda *_: None)
    },
    "_get_checkpoint_metadata": lambda nemo: {
        "checkpointing": without(nemo.checkpointing, _get_checkpoint_metadata=lambda _: None)
    },
    "_maybe_msc_reader": lambda nemo: {"checkpointing": without(nemo.checkpointing, "_maybe_msc_reader")},
}


@pytest.mark.parametrize("failing", CHANGES)
def test_each_expectation_is_checked_and_named(failing, monkeypatch):
    nemo, before = nemo_contract.find(), objects_under_the_names()
    expectations = [expected for expected, _ in nemo_contract._checks(nemo)]
    assert len(expectations) == len(CHANGES)
    assert failing in expectations[list(CHANGES).index(failing)]
    changed = dataclasses.replace(nemo, **CHANGES[failing](nemo))
    monkeypatch.setattr(nemo_contract, "find", lambda: changed)
    with pytest.raises(UsageError, match="nothing was installed") as refused:
        nemo_automodel.install()
    assert failing in refused.value.facts["expected"]
    assert objects_under_the_names() == before


def test_only_a_version_that_was_not_tested_is_used_with_a_warning(
    monkeypatch,
):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nemo_automodel.install()
    nemo_automodel.uninstall()
    nemo = dataclasses.replace(nemo_contract.find(), version="0.8.1")
    monkeypatch.setattr(nemo_contract, "find", lambda: nemo)
    with pytest.warns(UserWarning, match=r"tested with NeMo AutoModel 0\.7\.0, not with 0\.8\.1") as warned:
        nemo_automodel.install()
    assert all(failing in str(warned[0].message) for failing in CHANGES)
    assert objects_under_the_names()[0] is nemo_automodel.adapter_class()
