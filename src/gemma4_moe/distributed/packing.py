"""Tensors that are gathered together: each rank's rows of one after the other, in one buffer."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_moe.distributed.sharding import count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gemma4_moe.distributed.sharding import Step

    Runs = tuple[range, ...]
    #: Writes a tensor [rows, ...] in the source's layout to one in the target's, whose dtype it may round to.
    Convert = Callable[[torch.Tensor, torch.Tensor], object]

#: Places in a packed buffer are multiples of so many bytes.
_ALIGNMENT = 16

#: From this size in bytes on, a copy is faster alone than in a launch with others, which reaches 3/4 of the memory's
#: speed on an H100.
_OWN_LAUNCH_BYTES = 4 << 20


class Packed(NamedTuple):
    """A tensor that travels with others."""

    rows: torch.Tensor  # this rank's
    out: torch.Tensor
    convert: Convert


@dataclass
class Pack:
    """Tensors that travel together: each rank's part of one after the other."""

    group: Any
    own: int  # this rank's number in the group
    ranks: int
    bytes_of_all: int = 0
    nbytes: int = 0  # of one rank's parts
    tensors: list[tuple[Packed, Step]] = field(default_factory=list)
    rooms: list[int] = field(default_factory=list)  # bytes of a part, which is the largest of all ranks, aligned

    def add(self, packed: Packed, step: Step) -> None:
        """Give the next tensor room for the largest part that a rank has of it."""
        row_bytes = prod(packed.out.shape[1:]) * packed.out.element_size()
        self.tensors.append((packed, step))
        self.rooms.append(-(-max(map(count, step.rows)) * row_bytes // _ALIGNMENT) * _ALIGNMENT)
        self.nbytes += self.rooms[-1]
        self.bytes_of_all += packed.out.nbytes

    def filled(self) -> torch.Tensor:
        """Return this rank's parts, converted."""
        send = torch.empty(self.nbytes, dtype=torch.uint8, device=self.tensors[0][0].out.device)
        pairs = []
        for (packed, step), room in zip(self.tensors, send.split_with_sizes(self.rooms), strict=True):
            place = _rows_in(room, count(step.rows[self.own]), packed.out)
            if packed.convert is copy and packed.rows.dtype == place.dtype:
                pairs.append((place, packed.rows))
            else:
                packed.convert(packed.rows, place)
        copy_together(pairs)
        return send

    def unpack(self, received: torch.Tensor) -> None:
        """Copy all ranks' parts [ranks, bytes] to their places."""
        pairs = []
        for rank, parts in enumerate(received.unbind()):
            for (packed, step), room in zip(self.tensors, parts.split_with_sizes(self.rooms), strict=True):
                runs = step.rows[rank]
                part = _rows_in(room, count(runs), packed.out)
                for run in runs:
                    pairs.append((packed.out[run.start : run.stop], part[: len(run)] if len(runs) > 1 else part))
                    part = part[len(run) :] if len(runs) > 1 else part
        copy_together(pairs)


def copy(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy values as they are: the conversion of a tensor that keeps its layout."""
    return out.copy_(source)


def copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy (to, from) pairs of one device, the small ones of them in one launch."""
    small = [pair for pair in pairs if pair[0].nbytes < _OWN_LAUNCH_BYTES]
    for out, source in pairs:
        if out.nbytes >= _OWN_LAUNCH_BYTES:
            out.copy_(source)
    copy_together(small)


def copy_together(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy (to, from) pairs of one device in as few launches as torch can: the host's time counts, not the device's."""
    if pairs:
        outs, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(outs, sources)


def _rows_in(room: torch.Tensor, rows: int, like: torch.Tensor) -> torch.Tensor:
    """Return so many rows of a tensor like `like` at the start of some bytes."""
    shape = (rows, *like.shape[1:])
    nbytes = prod(shape) * like.element_size()
    return (room if nbytes == len(room) else room[:nbytes]).view(like.dtype).view(shape)
