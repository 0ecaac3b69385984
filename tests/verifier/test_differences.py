import numpy as np
import pytest

from gemma4_moe.layout.dtypes import FLOAT16
from gemma4_moe.verifier import pieces
from gemma4_moe.verifier.differences import Difference, Mismatches
from gemma4_moe.verifier.distances import Distances
from support.verification import DOWNS, GATE_UP, GATE_UPS, both_layouts, checked, flip, sole

H, I = 10, 7  # noqa: E741


def test_the_first_of_several_is_the_first_in_the_targets_axes(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_TILE", 4)
    hf, nemo, _ = both_layouts()
    right = nemo[DOWNS]
    # In tiles of four, [4, 1, 9] is looked at after [4, 2, 0], and the other expert last.
    for index, bit in (((4, 2, 0), 2), ((4, 1, 9), 0), ((5, 0, 0), 6)):
        flat = (index[0] * I + index[1]) * H + index[2]
        nemo[DOWNS] = flip(nemo[DOWNS], flat, bit)
    found = sole(checked(tmp_path, hf, nemo))
    assert (found.count, found.index, found.ulps, found.max_ulps) == (3, (4, 1, 9), 1, 64)
    assert float(found.expected.split(" ")[0]) == pytest.approx(right[4, 1, 9].item(), rel=1e-8)


def test_pieces_may_come_in_any_order_and_from_several_gatherers():
    right = np.array([[0x3C00, 0x3C00, 0x3C00, 0x7E00]], np.uint16)
    whole, part, nothing = (Mismatches((3, 4), FLOAT16) for _ in range(3))
    whole.compare(right, right + np.array([[0, 0, 7, 1]], np.uint16), 8)
    whole.compare(right, right + np.array([[0, 2, 0, 0]], np.uint16), 4)
    part.compare(right, right + np.array([[0, 0, 0, 5]], np.uint16), 0)
    part.compare(right, right, 8)
    for gathered, first, count, ulps in ((whole, (1, 1), 3, 2), (part, (0, 3), 1, None)):
        (found,) = gathered.difference("x", Distances(FLOAT16))
        assert (found.index, found.count, found.ulps) == (first, count, ulps)
        assert found.max_ulps == (7 if gathered is whole else None)
    assert nothing.difference("x", Distances(FLOAT16)) == []
    part.add(whole)
    whole.add(nothing)
    nothing.add(whole)
    for gathered, first, count in ((part, (0, 3), 4), (whole, (1, 1), 3), (nothing, (1, 1), 3)):
        (found,) = gathered.difference("x", Distances(FLOAT16))
        assert (found.index, found.count, found.max_ulps) == (first, count, 7)
    late = Mismatches((3, 4), FLOAT16)
    late.compare(right, right + np.array([[9, 0, 0, 0]], np.uint16), 8)
    part.add(late)
    (found,) = part.difference("x", Distances(FLOAT16))
    assert (found.index, found.count, found.max_ulps) == ((0, 3), 5, 9)


def test_what_a_difference_says(tmp_path):
    hf, nemo, _ = both_layouts()
    nemo[GATE_UPS][0, 1, 2] = 1.0
    hf[GATE_UP][0, 2, 1] = 1.5
    one, two = hf[GATE_UP].transpose(1, 2).double(), nemo[GATE_UPS].double()
    cosine = f"{(one * two).sum().item() / (one.norm() * two.norm()).item():.9g}"
    assert str(sole(checked(tmp_path, hf, nemo))).splitlines() == [
        f"{GATE_UPS}: elements that differ: 1",
        "  first at [0, 1, 2]: expected 1.5 (0x3FC0), found 1 (0x3F80), distance in ulps: 64",
        "  largest distance in ulps: 64",
        "  largest difference: absolute 0.5, relative 0.333333333; cosine " + cosine,
    ]
    assert str(Difference("x", "missing", "BF16 [2]", None)) == "x: missing: expected BF16 [2]"
    assert str(Difference("x", "extra", None, "BF16 [2]")) == "x: extra: found BF16 [2]"
    folded = Difference("x", "fold", "nan (0x7FC0)", "1 (0x3F80)", 2000, (0, 1))
    assert str(folded).startswith("x, folded with its scale: elements that differ: 2,000\n")
    assert str(folded).endswith("expected nan (0x7FC0), found 1 (0x3F80)")
