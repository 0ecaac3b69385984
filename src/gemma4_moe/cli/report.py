"""Results as JSON with fixed names for programs, and as lines and tables for people.

Text from checkpoints goes through `printable` and never through rich's markup.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from gemma4_moe.cli.exit_statuses import failure
from gemma4_moe.errors import printable
from gemma4_moe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma4_moe.converter.conversion import Conversion
    from gemma4_moe.converter.inspect import Inspection
    from gemma4_moe.converter.preview import Prediction, Preview
    from gemma4_moe.converter.space import Space
    from gemma4_moe.demo.demo import Check
    from gemma4_moe.target.manifest import Recheck
    from gemma4_moe.target.recovery import Remains
    from gemma4_moe.verifier.comparison import Verification
    from gemma4_moe.verifier.differences import FoldedDifference

#: How many differences are shown to people in full.
_SHOWN = 20


class Report(NamedTuple):
    """A result as JSON, and as lines to print."""

    data: dict[str, Any]
    lines: Sequence[Text | Table]


def inspection(found: Inspection, *, tensors: bool = False) -> Report:
    """Return the report of `inspect`; its lines list the tensors only if asked for."""
    data = {
        "source": str(found.source),
        "layout": found.layout,
        "spelling": found.spelling,
        "model_type": found.model_type,
        "config": found.sizes,
        "tensors": found.tensors,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "groups": found.groups,
        "folds": [row._asdict() for row in found.folds],
        "problems": [failure(error) for error in found.problems],
        "notes": list(found.notes),
        "skipped": list(found.skipped),
    }
    table = Table("tensor", "shape", "dtype", "count", "bytes", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[3:]:
        column.justify = "right"
    for row in found.folds:
        table.add_row(text(row.name), str(list(row.shape)), row.dtype, str(row.tensors), format_size(row.bytes))
    groups = sorted(found.groups.items(), key=lambda item: -item[1])
    sizes = [f"{axis} {size}" for axis, size in found.sizes.items()]
    lines: list[Text | Table] = [
        *labelled(
            ("source", str(found.source)),
            ("layout", f"{found.layout or 'none'} ({found.spelling})"),
            ("model", ", ".join([found.model_type or "unknown", *sizes])),
            ("tensors", f"{found.tensors:,} of {found.parameters:,} parameters"),
            ("bytes", f"{found.bytes:,} ({format_size(found.bytes)})"),
        ),
        *([table] if tensors else []),
        *(text(f"  {format_size(size):>12}  {size / max(1, found.bytes):6.1%}  {group}") for group, size in groups),
        *(Text("problem: ", "bold red") + text(str(problem)) for problem in found.problems),
        *(text(f"note: {note}") for note in found.notes),
    ]
    if not found.problems and found.layout is not None:
        lines.append(Text(f"no problems: can be converted to the {found.layout.other} layout"))
    return Report(data, lines)


def preview(found: Preview) -> Report:
    """Return the report of `plan`."""
    plan, space = found.plan, found.space
    mesh, mesh_facts = (None, []) if found.mesh is None else _mesh(found.mesh)
    data = {
        "source": {
            "path": str(found.source),
            "layout": plan.source_layout,
            "spelling": plan.spelling,
            "tensors": found.source_tensors,
            "bytes": found.source_bytes,
        },
        "target": {
            "layout": plan.target_layout,
            "tensors": len(plan.tensors),
            "files": len(plan.files),
            "bytes": plan.target_bytes,
            "side_files": list(found.side_files),
        },
        "inexact_casts": {f"{old.name} to {new.name}": count for (old, new), count in plan.inexact.items()},
        "notes": list(found.notes),
        "free_bytes": space.free_bytes,
        "cache_bytes": space.cache_bytes,
        "missing_bytes": space.missing_bytes,
        "peak_memory_bytes": found.memory.peak_bytes,
        "skipped": list(found.skipped),
        "mesh": mesh,
    }
    cached = f", {format_size(space.cache_bytes)} go into the Hub's cache" if space.cache_bytes else ""
    short = f": {format_size(space.missing_bytes)} short" if space.missing_bytes else ""
    facts = labelled(
        ("source", f"{found.source}: {plan.source_layout} ({plan.spelling})"),
        ("", f"{found.source_tensors:,} tensors, {found.source_bytes:,} bytes"),
        ("target", f"{plan.target_layout}: {len(plan.tensors):,} tensors in {_files(len(plan.files))}"),
        ("", f"{plan.target_bytes:,} bytes with headers; {format_size(space.free_bytes)} free{cached}{short}"),
        ("memory", f"{found.memory.peak_bytes:,} bytes of buffers"),
        ("copied", ", ".join(found.side_files) or "nothing"),
        ("skipped", ", ".join(found.skipped) or "nothing"),
    )
    return Report(data, [*facts, *map(text, found.notes), *mesh_facts])


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


def _mesh(found: Prediction) -> tuple[dict[str, Any], list[Text]]:
    """Return the mesh part of a preview as JSON and as lines."""
    columns = {
        column: [getattr(share, column) for share in found.shares]
        for column in ("expert_bytes", "experts", "read_bytes")
    }
    data = {
        "dimensions": dict(found.mesh),
        "ranks": len(found.shares),
        **{column: {"least": min(values), "most": max(values)} for column, values in columns.items()},
        "other_bytes": found.other_bytes,
        "peak_memory_bytes": found.peak_bytes,
        "balance": found.balance,
    }
    spans = {column: " to ".join(f"{n:,}" for n in sorted({min(v), max(v)})) for column, v in columns.items()}
    facts = labelled(
        ("mesh", f"{', '.join(f'{name} {size}' for name, size in found.mesh.items())}: {len(found.shares)} ranks"),
        ("experts", f"{spans['experts']} of each layer on a rank"),
        ("", f"{spans['expert_bytes']} bytes; fullest over mean {found.balance:.3f}"),
        ("others", f"{found.other_bytes:,} bytes on every rank that does not shard them"),
        ("read", f"{spans['read_bytes']} bytes of experts a rank"),
        ("load", f"{found.peak_bytes:,} bytes at the peak of a load ({format_size(found.peak_bytes)})"),
    )
    return data, facts


def conversion(done: Conversion) -> Report:
    """Return the report of `convert`."""
    plan = done.plan
    data = {
        "target": str(done.target),
        "layout": plan.target_layout,
        "tensors": len(plan.tensors),
        "files": len(plan.files),
        "bytes": plan.target_bytes,
        "peak_memory_bytes": done.memory.peak_bytes,
        "notes": list(done.notes),
        "skipped": list(done.skipped),
    }
    written = f"{len(plan.tensors):,} tensors in {_files(len(plan.files))}, {plan.target_bytes:,} bytes"
    return Report(data, labelled(("target", f"{done.target}: {plan.target_layout}"), ("", written)))


def verification(found: Verification) -> Report:
    """Return the report of `verify` and of `diff`."""
    folds = found.folds
    files = {"compared": found.files, "equal": found.files - found.different_files, "different": found.different_files}
    data = {
        "tensors": found.tensors,
        "equal": found.equal,
        "different": found.different_tensors,
        "files": files,
        "folds": [asdict(row) for row in folds],
        "differences": [asdict(difference) for difference in found.different],
    }
    lines: list[Text | Table] = [
        text(f"{found.tensors:,} tensors: {found.equal:,} equal, {found.different_tensors:,} different")
    ]
    if found.files:
        lines.append(text(f"{_files(found.files)}: {files['equal']:,} equal, {files['different']:,} different"))
    if folds:
        lines.append(_folded(folds))
    lines += [text(str(difference)) for difference in found.different[:_SHOWN]]
    if (left := len(found.different) - _SHOWN) > 0:
        lines.append(text(f"and {left:,} more differences, which --format json lists"))
    return Report(data, lines)


def _folded(rows: Sequence[FoldedDifference]) -> Table:
    """Return the table of differences folded over layers."""
    from gemma4_moe.verifier.distances import shown  # it loads NumPy, which other reports do without

    headings = ("elements", "max ulps", "max |Δ|", "max |Δ/x|", "cosine", "NaN", "inf")
    table = Table("differs in", "tensor", "count", *headings, box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        far = row.distance
        measures = () if far is None else (far.max_absolute, far.max_relative, far.cosine)
        table.add_row(
            row.kind,
            text(row.name),
            f"{row.tensors:,}",
            *("" if count is None else f"{count:,}" for count in (row.count, row.max_ulps)),
            *("" if measure is None else shown(measure) for measure in measures),
            *(() if far is None else (f"{far.nan:,}", f"{far.infinite:,}")),
        )
    return table


def recheck(found: Recheck) -> Report:
    """Return the report of `verify` with a target alone."""
    data = {
        "files": found.files,
        "equal": found.equal,
        "different": found.different,
        "unknown": found.unknown,
        "bytes": found.nbytes,
        "wrong": list(found.wrong),
    }
    state = (
        f"{found.equal:,} as the manifest says, {found.different:,} not" if found.different else "as the manifest says"
    )
    if found.unknown:
        state += f"; {_files(found.unknown)} that it does not name"
    return Report(data, [text(f"{_files(found.files)}, {found.nbytes:,} bytes: {state}"), *map(text, found.wrong)])


def remains(found: Remains | None) -> Report:
    """Return the report of `clean`."""
    if found is None:
        return Report({"removed": None, "bytes": 0}, [Text("nothing to remove")])
    data = {"removed": str(found.path), "bytes": found.nbytes}
    return Report(data, [text(f"removed {found.path}, {found.nbytes:,} bytes")])


def checks(found: tuple[Check, ...]) -> Report:
    """Return the report of `demo`."""
    table = Table(title="Gemma 4 MoE: hf → nemo → hf", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for heading in ("files", "tensors", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("finding")
    for check in found:
        numbers = ("" if number is None else f"{number:,}" for number in (check.files, check.tensors, check.bytes))
        mark = Text("✓", "green") if check.passed else Text("✗", "red")
        table.add_row(check.step, *numbers, mark, text(check.finding))
    return Report({"passed": all(check.passed for check in found), "checks": [asdict(c) for c in found]}, [table])


def labelled(*pairs: tuple[str, str]) -> list[Text]:
    """Return lines of labels and facts."""
    width = max(len(label) for label, _ in pairs)
    return [Text(f"{label:<{width}}  ", "bold") + Text(printable(fact)) for label, fact in pairs]


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def text(given: str) -> Text:
    """Return text from outside for printing: no markup, no control characters but line breaks."""
    return Text("\n".join(printable(line) for line in given.split("\n")))
