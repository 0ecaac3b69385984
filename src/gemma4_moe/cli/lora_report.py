"""Results of LoRA adapters as JSON with fixed names for programs, and as lines and tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from gemma4_moe.cli.report import Report, labelled, text
from gemma4_moe.sizes import format_size

if TYPE_CHECKING:
    from rich.text import Text

    from gemma4_moe.lora.convert import LoraConversion
    from gemma4_moe.lora.inspection import LoraInspection


def lora_conversion(done: LoraConversion) -> Report:
    """Return the report of `lora`."""
    data = {
        "target": str(done.target),
        "source_form": done.source_form,
        "form": done.form,
        "weights": done.modules,
        "tensors": done.tensors,
        "bytes": done.nbytes,
        "notes": list(done.notes),
    }
    written = f"{done.modules} weights in {done.tensors:,} tensors, {done.nbytes:,} bytes"
    return Report(data, labelled(("target", f"{done.target}: {done.form}"), ("", written)))


def lora_inspection(found: LoraInspection) -> Report:
    """Return the report of `inspect` on an adapter."""
    data = {
        "source": str(found.source),
        "form": found.form,
        "layout": found.layout,
        "tensors": found.tensors,
        "bytes": found.bytes,
        "experts": found.experts,
        "needs_scale": found.needs_scale,
        "folds": [row._asdict() for row in found.folds],
        "notes": list(found.notes),
    }
    table = Table("weight", "shape", "rank", "scaling", "dtype", "count", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for row in found.folds:
        sizes = str(list(row.shape)), str(row.rank), f"{row.scaling:g}", row.dtype, str(row.weights)
        table.add_row(text(row.name), *sizes)
    lines: list[Text | Table] = [
        *labelled(
            ("source", str(found.source)),
            ("form", f"{found.form}" + (f" ({found.layout})" if found.layout else "")),
            ("tensors", f"{found.tensors:,}, {found.bytes:,} bytes ({format_size(found.bytes)})"),
            ("scales", "of its base are needed for another form" if found.needs_scale else "are not needed"),
        ),
        table,
        *(text(f"note: {note}") for note in found.notes),
    ]
    return Report(data, lines)
