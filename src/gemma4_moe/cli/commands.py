"""The commands of `gemma4-moe`. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import io
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gemma4_moe.cli import lora_commands, options, publish_command, writing
from gemma4_moe.cli.exit_statuses import end, status_of, terminate_by_exception
from gemma4_moe.cli.help import Group
from gemma4_moe.distributed.ranks import launched_as_one_of_several
from gemma4_moe.errors import DifferenceError, InputError, StorageError, command_line
from gemma4_moe.layout.table import Layout
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma4_moe.cli.options import Output
    from gemma4_moe.cli.report import Report


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    examples=[
        "gemma4-moe inspect gemma-4-26B-A4B",
        "gemma4-moe convert gemma-4-26B-A4B gemma-4-nemo",
        "gemma4-moe verify gemma-4-26B-A4B gemma-4-nemo",
    ],
)
@click.version_option(__version__, prog_name="gemma4-moe")
def cli() -> None:
    """Convert Gemma 4 mixture-of-experts checkpoints between two layouts.

    hf is the layout in which models are published: transformers, vLLM and SGLang read it. nemo is the layout in which
    NVIDIA NeMo AutoModel trains: the weights of all experts are transposed, and the router's per-expert scale is
    multiplied into them.

    A checkpoint is a directory of safetensors files with their config.json. Start with `inspect`: it tells the layout
    of a checkpoint and whether it can be converted. No command changes its source, and no model is built.
    """


@cli.command(
    examples=["gemma4-moe inspect gemma-4-26B-A4B", "gemma4-moe inspect google/gemma-4-26B-A4B --tensors --format json"]
)
@options.source
@options.revision
@click.option("--tensors", is_flag=True, help="Also list the tensors, those of all layers in one line.")
@click.option("--values", is_flag=True, help="Also read all tensors: NaN, infinities, experts that are zero or equal.")
@options.common
def inspect(output: Output, *, source: str, revision: str | None, tensors: bool, values: bool) -> None:
    """Show a checkpoint's layout, bytes and problems.

    Only headers, index and config.json are read, on the Hub too, unless --values is given. The exit status is 0 if
    `convert` would take the checkpoint, and 3 if there are problems. Of a LoRA adapter, show its form and its modules.
    """
    from gemma4_moe.checkpoint.paths import expanded
    from gemma4_moe.cli import report
    from gemma4_moe.hub.source import is_hub_id
    from gemma4_moe.lora.config import is_adapter

    if not is_hub_id(source) and is_adapter(expanded(source)):
        from gemma4_moe.cli import lora_report
        from gemma4_moe.lora.inspection import inspect_adapter

        output.give(lora_report.lora_inspection(inspect_adapter(source, values=values)))
        return
    from gemma4_moe.converter import inspect

    found = inspect.inspect(source, revision=revision, values=values)
    output.give(report.inspection(found, tensors=tensors))
    if found.problems:
        click.get_current_context().exit(InputError.exit_status)


@cli.command(examples=["gemma4-moe plan gemma-4-26B-A4B", "gemma4-moe plan gemma-4-26B-A4B --mesh ep_shard=2,ep=8"])
@options.source
@options.to
@options.dtype
@options.shard_size
@options.memory
@click.option(
    "--mesh", metavar="DIM=RANKS,...", help="Also show the share of each rank of this mesh, such as ep_shard=2,ep=8."
)
@options.revision
@options.stream
@options.base
@options.strip_wrappers
@options.scale
@options.scale_from
@options.config_from
@options.common
def plan(output: Output, *, source: str, **arguments: Any) -> None:
    """Show what convert would do: files, bytes, space and memory.

    Only headers, index and config.json are read, on the Hub too.
    """
    writing.show_plan(output, source, None, arguments)


@cli.command(
    examples=[
        "gemma4-moe convert gemma-4-26B-A4B gemma-4-nemo",
        "gemma4-moe convert gemma-4-26B-A4B gemma-4-nemo --resume",
        "gemma4-moe convert gemma-4-nemo gemma-4-hf --base gemma-4-26B-A4B",
    ]
)
@options.source
@options.target
@options.to
@options.writing
@options.base
@options.strip_wrappers
@options.scale
@options.scale_from
@options.config_from
@click.option("--card", is_flag=True, help="Also write a model card, README.md, that says how DST was made.")
@options.common
def convert(output: Output, *, source: str, target: Path, dry_run: bool, **arguments: Any) -> None:
    """Convert SRC into the new directory DST.

    DST appears when it is complete and was read back. Under torchrun all ranks share the work.
    """
    from gemma4_moe.converter import convert
    from gemma4_moe.converter.command import option_words

    if dry_run:
        writing.show_plan(output, source, target, arguments)
        return
    done = writing.write(output, "converting", partial(convert.convert, source), target, arguments)
    if done.plan.target_layout is Layout.NEMO:
        output.say("loaded by torch's dcp.load and read by gemma4-moe; NeMo AutoModel, transformers and vLLM want hf")
    given = {p.name: arguments[p.name] for p in verify.params if arguments.get(p.name)}
    output.say(f"next: {command_line('gemma4-moe', 'verify', *option_words(given), Path(source), target)}")


@cli.command(examples=["gemma4-moe verify gemma-4-26B-A4B gemma-4-nemo", "gemma4-moe verify gemma-4-nemo"])
@options.argument(
    "first", "[SRC]", f"The checkpoint that DST was converted from: {options.CHECKPOINT}", type=options.Checkpoint()
)
@options.argument("second", "DST", "The checkpoint to judge, likewise.", required=False, type=options.Checkpoint())
@options.revision
@options.stream
@options.strip_wrappers
@options.scale
@options.scale_from
@options.config_from
@click.option(
    "--adapter",
    type=options.Directory(),
    help="The LoRA adapter with which `merge` made DST from SRC. Values may differ by the order of fp32 sums.",
)
@options.common
def verify(output: Output, *, first: str, second: str | None, revision: str | None, **arguments: Any) -> None:
    """Compute every tensor of DST again from SRC, and compare bits.

    The kernels that made DST are not used. Without SRC, compare the hashes of DST's files with those in its
    gemma4_moe.json.
    """
    from gemma4_moe.cli import report
    from gemma4_moe.cli.progress import shown_progress
    from gemma4_moe.verifier import verify

    with shown_progress(output.talk, "verifying") as progress:
        if second is None:
            alone = verify.verify(first, revision=revision, progress=progress, **arguments)
            shown, wrong, notes = report.recheck(alone), len(alone.wrong), alone.notes
        else:
            found = verify.verify(first, second, revision=revision, progress=progress, **arguments)
            shown, wrong, notes = report.verification(found), len(found.different), found.notes
    output.say(*(f"note: {note}" for note in notes))
    _judge(output, shown, wrong)


@cli.command(examples=["gemma4-moe diff gemma-4-26B-A4B gemma-4-hf"])
@options.argument(
    "first", "A", f"The checkpoint that says what should be: {options.CHECKPOINT}", type=options.Checkpoint()
)
@options.argument("second", "B", "The checkpoint to judge, likewise.", type=options.Checkpoint())
@options.stream
@options.common
def diff(output: Output, *, first: str, second: str, stream: bool) -> None:
    """Compare two checkpoints of one layout, tensor by tensor.

    Spellings of names and the cut into files may differ. Files other than weights are not compared. A and B may also be
    two LoRA adapters of one form.
    """
    from gemma4_moe.cli import report
    from gemma4_moe.cli.progress import shown_progress
    from gemma4_moe.verifier import diff

    with shown_progress(output.talk, "comparing") as progress:
        found = diff.diff(first, second, stream=stream, progress=progress)
    _judge(output, report.verification(found), len(found.different))


@cli.command(examples=["gemma4-moe clean gemma-4-nemo"])
@options.argument("target", "DST", "The directory that an interrupted convert was to make.", type=options.Directory())
@options.break_lock
@options.common
def clean(output: Output, *, target: Path, break_lock: bool) -> None:
    """Remove the files of an interrupted conversion to DST.

    They are in a hidden directory next to DST. A conversion that was interrupted after its last write is finished.
    """
    from gemma4_moe.cli import report
    from gemma4_moe.target import recovery

    output.give(report.remains(recovery.clean(target, break_lock=break_lock)), is_faultless=True)


@cli.command(examples=["gemma4-moe demo"])
@options.argument(
    "directory",
    "[DIR]",
    "A new or empty directory that keeps the demo's checkpoints. By default a temporary one.",
    required=False,
    type=options.Directory(),
)
@options.common
def demo(output: Output, *, directory: Path | None) -> None:
    """Convert a small random model both ways, and check each step.

    Needs the extra `demo`: torch, and transformers, which builds the model and judges the result.
    """
    from gemma4_moe.cli import report
    from gemma4_moe.demo.demo import run_demo

    run_demo(
        directory,
        show=lambda checks: output.give(report.checks(checks), is_faultless=all(check.passed for check in checks)),
    )


cli.add_command(lora_commands.lora)
cli.add_command(lora_commands.merge)
cli.add_command(publish_command.publish)


def _judge(output: Output, shown: Report, wrong: int) -> None:
    output.give(shown, is_faultless=not wrong)
    if wrong:
        click.get_current_context().exit(DifferenceError.exit_status)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process with its exit status. Of several ranks, only the first prints."""
    terminate_by_exception()
    if launched_as_one_of_several() and os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None or sys.stderr is None:  # started with a closed descriptor
        sys.exit(StorageError.exit_status)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal can't encode is still shown
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--format=json" in given or ("--format", "json") in pairwise(given)
    status = status_of(lambda: cli.main(given, prog_name="gemma4-moe", standalone_mode=False), as_json=as_json)
    if arguments is None:
        end(status)
    sys.exit(status)  # the process is the caller's
