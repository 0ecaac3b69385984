"""Every quantised form is read at every entrance, with the values that its own library gives it."""

import json

import pytest
import torch

from distributed import io_checks
from gemma4_moe import Gemma4MoEStateDictAdapter, convert, diff, inspect, load_hf, plan, save_hf, verify
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.converter import blocks
from gemma4_moe.errors import InputError
from support import quantised, ranks
from support.checkpoints import config_of, contents, write_checkpoint
from support.formulas import assert_same_tensors
from support.models import read_directory
from support.quantised import FORMS, write


@pytest.fixture(params=FORMS, ids=" ".join)
def form(request):
    return request.param


def reference(directory, values):
    """A plain checkpoint of the values, and its nemo form as this package's bf16 path makes it."""
    return write_checkpoint(directory, values, config_of(quantised.plain()) | {"dtype": "bfloat16"}, files=3)


def test_it_is_converted_as_the_librarys_own_values_are_and_verified(form, tmp_path):
    values = write(tmp_path / "form", form)
    reference(tmp_path / "plain", values)
    done = convert(tmp_path / "form", tmp_path / "nemo", workers=1)
    convert(tmp_path / "plain", tmp_path / "expected", workers=1)
    assert_same_tensors(read_directory(tmp_path / "nemo"), read_directory(tmp_path / "expected"))
    assert any(f"weights are dequantised: {form[0]}" in note for note in done.notes)
    assert (tmp_path / "nemo/config.json").read_bytes() == (tmp_path / "plain/config.json").read_bytes()
    assert verify(tmp_path / "form", tmp_path / "nemo").different == ()
    assert verify(tmp_path / "nemo", tmp_path / "form").different == ()
    assert diff(tmp_path / "form", tmp_path / "plain").different == ()


def test_inspect_and_plan_read_it_and_find_nothing_wrong(form, tmp_path):
    write(tmp_path / "form", form)
    found = inspect(tmp_path / "form", values=True)
    assert (found.layout, found.problems) == ("hf", ())
    assert any(form[0] in note for note in found.notes)
    assert not any("_scale" in fold.name.rpartition(".")[2] for fold in found.folds if "router" not in fold.name)
    assert plan(tmp_path / "form").plan.spelling == found.spelling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_hf_fills_a_model(form, dtype, tmp_path):
    values = write(tmp_path / "form", form)
    reference(tmp_path / "plain", values)
    convert(tmp_path / "plain", tmp_path / "nemo", dtype=str(dtype).removeprefix("torch."))
    expected = read_directory(tmp_path / "nemo")
    model = {name: torch.full_like(tensor, 3) for name, tensor in expected.items()}
    load_hf(model, tmp_path / "form")
    assert_same_tensors(model, expected)


def test_ranks_load_their_own_part_of_it(form, tmp_path):
    values = write(tmp_path / "form", form)
    reference(tmp_path / "plain", values)
    ranks.run(2, io_checks.check_same_load, tmp_path / "form", tmp_path / "plain")


