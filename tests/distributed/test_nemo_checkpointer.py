"""NeMo AutoModel's own Checkpointer with our adapter installed: load, save consolidated, reload, on every placement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from distributed import nemo_checks, nemo_ranks
from gemma4_moe.demo.small_models import build_model, logits, save_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOLERANCE = 5e-6
SIX = [("six-fp32", "float32"), ("six-bf16", "bfloat16"), ("six-bf16", "float32")]
FOUR = [("four-fp32", "float32")]
#: Ranks, parallelism, cases of a base checkpoint and a model's dtype.
PLACEMENTS: dict[str, tuple[int, dict[str, int], list[tuple[str, str]]]] = {
    "one process": (1, {}, SIX),
    "ep 2": (2, {"ep_size": 2}, SIX),
    "ep 2 x ep_shard 2": (4, {"ep_size": 2}, SIX[::2]),
    "FSDP 2": (2, {}, SIX),
    "FSDP 3, one rank empty": (3, {}, FOUR),
    "HSDP 2 x 2": (4, {"dp_replicate_size": 2}, SIX[:2]),
}


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., None]]:
    with nemo_ranks.starter() as run:
        yield run


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as transformers publishes them, of six experts in two dtypes, and of four."""
    directory = tmp_path_factory.mktemp("bases")
    for name, dtype in (("six-fp32", "float32"), ("six-bf16", "bfloat16")):
        save_model(build_model("multimodal", seed=1, dtype=dtype), directory / name)
    save_model(of_four_experts(build_model("multimodal", seed=2)), directory / "four-fp32")
    return {path.name: path for path in directory.iterdir()}


def of_four_experts(model: Any) -> Any:
    """The same model without its last experts."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.text_config.num_experts = 4
    smaller = type(model)(config).eval()
    state = {
        name: tensor[:4] if ".experts." in name or name.endswith(("per_expert_scale", "router.proj.weight")) else tensor
        for name, tensor in model.state_dict().items()
    }
    smaller.load_state_dict(state)
    return smaller


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_load_save_consolidated_and_reload(
    placement: str, run: Callable[..., None], bases: dict[str, Path], tmp_path: Path
) -> None:
    world, sizes, cases = PLACEMENTS[placement]
    run(world, nemo_checks.check_all, sizes, bases, tmp_path, cases)

    base, dtype = cases[0]
    source = load(bases[base])
    exported = load(tmp_path / f"{base}-{dtype}" / "model" / "consolidated")
    assert (logits(exported) - logits(source)).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("world", [1, 2])
def test_a_file_that_would_be_rounded_twice_is_refused(
    world: int, run: Callable[..., None], bases: dict[str, Path], tmp_path: Path
) -> None:
    run(world, nemo_checks.check_refusal, {}, bases["six-fp32"], tmp_path)


THEIRS = pytest.mark.xfail(strict=True, raises=AssertionError, reason="NeMo's own adapter takes a part for the whole")


@pytest.mark.parametrize("ours", [True, pytest.param(False, marks=THEIRS)], ids=["ours", "theirs"])
@pytest.mark.parametrize("part", [nemo_checks.check_load_alone, nemo_checks.check_save_alone], ids=["load", "save"])
def test_fsdp_on_two_ranks_with_our_adapter_and_with_theirs(
    part: Callable[..., None], ours: bool, run: Callable[..., None], bases: dict[str, Path], tmp_path: Path
) -> None:
    run(2, part, ours, bases["six-fp32"], tmp_path)


def load(directory: Path) -> Any:
    from transformers import Gemma4ForConditionalGeneration

    model, names = Gemma4ForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(names.values()), names
    return model
