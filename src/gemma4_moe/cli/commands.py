"""The command `gemma4-moe`: stdout is data, stderr is talk, and the exit status says what kind of failure it was."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gemma4_moe.cli.options import Output, Size, common
from gemma4_moe.distributed.ranks import launched_as_one_of_several
from gemma4_moe.errors import DifferenceError, Gemma4MoEError, StorageError, command_line
from gemma4_moe.layout.table import Layout
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

#: Exit statuses beside those of the errors.
_INTERRUPTED = 130
_TERMINATED = 143
_CLOSED_PIPE = 141


class _Terminated(BaseException):
    """SIGTERM has come."""


_source = click.argument("source", metavar="SRC")
_revision = click.option("--revision", help="Branch, tag or commit, where SRC is a Hub id.")
_to = click.option(
    "--to", type=click.Choice([layout.value for layout in Layout]), help="The layout to make; the other one by default."
)
_dtype = click.option(
    "--dtype",
    type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
    default="keep",
    show_default=True,
    help="Dtype of every floating-point tensor.",
)
_shard_size = click.option(
    "--max-shard-size", type=Size(), default="5GB", show_default=True, help="Most bytes in one file."
)
_memory = click.option("--max-memory", type=Size(), default="1GiB", show_default=True, help="Most bytes of buffers.")
_stream = click.option("--stream", is_flag=True, help="Read SRC on the Hub in place, and keep nothing of it.")
_base = click.option(
    "--base", metavar="SRC", help="On the way to hf: the checkpoint that the model was made from, for its own experts."
)
_break_lock = click.option(
    "--break-lock", is_flag=True, help="Take DST from a process that can't be shown to live, on another host."
)

#: Those options of convert that say what is made.
_PLANNED = ("to", "dtype", "max_shard_size", "max_memory", "revision", "stream", "base")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gemma4-moe")
def cli() -> None:
    """Gemma 4 mixture-of-experts checkpoints between the Hugging Face (hf) and NeMo (nemo) layouts.

    SRC is a directory of safetensors files, or a model on the Hugging Face Hub such as google/gemma-4-26B-A4B.

    Exit status: 0 fine, 2 usage, 3 bad input, 4 differs, 5 disk or permission, 6 target busy, 130 or 143 interrupted.
    """


@cli.command()
@_source
@_revision
@common
def inspect(output: Output, *, source: str, revision: str | None) -> None:
    """Say what a checkpoint is: layout, tensors, bytes, and what is wrong with it."""
    from gemma4_moe.cli import report
    from gemma4_moe.converter import inspect
    from gemma4_moe.target.recovery import heal

    heal(Path(source))
    found = inspect.inspect(source, revision=revision)
    output.give(found, report.inspection_json, report.print_inspection)


@cli.command()
@_source
@_to
@_dtype
@_shard_size
@_memory
@click.option("--mesh", metavar="DIM=RANKS,...", help="Say what each rank of a mesh would hold: ep_shard=2,ep=8.")
@_revision
@_stream
@_base
@common
def plan(output: Output, *, source: str, mesh: str | None, **options: Any) -> None:
    """Say what convert would do: files, bytes, space, memory. Reads headers alone."""
    if mesh is None:
        _preview(output, source, None, options)
    else:
        _predict(output, source, mesh, options)


@cli.command()
@_source
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@_to
@_dtype
@_shard_size
@_memory
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads of the kernel; by default, this rank's share of the cores."
)
@click.option("--buffered", is_flag=True, help="Go through the page cache, even where direct I/O works.")
@click.option("--no-read-back", is_flag=True, help="Don't read the files back before DST appears.")
@click.option("--sha256", is_flag=True, help="Put the SHA-256 of each file into the manifest too.")
@click.option("--overwrite", is_flag=True, help="Replace DST, if it is a checkpoint and nothing else.")
@click.option("--resume", is_flag=True, help="Go on with an earlier run to DST, if there is one.")
@_break_lock
@click.option("--dry-run", is_flag=True, help="Write nothing; print the plan.")
@_revision
@_stream
@_base
@common
def convert(output: Output, *, source: str, target: Path, dry_run: bool, no_read_back: bool, **options: Any) -> None:
    """Convert SRC into the new directory DST. Under torchrun, all ranks work on it together."""
    from gemma4_moe.cli import report
    from gemma4_moe.cli.progress import Talk, saying_what_stays
    from gemma4_moe.converter import convert
    from gemma4_moe.distributed.ranks import under_torchrun
    from gemma4_moe.target.preconditions import check_target

    if dry_run:
        check_target(target, Path(source), overwrite=options["overwrite"])
        _preview(output, source, target, {name: options[name] for name in _PLANNED})
        return
    with under_torchrun(), saying_what_stays(output.say, target), Talk(output.talk, "converting") as progress:
        done = convert.convert(source, target, read_back=not no_read_back, progress=progress, **options)
    output.say(*(f"note: {note}" for note in done.notes))
    if done.left_behind:
        output.say(f"left behind: {', '.join(done.left_behind)}")
    output.give(done, report.conversion_json, report.print_conversion)
    revision = [] if options["revision"] is None else ["--revision", options["revision"]]
    compared = [str(target)] if options["stream"] else [*revision, source, str(target)]
    output.say(f"next: {command_line('gemma4-moe', 'verify', *compared)}")


@cli.command()
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@_break_lock
@common
def clean(output: Output, *, target: Path, break_lock: bool) -> None:
    """Remove what an unfinished conversion to DST has left beside it. DST itself stays as it is."""
    from gemma4_moe.cli import report
    from gemma4_moe.target import recovery

    output.give(recovery.clean(target, break_lock=break_lock), report.remains_json, report.print_remains)


@cli.command()
@click.argument("source", metavar="[SRC]")
@click.argument("target", metavar="DST", required=False, type=click.Path(path_type=Path))
@_revision
@common
def verify(output: Output, *, source: str, target: Path | None, revision: str | None) -> None:
    """Recompute every tensor of DST from SRC and compare bits. Without SRC, check DST against its manifest."""
    from gemma4_moe.cli import report
    from gemma4_moe.cli.progress import Talk
    from gemma4_moe.hub.source import locate
    from gemma4_moe.target.manifest import check_manifest
    from gemma4_moe.target.recovery import heal
    from gemma4_moe.verifier import verify

    heal(Path(source) if target is None else target)
    with Talk(output.talk, "verifying") as progress:
        if target is not None:
            _compare(output, verify.verify(locate(source, revision), target, progress=progress))
            return
        found = check_manifest(Path(source), progress=progress)
    output.give(found, report.recheck_json, report.print_recheck)
    if found.wrong:
        click.get_current_context().exit(DifferenceError.exit_status)


@cli.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@common
def diff(output: Output, *, first: Path, second: Path) -> None:
    """Compare two checkpoints of the same layout, tensor by tensor."""
    from gemma4_moe.cli.progress import Talk
    from gemma4_moe.target.recovery import heal
    from gemma4_moe.verifier import diff

    heal(first)
    heal(second)
    with Talk(output.talk, "comparing") as progress:
        found = diff.diff(first, second, progress=progress)
    _compare(output, found)


@cli.command()
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@common
def demo(output: Output, *, directory: Path | None) -> None:
    """Convert a small random model there and back, and check every step. Needs the extra `demo`."""
    from gemma4_moe.demo import demo as demonstration

    demonstration.run_demo(directory, console=output.data)


def _preview(output: Output, source: str, target: Path | None, options: dict[str, Any]) -> None:
    from gemma4_moe.cli import report
    from gemma4_moe.converter import preview

    found = preview.plan(source, target, **options)
    output.give(found, report.preview_json, report.print_preview)
    space = found.space
    if space.missing_bytes:
        cached = ", and for SRC in the Hub's cache" if space.cache_bytes else ""
        output.say(f"note: {space.missing_bytes:,} bytes of space are missing for the target{cached}")
    if space.missing_without_cache < space.missing_bytes:
        rest = (
            f"{space.missing_without_cache:,} bytes are missing" if space.missing_without_cache else "the target fits"
        )
        output.say(f"note: with --stream, convert keeps nothing of SRC on this machine, and {rest}")


def _predict(output: Output, source: str, mesh: str, options: dict[str, Any]) -> None:
    from gemma4_moe.cli import report
    from gemma4_moe.converter import mesh_preview, preview

    ranks = mesh_preview.parse_mesh(mesh)
    prediction = mesh_preview.predict(preview.plan(source, **options).plan, ranks)
    output.give(prediction, report.prediction_json, report.print_prediction)


def _compare(output: Output, found: Any) -> None:
    from gemma4_moe.cli import report

    output.give(found, report.verification_json, report.print_verification)
    if found.different:
        click.get_current_context().exit(DifferenceError.exit_status)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status. Of several ranks, only the first speaks."""
    signal.signal(signal.SIGTERM, _terminate)
    if launched_as_one_of_several() and os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None or sys.stderr is None:  # started with a closed descriptor
        sys.exit(StorageError.exit_status)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal can't encode is still shown
    sys.exit(_status(arguments))


def _status(arguments: Sequence[str] | None) -> int:
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        status = cli.main(given, prog_name="gemma4-moe", standalone_mode=False, obj=given)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Gemma4MoEError as error:
        click.echo(f"gemma4-moe: error: {error}", err=True)
        return error.exit_status
    except (KeyboardInterrupt, click.Abort):
        click.echo("gemma4-moe: interrupted", err=True)
        return _INTERRUPTED
    except _Terminated:
        click.echo("gemma4-moe: terminated", err=True)
        return _TERMINATED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        return _CLOSED_PIPE
    except OSError as error:  # what goes to stdout can't be written, or a path can't even be looked at
        click.echo(f"gemma4-moe: error: {error}", err=True)
        return StorageError.exit_status
    return status or 0
