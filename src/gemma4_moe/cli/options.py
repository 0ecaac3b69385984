"""How a command of the command line takes its common options, and where its data and its talk go."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from gemma4_moe.errors import Gemma4MoEError, UsageError
from gemma4_moe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

#: Columns of a table that goes into a pipe or a file: wide enough that no name is cut.
_PIPE_WIDTH = 200


class Size(click.ParamType[int]):
    """A size in bytes: 5GB, 512MiB, 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the size in bytes, or fail as click does."""
        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(f"{error.facts.get('found')}: {error.problem}; {error.facts.get('expected')}", param, ctx)


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command's data and its talk go.

    Attributes:
        data: stdout.
        talk: stderr; quiet if the user wants it so.
        as_json: Whether data is JSON.
    """

    data: Console
    talk: Console
    as_json: bool

    def give(self, result: Any, as_json: Callable[[Any], dict[str, Any]], as_text: Callable[..., None]) -> None:
        """Print a result as data."""
        if self.as_json:
            click.echo(json.dumps(as_json(result), indent=1, ensure_ascii=True))
        else:
            as_text(self.data, result)

    def say(self, *lines: str) -> None:
        """Print lines as talk."""
        from gemma4_moe.cli.report import sentences

        if lines:
            self.talk.print(sentences(lines), markup=False, highlight=False, soft_wrap=True)


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has, and hand them over as one `Output`."""

    def run(*, format: str, quiet: bool, verbose: bool, **arguments: Any) -> None:  # noqa: A002
        from rich.console import Console

        class Ours(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich's own would end with status 1

        data = Ours() if sys.stdout.isatty() else Ours(width=_PIPE_WIDTH)
        output = Output(data, Ours(stderr=True, quiet=quiet), format == "json")
        try:
            command(output, **arguments)
        except Gemma4MoEError:
            if verbose:
                traceback.print_exc()
            raise

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Show where an error came from."),
        click.option("-q", "--quiet", is_flag=True, help="No talk on stderr, only errors."),
        click.option("--format", type=click.Choice(["human", "json"]), default="human", help="How stdout is written."),
    ):
        run = option(run)
    return run
