"""The distance of tensors that differ, beside formulas of torch in fp64; per tensor, and folded over layers."""

import pytest
import torch

from gemma4_moe.verifier import pieces
from gemma4_moe.verifier.diff import diff
from gemma4_moe.verifier.differences import Difference, fold_differences
from gemma4_moe.verifier.distances import Distance
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict
from support.verification import DOWN, DOWNS, GATE_UPS, LAYER, SCALE, both_layouts, checked, sole

ROUTER = LAYER + "router.proj.weight"
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def formula(expected, found):
    """The measures of two tensors whose elements are all finite."""
    one, two = expected.double().flatten(), found.double().flatten()
    away = (two - one).abs()
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=0)
    return away.max().item(), (away / one.abs())[one != 0].max().item(), cosine.item()


def assert_close(found, expected, nan=0, infinite=0):
    assert (found.max_absolute, found.max_relative, found.cosine) == pytest.approx(expected, rel=1e-12)
    assert (found.nan, found.infinite) == (nan, infinite)


def noisy(tensor, seed=3):
    """The tensor with noise on the second half of its elements, so that its first ones are equal."""
    noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    noise.view(-1)[: tensor.numel() // 2] = 0
    return (tensor.float() + noise / 8).to(tensor.dtype)


@pytest.fixture(params=[False, True], ids=["whole", "in small pieces"])
def _pieces(request, monkeypatch):
    """Pieces of three elements and tiles of four, or whatever the verifier takes."""
    if request.param:
        for name, size in (("_PIECE", 3), ("_TILE", 4), ("_BLOCK_BYTES", 64)):
            monkeypatch.setattr(pieces, name, size)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_distance_is_that_of_the_whole_tensor(tmp_path, dtype):
    hf = random_hf_state_dict(dtype=dtype)
    other = hf | {ROUTER: noisy(hf[ROUTER])}
    a, b = write_checkpoint(tmp_path / "a", hf), write_checkpoint(tmp_path / "b", other)
    assert_close(sole(diff(a, b)).distance, formula(hf[ROUTER], other[ROUTER]))
    assert_close(sole(diff(b, a)).distance, formula(other[ROUTER], hf[ROUTER]))


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [DOWNS, GATE_UPS])
def test_a_target_is_measured_against_the_fold(tmp_path, name, dtype):
    hf, nemo, _ = both_layouts(dtype=dtype)
    right, nemo[name] = nemo[name], noisy(nemo[name])
    assert_close(sole(checked(tmp_path, hf, nemo)).distance, formula(right, nemo[name]))


@pytest.mark.usefixtures("_pieces")
def test_experts_are_measured_as_they_are_judged(tmp_path):
    hf, nemo, back = both_layouts(dtype=torch.float32)

    def judged(name, changes):
        (tmp_path / name).mkdir()
        return checked(tmp_path / name, nemo, back | changes, hf=hf)

    fold = {name: back[name].clone() for name in (DOWN, SCALE)}
    fold[SCALE][2:4] = torch.tensor([0.5, 0.25])
    fold[DOWN][2:4] *= torch.tensor([2.0, 4.0])[:, None, None]  # still folds to the source's bits
    assert judged("right", fold).different == ()
    wrong = fold | {DOWN: fold[DOWN].clone()}
    wrong[DOWN][3] = noisy(wrong[DOWN][3])
    found = sole(judged("fold", wrong))
    source = nemo[DOWNS].permute(0, 2, 1)
    assert found.kind == "fold"
    assert_close(found.distance, formula(source[2:4], (wrong[DOWN] * wrong[SCALE][:, None, None])[2:4]))
    wrong[DOWN][3], wrong[DOWN][4] = fold[DOWN][3], noisy(fold[DOWN][4])
    found = sole(judged("values", wrong))
    rest = [0, 1, 4, 5]
    assert found.kind == "values"
    assert_close(found.distance, formula(source[rest], wrong[DOWN][rest]))
    wrong = {DOWN: back[DOWN], SCALE: fold[SCALE]}
    found = sole(judged("scale", wrong))
    assert found.name == SCALE
    assert_close(found.distance, formula(back[SCALE], fold[SCALE]))


