"""Layers of a Gemma 4 model on several ranks: their sizes, a checkpoint of random weights, and who holds what of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_dtensor

from gemma4_moe.distributed.placements import as_bytes, local_of
from gemma4_moe.layout.dtypes import BFLOAT16
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import RULES, SCALE, Layout
from gemma4_moe.target.file_layout import layout_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.distributed.tensor.placement_types import Placement

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """E experts, hidden size H, the experts' inner size I, and how many decoder layers."""

    E: int
    H: int
    I: int  # noqa: E741
    layers: int

    def shapes(self, layout: Layout) -> Shapes:
        """Return the shape of every tensor by its name in a layout; a dense MLP is 3 I wide, as in the real model."""
        axes = {"E": self.E, "H": self.H, "I": self.I, "2I": 2 * self.I}
        found: Shapes = {}
        for layer in range(self.layers):
            path = f"model.language_model.layers.{layer}."
            for rule in RULES:
                if rule.axes(layout):
                    name = rule.hf if layout is Layout.HF else rule.nemo
                    found[path + name] = tuple(axes[axis] for axis in rule.axes(layout))
            found |= {path + f"mlp.{name}_proj.weight": (3 * self.I, self.H) for name in ("gate", "up")}
            found[path + "mlp.down_proj.weight"] = (self.H, 3 * self.I)
            rows = {"q": 4096, "k": 2048, "v": 2048}
            found |= {path + f"self_attn.{name}_proj.weight": (size, self.H) for name, size in rows.items()}
            found[path + "self_attn.o_proj.weight"] = (self.H, rows["q"])
            found |= {path + "input_layernorm.weight": (self.H,), path + "layer_scalar": (1,)}
        return found


@dataclass(frozen=True)
class Case:
    """How the ranks share a model.

    Attributes:
        name: What the tables call it.
        mesh: NeMo's mesh, ("ep_shard", "ep"), also where one of them is 1.
        experts: The mesh of an expert tensor: without its dimensions of size one, as NeMo has it.
        placements: What each dimension of that does.
        everyone: All ranks in a row: the mesh of everything else, sharded by FSDP.
    """

    name: str
    mesh: DeviceMesh
    experts: DeviceMesh
    placements: tuple[Placement, ...]
    everyone: DeviceMesh

    @property
    def ep(self) -> int:
        """Over how many ranks whole experts are spread."""
        return self.mesh.size(1)

    @property
    def known_to_peer(self) -> bool:
        """Whether NeMo has such a mesh: it shards experts along an inner axis only beside ep."""
        return self.ep > 1 or self.mesh.size() == 1

    @property
    def peers_mesh(self) -> DeviceMesh | None:
        """The mesh that NeMo gives its adapter, None for a single rank."""
        return self.mesh if self.mesh.size() > 1 else None

    def of(self, name: str) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        """Return the mesh and the placements of a native tensor."""
        return (self.experts, self.placements) if ".moe.experts." in name else (self.everyone, (Shard(0),))

    def parts(self, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return this rank's parts of whole native tensors, cut by torch without communication."""
        return {
            name: local_of(distribute_tensor(tensor, *self.of(name), src_data_rank=None))
            for name, tensor in whole.items()
        }


def cases(device: torch.device) -> list[Case]:
    """Return ep = all ranks; and, for an even number of ranks, ep_shard 2 × ep half of them."""
    world = dist.get_world_size()
    everyone = init_device_mesh(device.type, (world,), mesh_dim_names=("dp_shard",))
    found = []
    for shards in (1, 2) if world % 2 == 0 else (1,):
        mesh = init_device_mesh(device.type, (shards, world // shards), mesh_dim_names=("ep_shard", "ep"))
        both = ((0, Shard(1)), (1, Shard(0)))
        placements = tuple(placement for dim, placement in both if shards > 1 or dim == 1)
        name = f"ep {world}" if shards == 1 else f"ep_shard 2 × ep {world // 2}"
        found.append(Case(name, mesh, mesh["ep"] if shards == 1 else mesh, placements, everyone))
    return found


def write_source(directory: Path, sizes: Sizes, device: torch.device) -> None:
    """Write a file for each layer; no tensor is like another, no scale is one."""
    random = torch.Generator(device).manual_seed(0)
    directory.mkdir()
    text = {"model_type": "gemma4_text", "num_experts": sizes.E, "moe_intermediate_size": sizes.I}
    text |= {"hidden_size": sizes.H, "num_hidden_layers": sizes.layers}
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": text}))
    shapes, weight_map = sizes.shapes(Layout.HF), {}
    for layer in range(sizes.layers):
        own = [(name, BFLOAT16, shape) for name, shape in shapes.items() if f".layers.{layer}." in name]
        header, entries = layout_header(own)
        file_name = f"model-{layer + 1:05}-of-{sizes.layers:05}.safetensors"
        with (directory / file_name).open("wb") as file:
            file.write(header)
            for entry in entries:
                weight_map[entry.name] = file_name
                tensor = torch.empty(entry.shape, dtype=torch.bfloat16, device=device)
                if entry.name.endswith(SCALE.hf):
                    tensor.uniform_(0.5, 1.5, generator=random)
                else:
                    tensor.normal_(generator=random)
                file.write(as_bytes(tensor.cpu()).numpy().data)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def unfilled(case: Case, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return native bf16 tensors, sharded, full of NaN: what is not loaded shows."""
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        mesh, placements = case.of(name)
        tensor = empty_dtensor(*shape, dtype=torch.bfloat16, device_mesh=mesh, placements=placements)
        tensor.to_local().fill_(float("nan"))
        state[name] = tensor
    return state


class CountedSlices:
    """The mixture-of-experts tensors of a checkpoint as lazy slices, and how many bytes are read through them.

    Args:
        directory: The checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.read_bytes = 0

    def items(self) -> Iterator[tuple[str, CountedSlice]]:
        """Yield hf names and lazy slices."""
        from safetensors import safe_open

        for path in sorted(self._directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    if lookup(name, Layout.HF) is not None:
                        yield name, CountedSlice(file.get_slice(name), self)


class CountedSlice:
    """One lazy slice."""

    def __init__(self, lazy: Any, counter: CountedSlices) -> None:
        self._lazy = lazy
        self._counter = counter
        self.get_shape = lazy.get_shape
        self.get_dtype = lazy.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self._lazy[index]
        self._counter.read_bytes += part.nbytes
        return part


class WholeWhenAsked(dict[str, torch.Tensor]):
    """A sharded state whose `items` are whole: torch gathers each when it is asked for, as NeMo-RL does."""

    def items(self) -> Any:
        """Yield names and whole tensors."""
        return ((name, whole_of(tensor)) for name, tensor in super().items())


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, gathered by torch where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
