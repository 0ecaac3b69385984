"""docs/directories.md: each reader loads the layout that the page says, and treats the other as the page says.

NeMo AutoModel's row is in tests/distributed/test_nemo_checkpointer.py, vLLM's column of the hf layout in tests_vllm.
"""

import re
from pathlib import Path

import pytest
import torch

from gemma4_moe import convert, load_hf
from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.errors import UsageError
from support.command import run
from support.formulas import assert_same_tensors
from support.models import module_of, read_directory

PAGE = (Path(__file__).parents[2] / "docs/directories.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of transformers in both layouts."""
    place = tmp_path_factory.mktemp("place")
    save_model(build_model(seed=4), place / "hf")
    convert(place / "hf", place / "nemo")
    return place


def test_transformers_finds_no_weights_in_a_native_directory(place):
    from transformers import AutoModelForImageTextToText

    _, names = AutoModelForImageTextToText.from_pretrained(place / "hf", output_loading_info=True)
    assert not any(names.values())
    with pytest.raises(OSError, match="no file named"):
        AutoModelForImageTextToText.from_pretrained(place / "nemo")


def test_load_hf_refuses_the_nemo_layout_in_the_words_of_the_page(place):
    state = {name: torch.zeros_like(tensor) for name, tensor in read_directory(place / "nemo").items()}
    load_hf(state, place / "hf")
    assert_same_tensors(state, read_directory(place / "nemo"))
    (words,) = re.findall(r"`gemma4_moe.load_hf`.*\"(.*)\"", PAGE)
    with pytest.raises(UsageError, match=f"^{re.escape(words)}\n"):
        load_hf(state, place / "nemo")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_snippet_fills_a_native_model_from_the_nemo_layout(place):
    names = {}
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    exec(compile(snippet, "docs/directories.md", "exec"), names)
    expected = read_directory(place / "nemo")
    model = module_of({name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()})
    model.add_module("lm_head", torch.nn.Linear(2, 3, bias=False))
    names["load_native"](model, str(place / "nemo"))
    found = model.state_dict()
    del found["lm_head.weight"]
    assert_same_tensors(found, expected)


def test_the_commands_read_both_layouts(place):
    (row,) = (line for line in PAGE.splitlines() if line.startswith("| `gemma4-moe convert`"))
    commands = re.findall(r"`(?:gemma4-moe )?(\w+)`", row)
    assert commands == ["convert", "inspect", "plan", "verify", "diff"]
    for layout, other in (("hf", "nemo"), ("nemo", "hf")):
        directory, made = place / layout, place / f"{other}-of-{layout}"
        run("convert", directory, made)
        run("verify", directory, made)
        run("diff", directory, directory)
        assert f"layout   {layout} " in run("inspect", directory).stdout
        assert f": {layout} " in run("plan", directory).stdout
