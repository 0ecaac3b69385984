"""The command that publishes the model of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gemma4_moe.cli import options
from gemma4_moe.cli.help import Command
from gemma4_moe.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.cli.options import Output
    from gemma4_moe.cli.report import Report
    from gemma4_moe.publishing.publish import Publication


@click.command(
    cls=Command,
    examples=[
        "gemma4-moe publish checkpoints tuned --base google/gemma-4-26B-A4B",
        "gemma4-moe publish checkpoints/LOWEST_VAL tuned --base gemma-4-26B-A4B",
    ],
)
@options.argument(
    "source",
    "RUN_OR_STEP",
    "A training run, a step of one, or any other checkpoint. Of a run, the step of LATEST is taken.",
    type=options.Checkpoint(),
)
@options.argument(
    "target", "DST", "The directory to make. It must not exist yet, or be empty.", type=options.Directory()
)
@click.option(
    "--base",
    metavar="CHECKPOINT",
    type=options.Checkpoint(),
    help="The published checkpoint that training began with, a directory or a Hub id. Its config.json is used, its "
    "tokenizer and other files fill in, and experts that training left unchanged get its weights and scales back.",
)
@options.dtype
@options.shard_size
@options.memory
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a checkpoint directory and holds nothing else.")
@click.option("--resume", is_flag=True, help="Resume an interrupted run to DST, if there is one.")
@click.option("--push", metavar="USER/MODEL", help="Upload DST to this repository on the Hub, which is made if needed.")
@click.option("--private", is_flag=True, help="With --push, make a new repository private.")
@options.common
def publish(output: Output, *, source: str, target: Path, **arguments: Any) -> None:
    """Make a model of a training run ready for others, and check it.

    DST is in the hf layout, with config, tokenizer and a model card. Every tensor of it is computed again from the run,
    and compared.
    """
    from gemma4_moe.cli.progress import shown_progress, telling_what_is_kept
    from gemma4_moe.publishing.publish import publish as run

    with telling_what_is_kept(output.warn, target), shown_progress(output.talk, "publishing") as progress:
        done = run(source, target, progress=progress, **arguments)
    output.say(*(f"note: {note}" for note in done.notes))
    output.give(_report(done), is_faultless=True)


def _report(done: Publication) -> Report:
    """Return the report of `publish`."""
    from rich.text import Text

    from gemma4_moe.cli import report

    made = None if done.conversion is None else report.conversion(done.conversion)
    checked = None if done.verification is None else report.verification(done.verification)
    data = {
        "directory": str(done.directory),
        "conversion": made and made.data,
        "verification": checked and checked.data,
        "pushed": done.pushed and done.pushed._asdict(),
        "notes": list(done.notes),
    }
    lines = [line for part in (made, checked) if part is not None for line in part.lines]
    if done.pushed is not None:
        lines.append(Text(printable(f"pushed  {done.pushed.repository}, commit {done.pushed.commit}")))
        lines.append(Text(printable(f"        {done.pushed.url}")))
    return report.Report(data, lines)