@pytest.mark.usefixtures("_pieces")
def test_what_is_not_finite_is_counted_and_not_measured(tmp_path):
    hf = random_hf_state_dict(dtype=torch.float32)
    one, two = hf[ROUTER].clone().view(-1), noisy(hf[ROUTER]).view(-1)
    nan, inf = torch.nan, torch.inf
    one[:7] = torch.tensor([nan, nan, 1.0, inf, inf, -inf, 0.0])
    two[:7] = torch.tensor([nan, 2.0, nan, inf, 3.0, inf, 4.0])
    sides = [hf | {ROUTER: side.view(hf[ROUTER].shape)} for side in (one, two)]
    found = sole(diff(*(write_checkpoint(tmp_path / "ab"[n], side) for n, side in enumerate(sides))))
    assert_close(found.distance, formula(one[6:], two[6:]), nan=3, infinite=3)
    assert found.distance.max_absolute == 4.0, "that of the element whose expected value is zero"
    assert str(found.distance).endswith("; 3 NaN; 3 infinite")
    assert "nan" not in str(found.distance)


def test_what_has_no_measure_has_none(tmp_path):
    hf = random_hf_state_dict()
    sides = {
        "zeros": (torch.zeros(3), torch.tensor([0.0, -0.0, 2.0])),
        "nothing finite": (torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, torch.inf])),
        "integers": (torch.tensor([1, 2]), torch.tensor([1, 3])),
        "opposite": (torch.tensor([3.0, -4.0]), torch.tensor([-3.0, 4.0])),
        "shape": (torch.ones(2), torch.ones(3)),
    }
    for side in range(2):
        write_checkpoint(tmp_path / "ab"[side], hf | {name: pair[side] for name, pair in sides.items()})
    found = {difference.name: difference.distance for difference in diff(tmp_path / "a", tmp_path / "b").different}
    assert found == {
        "zeros": Distance(2.0, None, None, 0, 0),
        "nothing finite": Distance(None, None, None, 1, 1),
        "integers": None,
        "opposite": Distance(8.0, 2.0, -1.0, 0, 0),
        "shape": None,
    }
    assert str(found["zeros"]) == "largest difference: absolute 2"
    assert str(found["nothing finite"]) == "1 NaN; 1 infinite"


def test_a_cosine_just_below_one_is_told_from_one():
    found = str(Distance(1e-7, 3e-8, 1 - 6e-8, 0, 0))
    assert found == "largest difference: absolute 1e-07, relative 3e-08; cosine 0.99999994"


def test_layers_are_folded_to_the_worst_of_them():
    def values_of(layer, count, ulps, *measures, name="experts.down_proj", kind="values"):
        return Difference(f"model.layers.{layer}.{name}", kind, "1", "2", count, (0,), ulps, ulps, Distance(*measures))

    differences = [
        values_of(0, 5, 7, 0.5, 0.25, 0.75, 1, 0),
        values_of(1, 6, None, 0.25, 0.75, 0.5, 2, 3),
        values_of(3, 7, 9, None, None, None, 4, 5),
        values_of(3, 2, 1, 8.0, 9.0, 0.125, 0, 0, kind="fold"),
        Difference("model.layers.2.layer_scalar", "missing", "BF16 [1]", None),
        Difference("config.json", "file", "20 bytes", None),
        values_of(1, 1, 1, 3.0, None, -0.5, 0, 0, name="router.scale"),
    ]
    assert [
        (row.name, row.kind, row.tensors, row.count, row.max_ulps, row.distance)
        for row in fold_differences(differences)
    ] == [
        ("model.layers.{0...1,3}.experts.down_proj", "values", 3, 18, 9, Distance(0.5, 0.75, 0.5, 7, 8)),
        ("model.layers.1.router.scale", "values", 1, 1, 1, Distance(3.0, None, -0.5, 0, 0)),
        ("model.layers.3.experts.down_proj", "fold", 1, 2, 1, Distance(8.0, 9.0, 0.125, 0, 0)),
        ("model.layers.2.layer_scalar", "missing", 1, None, None, None),
    ]
