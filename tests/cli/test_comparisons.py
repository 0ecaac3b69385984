"""What `verify` and `diff` print: counts that add up, and differences folded over layers, as text and as JSON."""

import json

import pytest
import torch

from gemma4_moe import convert
from support.checkpoints import write_checkpoint
from support.command import run
from support.models import random_hf_state_dict

DOWN = "model.language_model.layers.{}.experts.down_proj"


def asked(*arguments, status):
    return json.loads(run(*arguments, "--format", "json", status=status).stdout)


def test_equal_and_different_tensors_make_all_and_files_are_counted_by_themselves(source, tmp_path):
    """Every tensor wrong, one of them in dtype and in shape, one missing, one extra; and one file of two."""
    state = random_hf_state_dict(layers=2, E=6, H=40, I=24, seed=1)
    scalar = DOWN.format(0).replace("experts.down_proj", "layer_scalar")
    del state[scalar]
    state["extra"] = torch.ones(2)
    state["model.language_model.embed_tokens.weight"] = torch.ones(3, 2)
    target = write_checkpoint(tmp_path / "other", state)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    (target / "tokenizer.json").unlink()
    found = asked("verify", source, target, status=4)
    assert (found["tensors"], found["equal"], found["different"]) == (18, 0, 18)
    assert len([each for each in found["differences"] if each["kind"] != "file"]) == 19
    assert found["files"] == {"compared": 2, "equal": 1, "different": 1}
    said = run("verify", source, target, status=4).stdout.splitlines()
    assert said[:2] == ["18 tensors: 0 equal, 18 different", "2 files: 1 equal, 1 different"]
    found = asked("diff", source, target, status=4)
    assert (found["tensors"], found["equal"], found["different"]) == (18, 0, 18)
    assert found["files"] == {"compared": 0, "equal": 0, "different": 0}


def test_a_side_file_alone_makes_no_tensor_different(source, tmp_path):
    convert(source, tmp_path / "nemo")
    (tmp_path / "nemo/tokenizer.json").write_text("{}")
    done = run("verify", source, tmp_path / "nemo", status=4)
    assert done.stdout.splitlines()[:2] == ["15 tensors: 15 equal, 0 different", "2 files: 1 equal, 1 different"]
    assert "max" not in done.stdout, "files have no table"


@pytest.fixture
def damaged(tmp_path):
    """Two checkpoints: the experts of both layers differ, one with a NaN, and the scale of layer 1 lacks."""
    state = random_hf_state_dict(layers=2, E=6, H=40, I=24, dtype=torch.float32)
    other = {name: tensor.clone() for name, tensor in state.items()}
    other[DOWN.format(0)][2, 3, 4] += 0.5
    other[DOWN.format(1)][1, 0, 0] -= 0.25
    other[DOWN.format(1)][5, 6, 7] = torch.nan
    del other["model.language_model.layers.1.router.scale"]
    write_checkpoint(tmp_path / "a", state)
    write_checkpoint(tmp_path / "b", other)
    return tmp_path, state, other


def test_a_distance_is_given_for_each_tensor_and_folded_over_layers(damaged):
    place, state, other = damaged
    found = asked("diff", place / "a", place / "b", status=4)
    measures = []
    for layer in (0, 1):
        one, two = (side[DOWN.format(layer)].double().flatten() for side in (state, other))
        finite = ~two.isnan()
        away = (two - one)[finite].abs()
        cosine = torch.nn.functional.cosine_similarity(one[finite], two[finite], dim=0).item()
        measures.append((away.max().item(), (away / one[finite].abs()).max().item(), cosine))
    each = {difference["name"]: difference["distance"] for difference in found["differences"]}
    for layer, expected in enumerate(measures):
        distance = each[DOWN.format(layer)]
        assert (distance["max_absolute"], distance["max_relative"], distance["cosine"]) == pytest.approx(expected)
        assert (distance["nan"], distance["infinite"]) == (layer, 0)
    missing, experts = found["folds"]
    assert missing == {
        "name": "model.language_model.layers.1.router.scale",
        "kind": "missing",
        "tensors": 1,
        "count": None,
        "max_ulps": None,
        "distance": None,
    }
    assert (experts["name"], experts["kind"]) == (DOWN.format("{0...1}"), "values")
    assert (experts["tensors"], experts["count"]) == (2, 3)
    absolute, relative, cosines = zip(*measures, strict=True)
    worst = experts["distance"]
    assert (worst["max_absolute"], worst["max_relative"]) == pytest.approx((max(absolute), max(relative)))
    assert (worst["cosine"], worst["nan"], worst["infinite"]) == (pytest.approx(min(cosines)), 1, 0)


def test_the_text_has_a_line_for_each_fold_and_each_tensor(damaged):
    place, *_ = damaged
    lines = run("diff", place / "a", place / "b", status=4).stdout.splitlines()
    heading = lines[1].split()
    assert heading[:3] == ["differs", "in", "tensor"]
    assert lines[2].split() == ["missing", "model.language_model.layers.1.router.scale", "1"]
    row = lines[3].split()
    assert row[:4] == ["values", DOWN.format("{0...1}"), "2", "3"]
    assert float(row[5]) == pytest.approx(0.5)
    assert float(row[7]) < 1
    assert row[8:] == ["1", "0"]
    assert f"{DOWN.format(1)}: elements that differ: 2" in lines
    assert lines[-1].startswith("  largest difference: absolute 0.25")
    assert lines[-1].endswith("; 1 NaN")


def test_differences_that_are_not_shown_are_counted(tmp_path):
    sides = [random_hf_state_dict(layers=4, seed=seed) for seed in (0, 1)]
    a, b = (write_checkpoint(tmp_path / "ab"[n], side) for n, side in enumerate(sides))
    count = len(asked("diff", a, b, status=4)["differences"])
    assert count > 20
    last = run("diff", a, b, status=4).stdout.splitlines()[-1]
    assert last == f"and {count - 20} more differences, which --format json lists"
