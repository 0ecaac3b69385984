"""Which rank reads which rows of a checkpoint for which others: each byte once among the ranks that share reads.

The ranks tell each other which rows of each stored tensor they need. From that every rank computes the same chunks:
rows of one tensor that the same ranks need, at most a block of them. The least loaded of these ranks reads a chunk, and
broadcasts it to the others. Rows that one rank alone needs, such as FSDP's, never travel.

Chunks are dealt with in segments. The ranks meet at the end of each, so that all learn in bounded time of a rank that
could not read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gemma4_moe.distributed.collectives import AGREEMENT_SECONDS
from gemma4_moe.distributed.ranks import failing_in_words
from gemma4_moe.errors import ParallelError, UsageError
from gemma4_moe.model_io.pipeline import Exchange, Job
from gemma4_moe.model_io.wanted import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.distributed.ranks import Ranks
    from gemma4_moe.model_io.wanted import Wanted

#: The most bytes that a rank reads and receives in a segment, unless one chunk is larger.
SEGMENT_BYTES = 2 * 2**30


#: The groups that loads have made, by the default process group of their time. They are kept as long as that is, like
#: those of a mesh: torch names a group by its ranks, and one that takes a destroyed group's name finds its addresses.
_MADE_GROUPS: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


class Need(NamedTuple):
    """The rows of one stored tensor that a rank needs, and what must be the same on all ranks that need some."""

    runs: tuple[tuple[int, int], ...]
    row_bytes: int
    device: str


class Chunk(NamedTuple):
    """Rows (first, last) of a stored tensor, the ranks that need them, and the one that reads them."""

    name: str
    first: int
    last: int
    ranks: tuple[int, ...]
    reader: int


class Sharing:
    """The ranks that share the reads of a checkpoint; all of them call the same.

    Args:
        ranks: One rank shares with nobody.
        tensors: Those of the model; the groups of their meshes serve for exchanges.
    """

    def __init__(self, ranks: Ranks, checkpoint: Checkpoint, tensors: Iterable[torch.Tensor]) -> None:
        self._ranks = ranks
        self._groups: dict[tuple[int, ...], Any] = {}
        if ranks.world > 1:
            self._own = _groups_of(tensors, like=ranks.group)
            files = {name: (file.size, file.identity.header_digest) for name, file in checkpoint.files.items()}
            names = {members: group.group_name for members, group in self._own.items()}
            everyones = ranks.everyones((files, names))
            _require_one_checkpoint(ranks, checkpoint, [files for files, _ in everyones])
            self._names = [names for _, names in everyones]

    def segments(self, wanted: Sequence[Wanted]) -> Iterator[list[Job]]:
        """Yield the jobs of this rank that fill what it needs, one segment after the other."""
        if self._ranks.world == 1:
            yield [
                own.job(*rows)
                for own in wanted
                for run in own.runs
                for rows in blocks_of(run.start, run.stop, own.row_bytes)
            ]
            return
        own = {need.stored.name: need for need in wanted}
        everyones = self._ranks.everyones({name: _described(need) for name, need in own.items()})
        for segment in segments_of(chunks_of(everyones), everyones):
            mine = [chunk for chunk in segment if self._ranks.rank in chunk.ranks]
            yield [own[chunk.name].job(chunk.first, chunk.last, self._exchange(chunk)) for chunk in mine]

    def _exchange(self, chunk: Chunk) -> Exchange | None:
        if len(chunk.ranks) == 1:
            return None
        reader = self._ranks.of_world(chunk.reader)
        return Exchange(self._group(chunk.ranks), reader, chunk.reader == self._ranks.rank)

    def _group(self, ranks: tuple[int, ...]) -> Any:
        """Return the process group of some of the ranks: one that all of them have already, or a new one."""
        if len(ranks) == self._ranks.world:
            return self._ranks.group
        if ranks not in self._groups:
            members = tuple(self._ranks.of_world(rank) for rank in ranks)
            names = {self._names[rank].get(members) for rank in ranks}
            if len(names) == 1 and None not in names:
                self._groups[ranks] = self._own[members]
            else:
                patience = timedelta(seconds=AGREEMENT_SECONDS)
                with failing_in_words("form a group"):
                    group = dist.new_group(members, timeout=patience, use_local_synchronization=True)
                self._groups[ranks] = _made_groups()[members] = group
        return self._groups[ranks]


def chunks_of(needs: Sequence[Mapping[str, Need]]) -> Iterator[Chunk]:
    """Yield the chunks that cover what each rank needs, in an order that is the same for all.

    Raises:
        ParallelError: Ranks need a tensor on different kinds of devices.
    """
    of_tensor: dict[str, dict[int, Need]] = defaultdict(dict)
    for rank, own in enumerate(needs):
        for name, need in own.items():
            of_tensor[name][rank] = need
    load = [0] * len(needs)
    for name, everyones in of_tensor.items():
        (row_bytes, _), *others = {(need.row_bytes, need.device) for need in everyones.values()}
        if others:
            raise ParallelError(
                "ranks that share reads have a tensor on different kinds of devices",
                tensor=name,
                found={rank: need.device for rank, need in everyones.items()},
                hint="put the model on the same kind of device on all ranks, or leave share_reads out",
            )
        for start, end, ranks in _covered({rank: need.runs for rank, need in everyones.items()}):
            for first, last in blocks_of(start, end, row_bytes):
                reader = min(ranks, key=lambda rank: (load[rank], rank))
                load[reader] += (last - first) * row_bytes
                yield Chunk(name, first, last, ranks, reader)


def segments_of(chunks: Iterable[Chunk], needs: Sequence[Mapping[str, Need]]) -> Iterator[list[Chunk]]:
    """Yield the chunks in segments, in each of which no rank reads and receives more than `SEGMENT_BYTES`."""
    segment: list[Chunk] = []
    handled: Counter[int] = Counter()
    for chunk in chunks:
        size = (chunk.last - chunk.first) * needs[chunk.reader][chunk.name].row_bytes
        if segment and any(handled[rank] + size > SEGMENT_BYTES for rank in chunk.ranks):
            yield segment
            segment, handled = [], Counter()
        segment.append(chunk)
        handled.update(dict.fromkeys(chunk.ranks, size))
    if segment:
        yield segment


def _covered(runs: Mapping[int, Iterable[tuple[int, int]]]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield the rows (start, end) that are needed, cut where the ranks that need them change, and these ranks."""
    edges: dict[int, list[tuple[bool, int]]] = defaultdict(list)
    for rank, own in runs.items():
        for start, end in own:
            edges[start].append((True, rank))
            edges[end].append((False, rank))
    needing: set[int] = set()
    for (start, changes), (end, _) in pairwise(sorted(edges.items())):
        for begins, rank in sorted(changes):  # the ends first
            (needing.add if begins else needing.discard)(rank)
        if needing:
            yield start, end, tuple(sorted(needing))


