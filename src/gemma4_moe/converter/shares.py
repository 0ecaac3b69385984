"""Which bytes of the target this run has to write: the chunks that are not on the device yet, shared among the ranks.

A share is made of whole chunks, so every chunk is hashed where it is written, and its edges are pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.hashing import Chunk, bytes_hash, chunk_bounds, chunk_count
from gemma4_moe.converter.blocks import Span

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from gemma4_moe.converter.plan import Plan


def target_chunks(plan: Plan) -> dict[Chunk, Span]:
    """Return each chunk of the target's weight files, in their order, with the bytes that it is."""
    return {
        Chunk(file.name, number): Span(file.name, *chunk_bounds(number, file.size))
        for file in plan.files
        for number in range(chunk_count(file.size))
    }


def share(plan: Plan, done: Container[Chunk], rank: int, world: int) -> list[Span]:
    """Return what rank `rank` of `world` has to write; the shares together are all chunks that are not in `done`."""
    missing = [span for chunk, span in target_chunks(plan).items() if chunk not in done]
    total = sum(span.end - span.start for span in missing)
    spans: list[Span] = []
    before = 0
    for span in missing:
        owner = before * world // total
        before += span.end - span.start
        if owner != rank:
            continue
        if spans and (spans[-1].file, spans[-1].end) == (span.file, span.start):
            spans[-1] = Span(span.file, spans[-1].start, span.end)
        else:
            spans.append(span)
    return spans


def header_hashes(plan: Plan, spans: Sequence[Span]) -> dict[Chunk, str]:
    """Return the hash of each chunk in `spans` that lies in a file's header, so that no block completes it."""
    headers = {file.name: file.header for file in plan.files}
    return {
        chunk: bytes_hash(headers[chunk.name][bounds.start : bounds.end])
        for chunk, bounds in target_chunks(plan).items()
        if bounds.end <= len(headers[chunk.name])
        and any(span.file == chunk.name and span.start <= bounds.start < span.end for span in spans)
    }
