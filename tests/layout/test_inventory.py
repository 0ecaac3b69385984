"""A set of names and shapes: what is missing, doubled, or of another size."""

import itertools

import pytest

from gemma4_moe.errors import DuplicateTensorError, IncompleteExpertsError, TensorShapeError
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import DOWN, EXPERT_RULES, GATE_UP, RULES, SCALE, Layout

LAYER = "model.layers.0."
#: E 6, H 10, I 7.
SHAPES = {
    Layout.HF: {
        "experts.gate_up_proj": (6, 14, 10),
        "experts.down_proj": (6, 10, 7),
        "router.per_expert_scale": (6,),
        "router.proj.weight": (6, 10),
        "router.scale": (10,),
    },
    Layout.NEMO: {
        "moe.experts.gate_and_up_projs": (6, 10, 14),
        "moe.experts.down_projs": (6, 7, 10),
        "moe.gate.proj.weight": (6, 10),
        "moe.gate.scale": (10,),
    },
}
SIZES = {"E": 6, "H": 10, "I": 7}
ROWS = [(layout, rest) for layout in Layout for rest in SHAPES[layout]]


def filled(layout, sizes, shapes):
    inventory = Inventory(layout, sizes)
    for rest, shape in shapes.items():
        inventory.add(LAYER + rest, shape)
    return inventory


@pytest.mark.parametrize("layout", Layout)
def test_sizes_are_learned_in_any_order(layout):
    for order in itertools.permutations(SHAPES[layout].items()):
        inventory = filled(layout, None, dict(order))
        assert inventory.sizes("model.") == SIZES
        assert inventory.sizes("other.") == {}
        inventory.require_complete(EXPERT_RULES[layout])


def test_layers_and_spellings_are_kept():
    inventory = filled(Layout.HF, SIZES, {"moe.gate_up_proj": (6, 14, 10), "router.per_expert_scale": (6,)})
    assert inventory.layers == {
        ("model.", 0): {
            GATE_UP: {WHOLE: (LAYER + "moe.gate_up_proj", None)},
            SCALE: {WHOLE: (LAYER + "router.per_expert_scale", None)},
        }
    }
    assert inventory.add("model.norm.weight", (3, 4, 5)) is None


@pytest.mark.parametrize("sizes", [None, SIZES], ids=["learned", "given"])
@pytest.mark.parametrize(("layout", "rest"), ROWS, ids=str)
def test_every_wrong_size_of_every_axis_is_refused(layout, rest, sizes):
    shape = SHAPES[layout][rest]
    wrong = [
        *((*shape[:axis], size, *shape[axis + 1 :]) for axis in range(len(shape)) for size in (0, shape[axis] - 1, 99)),
        shape[:-1],
        (*shape, 1),
        (1, *shape),
        (),
        *([shape[::-1]] if len(shape) > 1 else []),
        *([(shape[0], shape[2], shape[1])] if len(shape) == 3 else []),
    ]
    others = {name: known for name, known in SHAPES[layout].items() if name != rest}
    for bad in wrong:
        inventory = filled(layout, sizes, others)
        with pytest.raises(TensorShapeError, match="wrong shape") as raised:
            inventory.add(LAYER + rest, bad)
        assert raised.value.facts["tensor"] == LAYER + rest
        assert raised.value.facts["found"] == str(list(bad))
        assert str(list(shape)) in raised.value.facts["expected"]


@pytest.mark.parametrize(("layout", "rest"), ROWS, ids=str)
def test_an_axis_of_nothing_is_refused_though_nothing_else_is_known(layout, rest):
    shape = SHAPES[layout][rest]
    odd = [(6, 15, 10)] if rest == "experts.gate_up_proj" else []  # half of it can't be gate
    for bad in [*odd, *((*shape[:axis], 0, *shape[axis + 1 :]) for axis in range(len(shape)))]:
        with pytest.raises(TensorShapeError, match="wrong shape"):
            Inventory(layout).add(LAYER + rest, bad)


def test_a_message_says_where_each_size_comes_from():
    inventory = filled(Layout.HF, {"E": 6}, {"experts.down_proj": (6, 10, 7)})
    with pytest.raises(TensorShapeError) as raised:
        inventory.add(LAYER + "experts.gate_up_proj", (6, 10, 14))
    assert raised.value.facts["expected"] == (
        "[E, 2I, H] = [6, 14, 10] (E = 6 from the config, H = 10 from model.layers.0.experts.down_proj, "
        "I = 7 from model.layers.0.experts.down_proj)"
    )


def test_sizes_are_learned_for_each_prefix_on_its_own():
    inventory = filled(Layout.NEMO, None, SHAPES[Layout.NEMO])
    inventory.add("tower.layers.0.moe.experts.down_projs", (3, 4, 5))
    assert inventory.sizes("tower.") == {"E": 3, "I": 4, "H": 5}
    with pytest.raises(TensorShapeError):
        inventory.add("model.layers.1.moe.experts.down_projs", (3, 4, 5))


@pytest.mark.parametrize("layout", Layout)
def test_given_sizes_hold_for_every_prefix_even_where_all_tensors_agree_on_others(layout):
    inventory = Inventory(layout, {"E": 8})
    for rest, shape in SHAPES[layout].items():
        if shape[0] == 6:
            with pytest.raises(TensorShapeError, match="wrong shape"):
                inventory.add("tower.layers.0." + rest, shape)


@pytest.mark.parametrize("layout", Layout)
def test_each_tensor_that_lacks_makes_the_layer_incomplete(layout):
    for missing in EXPERT_RULES[layout]:
        rest = missing.hf if layout is Layout.HF else missing.nemo
        shapes = {name: shape for name, shape in SHAPES[layout].items() if name != rest}
        inventory = filled(layout, None, shapes)
        with pytest.raises(IncompleteExpertsError, match="Incomplete expert weights for layer 0") as raised:
            inventory.require_complete(EXPERT_RULES[layout])
        assert raised.value.facts["tensor"] == LAYER + rest
        assert rest not in raised.value.facts["found"]
        assert set(raised.value.facts["found"].split(", ")) < set(shapes)


def test_a_router_may_be_required_too_and_a_layer_without_experts_is_complete():
    shapes = {name: shape for name, shape in SHAPES[Layout.HF].items() if name != "router.scale"}
    inventory = filled(Layout.HF, None, shapes)
    inventory.require_complete(EXPERT_RULES[Layout.HF])
    with pytest.raises(IncompleteExpertsError, match="router scale missing"):
        inventory.require_complete(RULES)
    filled(Layout.HF, None, {"router.scale": (10,), "mlp.down_proj.weight": (3, 2)}).require_complete((GATE_UP, DOWN))


def test_one_name_twice_is_refused():
    for name, shape in (("norm.weight", (3,)), (LAYER + "router.scale", (10,))):
        inventory = Inventory(Layout.HF)
        inventory.add(name, shape)
        with pytest.raises(DuplicateTensorError, match="one name") as raised:
            inventory.add(name, shape)
        assert raised.value.facts["tensor"] == name


def test_two_spellings_of_one_tensor_are_refused_whichever_comes_first():
    for first, second in itertools.permutations((LAYER + "experts.down_proj", LAYER + "moe.down_proj")):
        inventory = Inventory(Layout.HF)
        inventory.add(first, (6, 10, 7))
        with pytest.raises(DuplicateTensorError, match="two spellings") as raised:
            inventory.add(second, (6, 10, 7))
        assert (raised.value.facts["tensor"], raised.value.facts["found"]) == (second, f"also {first}")
