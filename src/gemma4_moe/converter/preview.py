"""The preview of a conversion: its plan, its memory, its space, and the share of each rank of a mesh."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.storage import resolved
from gemma4_moe.converter.blocks import DEFAULT_MEMORY, LOAD_BLOCKS, Memory, load_block_bytes, plan_memory, row_bytes
from gemma4_moe.converter.notes import plan_notes
from gemma4_moe.converter.request import Request
from gemma4_moe.converter.sources import open_sources
from gemma4_moe.converter.space import Space, space_for
from gemma4_moe.distributed.sharding import NAMED_DIMENSIONS, count, local_runs
from gemma4_moe.errors import UsageError
from gemma4_moe.hub.source import is_hub_id
from gemma4_moe.layout.table import Layout, transposes
from gemma4_moe.sizes import format_size, parse_size
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma4_moe.converter.plan import Plan, PlannedTensor

#: More ranks than any such run has; a mistyped mesh should not take minutes.
MOST_RANKS = 2**16


@dataclass(frozen=True, slots=True, repr=False)
class Preview:
    """The result of `plan`.

    Attributes:
        source: The directory, or the Hub id.
        plan: The plan.
        memory: The buffers that `convert` would use.
        source_tensors: Number of tensors of the source.
        source_bytes: Their size.
        space: The space that is needed, and the space that is free.
        side_files: Names of the files that would be copied.
        skipped: Names in the source directory that would not.
        notes: Notes on the values: casts that round, and tensors that are not cast.
        mesh: The share of each rank of the mesh, or None if no mesh was given.
    """

    source: Path
    plan: Plan
    memory: Memory
    source_tensors: int
    source_bytes: int
    space: Space
    side_files: tuple[str, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    mesh: Prediction | None = None

    def __repr__(self) -> str:
        plan = self.plan
        source = f"{self.source}: {plan.source_layout} ({plan.spelling}), {self.source_tensors:,} tensors"
        target = f"{plan.target_layout}, {len(plan.tensors):,} tensors, {len(plan.files)} files"
        return f"<Preview of {source} → {target}, {format_size(plan.target_bytes)}>"


def plan(
    source: str | Path,
    target: str | Path | None = None,
    *,
    to: Layout | str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    max_memory: int | str = DEFAULT_MEMORY,
    revision: str | None = None,
    stream: bool = False,
    base: str | Path | None = None,
    strip_wrappers: bool = False,
    scale: str | None = None,
    scale_from: str | Path | None = None,
    config_from: str | Path | None = None,
    adapter: str | Path | None = None,
    mesh: Mapping[str, int] | str | None = None,
) -> Preview:
    """Return what `convert` would do, from headers alone: of a model on the Hub, no weights are fetched.

    Args:
        source: A directory, or a Hub id.
        target: The directory that would be made; by default one beside the source, or for a Hub id one in the working
            directory. Only its disk's free space is read.
        to: See `convert`.
        dtype: See `convert`.
        max_shard_size: See `convert`.
        max_memory: See `convert`.
        revision: Branch, tag or commit of a Hub id.
        stream: See `convert`; no space is then needed for a model in the Hub's cache.
        base: See `convert`.
        strip_wrappers: See `convert`.
        scale: See `convert`.
        scale_from: See `convert`.
        config_from: See `convert`.
        adapter: The directory of an adapter: return what `merge` would do.
        mesh: Ranks by dimension, or text such as "ep_shard=2,ep=8": also preview the share of each of these ranks, if
            they load the source into the nemo layout.

    Raises:
        InputError, UsageError, StorageError: What `convert` would raise before it writes.
        UsageError: NeMo AutoModel would not train on the mesh.
    """
    arguments = {name: value for name, value in locals().items() if name != "mesh"}
    request, ranks = Request(**arguments), None if mesh is None else parse_mesh(mesh)
    beside = resolved(Path() if is_hub_id(source) else expanded(source))
    made = None if target is None else expanded(target)
    disk = beside if made is None else resolved(made).parent
    with ExitStack() as stack:
        sources = open_sources(stack, request, in_place=False)
        checkpoint, planned = sources.checkpoint, sources.plan(request)
        return Preview(
            source=Path(source),
            plan=planned,
            memory=plan_memory(planned, parse_size(max_memory)),
            source_tensors=len(checkpoint.tensors),
            source_bytes=checkpoint.total_bytes,
            space=space_for(planned, sources.opened, made, disk, stream=stream),
            side_files=tuple(file.name for file in checkpoint.side_files),
            skipped=checkpoint.skipped,
            notes=plan_notes(planned, checkpoint),
            mesh=None if ranks is None else predict(planned, check_trainable(planned, ranks)),
        )


class Share(NamedTuple):
    """The share of the rank at `coordinate` of the mesh.

    Attributes:
        expert_bytes: Bytes of expert tensors that it holds.
        experts: Experts of a layer of which it holds at least a part.
        read_bytes: Bytes of the source's expert tensors and scales that it reads: its experts whole, since `ep_shard`
            cuts the innermost axis of the file.
    """

    coordinate: tuple[int, ...]
    expert_bytes: int
    experts: int
    read_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class Prediction:
    """The shares of all ranks of a mesh that loads a plan's source.

    Attributes:
        mesh: Ranks along each dimension, by name.
        shares: One for each rank, in the order of ranks.
        other_bytes: Bytes of all tensors that are not experts; a rank that shards them too holds less.
        staging_bytes: Bytes that a load needs besides the model: `LOAD_BLOCKS` blocks, each of one row at least.
    """

    mesh: Mapping[str, int]
    shares: tuple[Share, ...]
    other_bytes: int
    staging_bytes: int

    def __repr__(self) -> str:
        mesh = ", ".join(f"{name} {ranks}" for name, ranks in self.mesh.items())
        return f"<Prediction for {mesh}: {len(self.shares)} ranks, {format_size(self.peak_bytes)} to load>"

    @property
    def balance(self) -> float:
        """The largest share of expert bytes over the mean; 1.0 is even."""
        mean = sum(share.expert_bytes for share in self.shares) / len(self.shares)
        return max(share.expert_bytes for share in self.shares) / mean

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest rank in bytes: its experts, all other tensors, and the staging of a load."""
        return max(share.expert_bytes for share in self.shares) + self.other_bytes + self.staging_bytes


