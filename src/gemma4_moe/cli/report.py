"""Results for people as tables and lines, and for programs as JSON with fixed names.

Text from checkpoints goes through `printable` and never through rich's markup.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from gemma4_moe.errors import Gemma4MoEError, printable
from gemma4_moe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from gemma4_moe.converter.convert import Conversion
    from gemma4_moe.converter.inspect import Inspection
    from gemma4_moe.converter.preview import Prediction, Preview, Space
    from gemma4_moe.demo.demo import Check
    from gemma4_moe.target.manifest import Recheck
    from gemma4_moe.target.recovery import Remains
    from gemma4_moe.verifier.comparison import Verification


def inspection_json(found: Inspection) -> dict[str, Any]:
    """Return the JSON of `inspect`."""
    return {
        "source": str(found.source),
        "layout": found.layout,
        "spelling": found.spelling,
        "model_type": found.model_type,
        "config": found.sizes,
        "tensors": found.tensors,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "groups": found.groups,
        "folds": [
            {"name": f.name, "shape": list(f.shape), "dtype": f.dtype, "tensors": f.tensors, "bytes": f.bytes}
            for f in found.folds
        ],
        "problems": [_error_json(problem) for problem in found.problems],
        "skipped": list(found.skipped),
    }


def print_inspection(console: Console, found: Inspection) -> None:
    """Print the result of `inspect`."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in found.sizes.items())
    _print_facts(
        console,
        ("source", str(found.source)),
        ("layout", f"{found.layout or 'none'} ({found.spelling})"),
        ("model", f"{found.model_type or 'unknown'}{', ' + sizes if sizes else ''}"),
        ("tensors", f"{found.tensors:,} of {found.parameters:,} parameters"),
        ("bytes", f"{found.bytes:,} ({format_size(found.bytes)})"),
    )
    table = Table("tensor", "shape", "dtype", "count", "bytes", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[3:]:
        column.justify = "right"
    for row in found.folds:
        shape = "[" + ", ".join(map(str, row.shape)) + "]"
        table.add_row(_text(row.name), shape, row.dtype, str(row.tensors), format_size(row.bytes))
    console.print(table)
    for group, size in sorted(found.groups.items(), key=lambda item: -item[1]):
        console.print(_text(f"  {format_size(size):>12}  {size / max(1, found.bytes):6.1%}  {group}"))
    if not found.problems and found.layout is not None:
        console.print(f"no problems: can be converted to the {found.layout.other} layout")
    for problem in found.problems:
        console.print(Text("problem: ", "bold red") + _text(str(problem)))


def preview_json(preview: Preview) -> dict[str, Any]:
    """Return the JSON of `plan`."""
    plan = preview.plan
    return {
        "source": {
            "path": str(preview.source),
            "layout": plan.source_layout,
            "spelling": plan.spelling,
            "tensors": preview.source_tensors,
            "bytes": preview.source_bytes,
        },
        "target": {
            "layout": plan.target_layout,
            "tensors": len(plan.tensors),
            "files": len(plan.files),
            "bytes": plan.target_bytes,
            "side_files": list(preview.side_files),
        },
        "inexact_casts": {f"{old.name} to {new.name}": count for (old, new), count in plan.inexact.items()},
        "notes": list(preview.notes),
        "free_bytes": preview.space.free_bytes,
        "cache_bytes": preview.space.cache_bytes,
        "missing_bytes": preview.space.missing_bytes,
        "peak_memory_bytes": preview.memory.peak_bytes,
        "skipped": list(preview.skipped),
        "mesh": None if preview.mesh is None else _mesh_json(preview.mesh),
    }


def print_preview(console: Console, preview: Preview) -> None:
    """Print the result of `plan`."""
    plan = preview.plan
    space = f"{format_size(preview.space.free_bytes)} free"
    if preview.space.cache_bytes:
        space += f", {format_size(preview.space.cache_bytes)} go into the Hub's cache"
    if preview.space.missing_bytes:
        space += f": {format_size(preview.space.missing_bytes)} short"
    _print_facts(
        console,
        ("source", f"{preview.source}: {plan.source_layout} ({plan.spelling})"),
        ("", f"{preview.source_tensors:,} tensors, {preview.source_bytes:,} bytes"),
        ("target", f"{plan.target_layout}: {len(plan.tensors):,} tensors in {_files(len(plan.files))}"),
        ("", f"{plan.target_bytes:,} bytes with headers; {space}"),
        ("memory", f"{preview.memory.peak_bytes:,} bytes of buffers"),
        ("copied", ", ".join(preview.side_files) or "nothing"),
        ("skipped", ", ".join(preview.skipped) or "nothing"),
    )
    for note in preview.notes:
        console.print(_text(note))
    if preview.mesh is not None:
        _print_mesh(console, preview.mesh)


def space_notes(space: Space) -> tuple[str, ...]:
    """Return notes on space that is missing."""
    if not space.missing_bytes:
        return ()
    cached = ", and for SRC in the Hub's cache" if space.cache_bytes else ""
    missing = f"note: {space.missing_bytes:,} bytes of space are missing for the target{cached}"
    left = space.missing_without_cache
    if left == space.missing_bytes:
        return (missing,)
    rest = f"{left:,} bytes are missing" if left else "the target fits"
    return (missing, f"note: with --stream, convert keeps nothing of SRC on this machine, and {rest}")


def _mesh_json(found: Prediction) -> dict[str, Any]:
    return {
        "dimensions": dict(found.mesh),
        "ranks": len(found.shares),
        "expert_bytes": _extremes(share.expert_bytes for share in found.shares),
        "experts": _extremes(share.experts for share in found.shares),
        "read_bytes": _extremes(share.read_bytes for share in found.shares),
        "other_bytes": found.other_bytes,
        "peak_memory_bytes": found.peak_bytes,
        "balance": found.balance,
    }


def _print_mesh(console: Console, found: Prediction) -> None:
    shares = found.shares
    _print_facts(
        console,
        ("mesh", f"{', '.join(f'{name} {size}' for name, size in found.mesh.items())}: {len(shares)} ranks"),
        ("experts", f"{_span(share.experts for share in shares)} of each layer on a rank"),
        ("", f"{_span(share.expert_bytes for share in shares)} bytes; fullest over mean {found.balance:.3f}"),
        ("others", f"{found.other_bytes:,} bytes on every rank that does not shard them"),
        ("read", f"{_span(share.read_bytes for share in shares)} bytes of experts a rank"),
        ("load", f"{found.peak_bytes:,} bytes at the peak of a load ({format_size(found.peak_bytes)})"),
    )


def _span(values: Iterable[int]) -> str:
    least, most = _extremes(values).values()
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _extremes(values: Iterable[int]) -> dict[str, int]:
    values = list(values)
    return {"least": min(values), "most": max(values)}


def conversion_json(conversion: Conversion) -> dict[str, Any]:
    """Return the JSON of `convert`."""
    plan = conversion.plan
    return {
        "target": str(conversion.target),
        "layout": plan.target_layout,
        "tensors": len(plan.tensors),
        "files": len(plan.files),
        "bytes": plan.target_bytes,
        "peak_memory_bytes": conversion.memory.peak_bytes,
        "notes": list(conversion.notes),
        "skipped": list(conversion.skipped),
    }


def print_conversion(console: Console, conversion: Conversion) -> None:
    """Print the result of `convert`."""
    plan = conversion.plan
    _print_facts(
        console,
        ("target", f"{conversion.target}: {plan.target_layout}"),
        ("", f"{len(plan.tensors):,} tensors in {_files(len(plan.files))}, {plan.target_bytes:,} bytes"),
    )


def verification_json(found: Verification) -> dict[str, Any]:
    """Return the JSON of `verify` and of `diff`."""
    return {
        "tensors": found.tensors,
        "equal": found.equal,
        "different": len(found.different),
        "differences": [difference.as_dict() for difference in found.different],
    }


def print_verification(console: Console, found: Verification, shown: int = 20) -> None:
    """Print the result of `verify` or `diff`, with the first `shown` differences in full."""
    console.print(f"{found.tensors:,} tensors: {found.equal:,} equal, {len(found.different):,} different")
    for difference in found.different[:shown]:
        console.print(_text(str(difference)))
    if len(found.different) > shown:
        console.print(f"and {len(found.different) - shown:,} more")


def recheck_json(found: Recheck) -> dict[str, Any]:
    """Return the JSON of `verify` with a target alone."""
    return {"files": found.files, "bytes": found.nbytes, "wrong": list(found.wrong)}


def print_recheck(console: Console, found: Recheck) -> None:
    """Print the result of `verify` with a target alone."""
    state = "as the manifest says" if not found.wrong else f"{len(found.wrong)} not as the manifest says"
    console.print(f"{_files(found.files)}, {found.nbytes:,} bytes: {state}")
    for sentence in found.wrong:
        console.print(_text(sentence))


def remains_json(found: Remains | None) -> dict[str, Any]:
    """Return the JSON of `clean`."""
    return {"removed": None if found is None else str(found.path), "bytes": 0 if found is None else found.nbytes}


def print_remains(console: Console, found: Remains | None) -> None:
    """Print the result of `clean`."""
    said = "nothing to remove" if found is None else f"removed {found.path}, {found.nbytes:,} bytes"
    console.print(_text(said))


def checks_json(checks: tuple[Check, ...]) -> dict[str, Any]:
    """Return the JSON of `demo`."""
    return {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}


def print_checks(console: Console, checks: tuple[Check, ...]) -> None:
    """Print the result of `demo`."""
    lines = Table(title="Gemma 4 MoE: hf → nemo → hf", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    lines.add_column("step", no_wrap=True)
    for heading in ("files", "tensors", "bytes"):
        lines.add_column(heading, justify="right", no_wrap=True)
    lines.add_column("", no_wrap=True)
    lines.add_column("finding")
    for check in checks:
        numbers = ("" if number is None else f"{number:,}" for number in (check.files, check.tensors, check.bytes))
        mark = Text("✓", "green") if check.passed else Text("✗", "red")
        lines.add_row(check.step, *numbers, mark, _text(check.finding))
    console.print(lines)


def _print_facts(console: Console, *facts: tuple[str, str]) -> None:
    width = max(len(label) for label, _ in facts)
    for label, fact in facts:
        console.print(Text(f"{label:<{width}}  ", "bold") + Text(printable(fact)))


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def _text(text: str) -> Text:
    """Return text from outside for printing: no markup, no control characters but line breaks."""
    return Text("\n".join(printable(line) for line in text.split("\n")))


def _error_json(error: Gemma4MoEError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "problem": error.problem, **error.facts, "next": error.hint}


def sentences(lines: Iterable[str]) -> str:
    """Return lines from outside made printable, one below the other."""
    return "\n".join(printable(line) for line in lines)