def _described(wanted: Wanted) -> Need:
    runs = tuple((run.start, run.stop) for run in wanted.runs)
    return Need(runs, wanted.row_bytes, wanted.device.type)


def require_backend(ranks: Ranks, devices: Iterable[torch.device]) -> None:
    """Check that the ranks' process group can send from these devices.

    Raises:
        UsageError: It has no backend for one of them.
    """
    for device in devices if ranks.world > 1 else ():
        if device.type not in (backends := _backends(ranks.group)):
            raise UsageError(
                "reads can't be shared: the process group has no backend for the model's device",
                expected=f"a backend for {device.type}",
                found=", ".join(f"{kind}:{backend}" for kind, backend in backends.items()),
                hint='start it with init_process_group("cpu:gloo,cuda:nccl"), or leave share_reads out',
            )


def _made_groups() -> dict[tuple[int, ...], Any]:
    """Return the groups that earlier loads of this torch.distributed session made, by their ranks."""
    return _MADE_GROUPS.setdefault(dist.group.WORLD, {})


def _backends(group: Any) -> dict[str, str]:
    """Return the backend of each kind of device of a process group."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def _groups_of(tensors: Iterable[torch.Tensor], like: Any) -> dict[tuple[int, ...], Any]:
    """Return the process groups of the tensors' meshes, by their ranks; those of the same backends as `like`."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    groups = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    fit = [group for group in groups if _backends(group) == _backends(like)]
    return {tuple(dist.get_process_group_ranks(group)): group for group in fit} | _made_groups()


def _require_one_checkpoint(ranks: Ranks, checkpoint: Checkpoint, files: Sequence[Any]) -> None:
    different = [ranks.of_world(rank) for rank, found in enumerate(files) if found != files[ranks.rank]]
    if different:
        raise ParallelError(
            "ranks that share reads have different checkpoints",
            file=checkpoint.path,
            expected="files of the same names, sizes and headers on all ranks",
            found=f"others on ranks {different}",
            hint="give the same path on all ranks; or copy the checkpoint to every node again",
        )