def parse_mesh(given: Mapping[str, int] | str) -> dict[str, int]:
    """Return ranks by dimension from such a mapping, or from text such as "ep_shard=2,ep=8"; all else is refused."""
    text = given if isinstance(given, str) else ",".join(f"{name}={ranks}" for name, ranks in given.items())
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, _, ranks = part.strip().partition("=")
        if name in mesh or name not in NAMED_DIMENSIONS or not ranks.isascii() or not ranks.isdecimal():
            raise UsageError(
                "not a mesh",
                expected=f"such as ep_shard=2,ep=8, with dimensions of {', '.join(NAMED_DIMENSIONS)}",
                found=text,
                hint="name each dimension once, with its number of ranks",
            )
        mesh[name] = int(ranks)
    if not 0 < prod(mesh.values()) <= MOST_RANKS:
        raise UsageError(
            "not a mesh", expected=f"1 to {MOST_RANKS} ranks", found=text, hint="give the ranks of one pipeline stage"
        )
    return mesh


def predict(plan: Plan, mesh: Mapping[str, int]) -> Prediction:
    """Return the share of each rank that loads the plan's source into the nemo layout, the only one of a mesh."""
    if plan.target_layout is not Layout.NEMO:
        raise UsageError(
            "a mesh holds the nemo layout",
            expected="a source in the hf layout",
            found=f"a source in the {plan.source_layout} layout",
            hint="leave the mesh out, or give a source in the hf layout",
        )
    experts = [tensor for tensor in plan.tensors.values() if transposes(tensor.operation)]
    every = sum(entry.nbytes for file in plan.files for entry in file.entries)
    return Prediction(
        mesh=dict(mesh),
        shares=tuple(_share(coordinate, experts, mesh) for coordinate in product(*map(range, mesh.values()))),
        other_bytes=every - sum(tensor.nbytes for tensor in experts),
        staging_bytes=LOAD_BLOCKS * load_block_bytes(plan.tensors.values()),
    )


def check_trainable(plan: Plan, mesh: Mapping[str, int]) -> Mapping[str, int]:
    """Return a mesh on which NeMo AutoModel trains the plan's experts [E, R, C].

    It asserts that ep divides E, and its FSDP refuses an axis 1 that ep_shard does not divide. FSDP over E alone
    (dp_shard) may be uneven.

    Raises:
        UsageError: It would not build the mesh.
    """
    experts = [tensor for tensor in plan.tensors.values() if transposes(tensor.operation)]
    for name, axis in (("ep", 0), ("ep_shard", 1)):
        ranks = mesh.get(name, 1)
        uneven = next((tensor for tensor in experts if tensor.shape[axis] % ranks), None)
        if uneven is not None:
            raise UsageError(
                "NeMo AutoModel does not train on this mesh",
                tensor=uneven.name,
                expected=f"{name} that divides {uneven.shape[axis]}, axis {axis} of {list(uneven.shape)}",
                found=f"{name}={ranks}",
                hint=f"give {name} one of {', '.join(str(n) for n in range(1, 129) if uneven.shape[axis] % n == 0)}",
            )
    if "ep_replicate" in mesh:
        raise UsageError(
            "NeMo AutoModel does not train on this mesh",
            expected="dp_replicate for replicas",
            found="ep_replicate",
            hint="leave ep_replicate out, or name it dp_replicate",
        )
    return mesh


def _share(coordinate: tuple[int, ...], experts: Iterable[PlannedTensor], mesh: Mapping[str, int]) -> Share:
    sizes, placements = tuple(mesh.values()), tuple(NAMED_DIMENSIONS[name] for name in mesh)
    expert_bytes = rows = read_bytes = 0
    for tensor in experts:
        assert tensor.source is not None, "an expert tensor has a source"
        held = [count(local_runs(size, axis, sizes, coordinate, placements)) for axis, size in enumerate(tensor.shape)]
        expert_bytes += prod(held) * tensor.dtype.itemsize
        rows = max(rows, held[0])
        if all(held):
            read_bytes += held[0] * row_bytes(tensor.source.nbytes, tensor.source.shape)
            read_bytes += 0 if tensor.scale is None else tensor.scale.nbytes
    return Share(coordinate, expert_bytes, rows, read_bytes)
