"""A checkpoint of layers of the real model's sizes, which the benchmarks of loading and converting share."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.layout.dtypes import BFLOAT16
from gemma4_moe.target.file_layout import layout_header

if TYPE_CHECKING:
    from pathlib import Path

E, H, I = 128, 2816, 704  # noqa: E741

#: The inner size of the dense MLP beside the experts.
MLP = 2112


def write_source(
    directory: Path, layers: int, sizes: tuple[int, int, int] = (E, H, I), *, sparse: bool = False
) -> None:
    """Write `layers` layers, bf16, by default of the real sizes.

    Values repeat after 16 MiB; those of experts are holes if `sparse`.
    """
    E, H, I = sizes  # noqa: E741
    rng = np.random.default_rng(0)
    tile = rng.standard_normal(2**23, np.float32).astype(BFLOAT16.numpy()).tobytes()
    directory.mkdir()
    text = {"model_type": "gemma4_text", "num_experts": E, "moe_intermediate_size": I, "hidden_size": H}
    config = {"model_type": "gemma4", "text_config": text | {"num_hidden_layers": layers}}
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for layer in range(layers):
        path = f"model.language_model.layers.{layer}."
        shapes = {
            "experts.gate_up_proj": (E, 2 * I, H),
            "experts.down_proj": (E, H, I),
            "router.per_expert_scale": (E,),
            "router.proj.weight": (E, H),
            "router.scale": (H,),
            "mlp.down_proj.weight": (H, MLP),
        }
        header, entries = layout_header([(path + name, BFLOAT16, shape) for name, shape in shapes.items()])
        name = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        with (directory / name).open("wb") as file:
            file.write(header)
            for entry in entries:
                weight_map[entry.name] = name
                left = 0 if sparse and "experts" in entry.name else entry.nbytes
                while left:
                    left -= file.write(tile[:left])
                file.truncate(len(header) + entry.end - entries[0].start)
                file.seek(0, os.SEEK_END)
            os.fsync(file.fileno())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
