"""The look of `--help`: examples to type first, then the text, the arguments, the options and the exit statuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gemma4_moe.cli.exit_statuses import EXIT_STATUSES

if TYPE_CHECKING:
    from collections.abc import Sequence


class Argument(click.Argument):
    """An argument that the help explains."""

    def __init__(self, *given: Any, explanation: str, **more: Any) -> None:
        super().__init__(*given, **more)
        self.explanation = explanation


class Command(click.Command):
    """A command whose help begins with examples, complete and true, and explains each argument."""

    def __init__(self, *given: Any, examples: Sequence[str] = (), **more: Any) -> None:
        super().__init__(*given, **more)
        self.examples = examples

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, the text and the arguments."""
        with formatter.section("Examples"), formatter.indentation():
            for example in self.examples:
                formatter.write(f"  {example}\n")
        super().format_help_text(ctx, formatter)
        arguments = [(str(a.metavar).strip("[]"), a.explanation) for a in self.params if isinstance(a, Argument)]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)


class Group(Command, click.Group):
    """The whole command: its help lists commands in the order of their use, and the exit statuses."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the commands' names in the order of their use."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the exit statuses."""
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status), meaning) for status, meaning in EXIT_STATUSES.items()])
