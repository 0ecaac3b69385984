"""The arguments and options that several commands have, and the output of a command's data and messages."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.cli.help import Argument
from gemma4_moe.errors import Gemma4MoEError, UsageError, printable
from gemma4_moe.layout.table import Layout
from gemma4_moe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from gemma4_moe.cli.report import Report

#: Columns of a table that goes into a pipe or a file: wide enough that no name is cut.
_PIPE_WIDTH = 200

#: The smallest size that is taken, in bytes: a smaller one has lost its unit.
_LEAST_SIZE = 10**6


class Size(click.ParamType[int]):
    """A size in bytes: 5GB, 512MiB, 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the size in bytes, or fail as click does."""
        try:
            size = parse_size(value)
        except UsageError as error:
            self.fail(f"{error.facts.get('found')}: {error.problem}; {error.facts.get('expected')}", param, ctx)
        if size < _LEAST_SIZE:
            self.fail(f"{value!r} is {size:,} bytes: less than 1 MB; write a unit, such as 5GB or 512MiB", param, ctx)
        return size


class _Completed:
    """A type of parameter of which a shell completes directories."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Return what a shell is told to complete."""
        return [CompletionItem(incomplete, type="dir")]


class Checkpoint(_Completed, click.ParamType[str]):
    """A directory, or the id of a model on the Hub; a leading `~` is replaced by the home directory."""

    name = "checkpoint"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ARG002
        """Return the text, with `~` replaced."""
        text = os.fsdecode(value)
        return str(expanded(text)) if text.startswith("~") else text


class Directory(_Completed, click.Path):
    """A path of a directory; a leading `~` is replaced by the home directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        return expanded(os.fsdecode(super().convert(value, param, ctx)))


CHECKPOINT = (
    "a directory of safetensors files with their config.json, or the id of a model on the Hugging Face Hub, such as "
    "google/gemma-4-26B-A4B (needs the extra `hub`)."
)


def argument(name: str, metavar: str, explanation: str, **more: Any) -> Callable[[Any], Any]:
    """Return the decorator that adds an argument."""
    return click.argument(name, metavar=metavar, cls=Argument, explanation=explanation, **more)


target = argument(
    "target",
    "DST",
    "The directory to make. It must not exist yet, or be empty; its parent must exist. After a failure it is as it was "
    "before.",
    type=Directory(),
)
source = argument("source", "SRC", f"The checkpoint to read: {CHECKPOINT}", type=Checkpoint())
revision = click.option("--revision", help="Branch, tag or commit of the model to read, if it is a Hub id.")
to = click.option(
    "--to",
    type=click.Choice([layout.value for layout in Layout]),
    help="Layout of DST. By default the one that SRC is not in.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
    default="keep",
    show_default=True,
    help="Dtype of every floating-point tensor of DST.",
)
shard_size = click.option(
    "--max-shard-size", type=Size(), default="5GB", show_default=True, help="Most bytes of tensors in a file of DST."
)
memory = click.option(
    "--max-memory", type=Size(), default="1GiB", show_default=True, help="Most bytes of buffers of each process."
)
stream = click.option(
    "--stream", is_flag=True, help="Read models on the Hub directly, without a copy in the Hub's cache."
)
base = click.option(
    "--base",
    metavar="CHECKPOINT",
    type=Checkpoint(),
    help="The published hf checkpoint that SRC was trained from, a directory or a Hub id. Experts that training left "
    "unchanged get its weights and scales back, bit for bit. DST is in the hf layout, SRC in either.",
)
strip_wrappers = click.option(
    "--strip-wrappers",
    is_flag=True,
    help="Remove what torch.compile, DDP, FSDP or PEFT added to the names of tensors in SRC, and doubled prefixes.",
)
scale = click.option(
    "--scale",
    type=click.Choice(["ones"]),
    help="For an hf SRC without per_expert_scale, whose weights have it folded in: each scale is one.",
)
scale_from = click.option(
    "--scale-from",
    metavar="CHECKPOINT",
    type=Checkpoint(),
    help="For an hf SRC that has lost per_expert_scale: the hf checkpoint that has it, a directory or a Hub id.",
)
_workers = click.option(
    "--workers", type=click.IntRange(min=1), help="Threads that convert. By default this process's share of the cores."
)
_buffered = click.option(
    "--buffered", is_flag=True, help="Read and write through the page cache: quicker on some disks."
)
_no_read_back = click.option(
    "--no-read-back", is_flag=True, help="Don't read the files back from the disk before DST appears."
)
_sha256 = click.option("--sha256", is_flag=True, help="Also write the SHA-256 of each file into gemma4_moe.json.")
_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace DST if it is a checkpoint directory and holds nothing else."
)
_resume = click.option("--resume", is_flag=True, help="Resume an interrupted run to DST, if there is one.")
config_from = click.option(
    "--config-from",
    metavar="CHECKPOINT",
    type=Checkpoint(),
    help="For a SRC without config.json, or with another one than DST should have: the checkpoint, a directory or a "
    "Hub id, whose config.json is used and copied.",
)
break_lock = click.option(
    "--break-lock", is_flag=True, help="Take DST from a process on another host, which must no longer run."
)


_dry_run = click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")


def writing(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the commands that write a checkpoint block by block."""
    own = (dtype, shard_size, memory, _workers, _buffered, _no_read_back, _sha256, _overwrite, _resume, break_lock)
    for option in reversed((*own, _dry_run, revision, stream)):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Output:
    """The places of a command's data (stdout) and its messages (stderr).

    With --quiet `talk` prints nothing, and results without a fault are not printed; `warnings` always are.
    """

    data: Console
    talk: Console
    warnings: Console
    as_json: bool

    def give(self, report: Report, *, is_faultless: bool = False) -> None:
        """Print data. With --quiet, a result that is faultless is printed only as JSON."""
        if self.as_json:
            click.echo(json.dumps(report.data, indent=1, ensure_ascii=True))
        elif not (self.talk.quiet and is_faultless):
            for line in report.lines:
                self.data.print(line)

    def say(self, *lines: str) -> None:
        """Print messages on stderr, unless --quiet is given."""
        _print_lines(self.talk, lines)

    def warn(self, *lines: str) -> None:
        """Print messages on stderr."""
        _print_lines(self.warnings, lines)


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    if lines:
        console.print("\n".join(map(printable, lines)), markup=False, highlight=False, soft_wrap=True)


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has, and pass them to it as one `Output`."""

    @click.option("--format", type=click.Choice(["human", "json"]), default="human", help="Format of stdout.")
    @click.option(
        "-q", "--quiet", is_flag=True, help="Print nothing where all is well, but for data that was asked for."
    )
    @click.option("-v", "--verbose", is_flag=True, help="Also print where in the program an error was raised.")
    @wraps(command)
    def run(*, format: str, quiet: bool, verbose: bool, **arguments: Any) -> None:  # noqa: A002
        from rich.console import Console

        class Ours(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich's own would end with status 1

        data = Ours() if sys.stdout.isatty() else Ours(width=_PIPE_WIDTH)
        if quiet:  # the Hub's client reads them when it is imported
            os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}
        talk, warnings = Ours(stderr=True, quiet=quiet), Ours(stderr=True)
        try:
            command(Output(data, talk, warnings, format == "json"), **arguments)
        except Gemma4MoEError:
            if verbose:
                traceback.print_exc()
            raise

    return run
