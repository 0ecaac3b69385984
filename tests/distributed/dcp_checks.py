"""torch.distributed.checkpoint reads straight into a sharded model: native directories as they are, hf through us."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh

from distributed.placement_checks import CASES, same, shard
from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from pathlib import Path


def check_dcp(world: int, hf_directory: Path, nemo_directory: Path) -> None:
    hf = random_hf_state_dict()
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(6), None)
    for shape, placements, _ in CASES[world]:
        if any(type(p).__name__ == "_StridedShard" for p in placements):
            continue  # torch's own planner reads a strided shard as one box
        mesh = init_device_mesh("cpu", shape)
        expected = shard(nemo_from_hf(hf), mesh, placements)
        model = empty(expected)
        dcp.load(model, storage_reader=HuggingFaceStorageReader(str(nemo_directory)))
        same(model, expected)

        for dtype in (torch.bfloat16, torch.float32):  # a bf16 file into a bf16 and into an fp32 model
            expected = shard(nemo_from_hf(hf, dtype), mesh, placements)
            model = empty(expected)
            destinations = adapter.to_hf(model, for_checkpoint_load=True)
            dcp.load(destinations, storage_reader=HuggingFaceStorageReader(str(hf_directory)))
            same(adapter.from_hf(destinations), expected)
            same(model, expected)


def empty(state: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.full_like(tensor, 3.0) for name, tensor in state.items()}