def test_it_is_a_base_whose_values_come_back(form, tmp_path):
    values = write(tmp_path / "form", form)
    reference(tmp_path / "plain", values)
    convert(tmp_path / "form", tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back", base=tmp_path / "form")
    convert(tmp_path / "nemo", tmp_path / "expected", base=tmp_path / "plain")
    assert_same_tensors(read_directory(tmp_path / "back"), read_directory(tmp_path / "expected"))


def test_blocks_of_any_size_and_a_second_run_give_the_same_bytes(form, tmp_path, monkeypatch):
    write(tmp_path / "form", form)
    convert(tmp_path / "form", tmp_path / "nemo")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    convert(tmp_path / "form", tmp_path / "small")
    weights = "nemo.safetensors"
    assert contents(tmp_path / "nemo")[weights] == contents(tmp_path / "small")[weights]
    before = contents(tmp_path / "small")
    convert(tmp_path / "form", tmp_path / "small", resume=True)
    assert contents(tmp_path / "small") == before


def test_verify_sees_one_wrong_element(form, tmp_path):
    values = write(tmp_path / "form", form)
    name = next(name for name in values if name.endswith(("experts.gate_up_proj", "experts.1.gate_proj.weight")))
    values[name] = values[name].contiguous()
    values[name].view(-1)[77] += 1
    reference(tmp_path / "wrong", values)
    convert(tmp_path / "wrong", tmp_path / "nemo")
    (difference,) = verify(tmp_path / "form", tmp_path / "nemo").different
    assert difference.count == 1
    (tmp_path / "nemo/config.json").write_bytes((tmp_path / "form/config.json").read_bytes())
    assert "config.json" in [each.name for each in verify(tmp_path / "form", tmp_path / "nemo").different]


def test_modelopts_own_file_is_read_where_config_json_says_nothing_and_is_not_copied(tmp_path):
    write(tmp_path / "form", ("ModelOpt FP8", "tensor"))
    config = json.loads((tmp_path / "form/config.json").read_text())
    said = config.pop("quantization_config")
    (tmp_path / "form/config.json").write_text(json.dumps(config))
    own = {"producer": {"name": "modelopt"}, "quantization": {"exclude_modules": said["ignore"], "quant_algo": "FP8"}}
    (tmp_path / "form/hf_quant_config.json").write_text(json.dumps(own))
    convert(tmp_path / "form", tmp_path / "nemo")
    assert "hf_quant_config.json" not in contents(tmp_path / "nemo")
    assert (tmp_path / "nemo/config.json").read_bytes() == (tmp_path / "form/config.json").read_bytes()
    assert verify(tmp_path / "form", tmp_path / "nemo").different == ()
    own["quantization"]["exclude_modules"].append("*experts.1.*")
    (tmp_path / "form/hf_quant_config.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match="whose layer the config leaves") as caught:
        plan(tmp_path / "form")
    assert "hf_quant_config.json" in str(caught.value)


def test_a_model_saved_beside_it_is_not_called_quantised(tmp_path):
    write(tmp_path / "form", ("compressed-tensors NVFP4", "single"))
    convert(tmp_path / "form", tmp_path / "nemo")
    native = {name: tensor.float() for name, tensor in read_directory(tmp_path / "nemo").items()}
    save_hf(native, tmp_path / "saved", config_from=tmp_path / "form", dtype="bfloat16")
    config = json.loads((tmp_path / "form/config.json").read_text())
    del config["quantization_config"]
    assert json.loads((tmp_path / "saved/config.json").read_text()) == config
    convert(tmp_path / "saved", tmp_path / "again")
    assert_same_tensors(read_directory(tmp_path / "again"), read_directory(tmp_path / "nemo"))


CT, TRANSFORMERS, MODELOPT = (
    ("compressed-tensors FP8", "channel"),
    ("FP8 in blocks", "fused"),
    ("ModelOpt FP8", "channel"),
)
NVFP4, MODELOPT_NVFP4 = ("compressed-tensors NVFP4", "single"), ("ModelOpt NVFP4", "single")
LAYER = "model.language_model.layers.1."
PACKED = f"{LAYER}experts.1.up_proj.weight_"
ONE = f"{LAYER}experts.1.up_proj.weight"
OTHER = f"{LAYER}experts.0.up_proj.weight"


def unquantise(stored, _):
    stored[ONE] = stored[ONE].bfloat16()
    del stored[f"{ONE}_scale"]


def two_conventions(stored, _):
    name = f"{LAYER}self_attn.q_proj.weight"
    stored[f"{name}_scale_inv"] = stored.pop(f"{name}_scale")


#: By what is wrong: the form, the change of its tensors and config, and the words of the refusal.
CONTRADICTIONS = {
    "a scale is missing": (CT, lambda s, _: s.pop(f"{ONE}_scale"), "without its scale"),
    "every scale is missing": (
        CT,
        lambda s, _: [s.pop(n) for n in list(s) if "weight_scale" in n],
        "without its scale",
    ),
    "a fused scale is missing": (
        TRANSFORMERS,
        lambda s, _: s.pop(f"{LAYER}experts.down_proj_scale_inv"),
        "without its scale",
    ),
    "the config leaves the layer": (CT, lambda _, c: c["ignore"].append("re:.*layers.1.*"), "the config leaves"),
    "the config leaves the expert": (CT, lambda _, c: c["ignore"].append(ONE[:-7]), "the config leaves"),
    "transformers' config leaves it": (
        TRANSFORMERS,
        lambda _, c: c["modules_to_not_convert"].append("q_proj"),
        "the config leaves",
    ),
    "ModelOpt's config leaves it": (MODELOPT, lambda _, c: c["ignore"].append("*self_attn*"), "the config leaves"),
    "one expert is not quantised": (CT, unquantise, "is not quantised, where the config leaves none"),
    "a scale of too few rows": (
        CT,
        lambda s, _: s.update({f"{ONE}_scale": s[f"{ONE}_scale"][1:].clone()}),
        "don't fit",
    ),
    "a scale of transposed blocks": (
        TRANSFORMERS,
        lambda s, _: s.update({n: t.transpose(-1, -2).clone() for n, t in s.items() if "experts.down_proj_scale" in n}),
        "don't fit",
    ),
    "blocks of another size": (TRANSFORMERS, lambda _, c: c.update(weight_block_size=[25, 12]), "don't fit"),
    "a scale in integers": (CT, lambda s, _: s.update({f"{ONE}_scale": s[f"{ONE}_scale"].int()}), "don't fit"),
    "a scale of a plain weight": (
        CT,
        lambda s, _: s.update({f"{LAYER}router.proj.weight_scale": torch.full((3, 1), 0.3)}),
        "a scale of no quantised weight",
    ),
    "a scale of nothing": (CT, lambda s, _: s.update({"model.a.weight_scale": torch.ones(2)}), "a scale of no"),
    "two scales of one weight": (
        CT,
        lambda s, _: s.update({f"{ONE}_scale_inv": s[f"{ONE}_scale"].clone()}),
        "second convention",
    ),
    "two conventions": (CT, two_conventions, "not those of the library that the config names"),
    "another library's config": (CT, lambda _, c: c.update(quant_method="fp8"), "the library that the config names"),
    "a library that is not read": (CT, lambda _, c: c.update(quant_method="fbgemm_fp8"), "that the config names"),
    "no library": (CT, lambda _, c: c.pop("quant_method"), "does not say which library"),
    "a pattern that is none": (CT, lambda _, c: c["ignore"].append("re:("), "no sensible value"),
    "a list that is none": (CT, lambda _, c: c.update(ignore="lm_head"), "no sensible value"),
    "a block of no rows": (TRANSFORMERS, lambda _, c: c.update(weight_block_size=[0, 12]), "no sensible value"),
    "inputs are scaled before": (
        MODELOPT,
        lambda s, _: s.update({f"{LAYER}self_attn.q_proj.pre_quant_scale": torch.ones(32)}),
        "a scale of no quantised weight",
    ),
    "no global scale": (NVFP4, lambda s, _: s.pop(f"{PACKED}global_scale"), "without its scale"),
    "no scales of groups": (NVFP4, lambda s, _: s.pop(f"{PACKED}scale"), "without its scale"),
    "the packed numbers are missing": (NVFP4, lambda s, _: s.pop(f"{PACKED}packed"), "a scale of no quantised weight"),
    "no second scale": (MODELOPT_NVFP4, lambda s, _: s.pop(f"{ONE}_scale_2"), "without its scale"),
    "no second scale of fused experts": (
        ("ModelOpt NVFP4", "fused"),
        lambda s, _: s.pop(f"{LAYER}experts.down_proj_weight_scale_2"),
        "without its scale",
    ),
    "a second scale a row": (
        MODELOPT_NVFP4,
        lambda s, _: s.update({f"{ONE}_scale_2": torch.full((48,), 0.3)}),
        "don't fit",
    ),
    "a second scale in bfloat16": (
        MODELOPT_NVFP4,
        lambda s, _: s.update({f"{ONE}_scale_2": torch.tensor(0.3).bfloat16()}),
        "don't fit",
    ),
    "scales of groups in fp32": (
        NVFP4,
        lambda s, _: s.update({f"{PACKED}scale": s[f"{PACKED}scale"].float()}),
        "don't fit",
    ),
    "scales of groups of 32": (
        MODELOPT_NVFP4,
        lambda s, _: s.update({f"{ONE}_scale": s[f"{ONE}_scale"][:, ::2].clone()}),
        "don't fit",
    ),
    "packed numbers and a plain weight": (
        NVFP4,
        lambda s, _: s.update({ONE: torch.zeros(48, 32).bfloat16()}),
        "two spellings of one tensor",
    ),
    "NVFP4 of two libraries": (
        MODELOPT_NVFP4,
        lambda s, _: s.update({f"{ONE}_packed": s.pop(ONE), f"{ONE}_global_scale": s.pop(f"{ONE}_scale_2")}),
        "not those of the library that the config names",
    ),
    "expert missing": (
        CT,
        lambda s, _: [s.pop(n) for n in (OTHER, f"{OTHER}_scale")],
        "Incomplete expert weights",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_by_name_before_anything_is_written(case, tmp_path):
    form, change, words = CONTRADICTIONS[case]
    write(tmp_path / "form", form, change=change)
    before = contents(tmp_path)
    for attempt in (convert, lambda source, _: plan(source), lambda source, _: load_hf({}, source)):
        with pytest.raises(InputError, match=words) as caught:
            attempt(tmp_path / "form", tmp_path / "nemo")
        assert caught.value.hint
        assert caught.value.facts.get("file") or "tensor" in caught.value.facts
    assert contents(tmp_path) == before


def test_a_state_dict_is_refused_with_the_command_that_reads_its_directory():
    stored, _, _ = FORMS[CT](quantised.plain())
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(quantised.E, quantised.H, quantised.I), None, torch.bfloat16)
    with pytest.raises(InputError, match="gemma4-moe convert"):
        adapter.from_hf(dict(reversed(stored.items())))
