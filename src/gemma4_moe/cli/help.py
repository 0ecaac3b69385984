"""How `--help` looks: examples to type first, then the text, the arguments, the options and the exit statuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gemma4_moe.cli.exit_statuses import EXIT_STATUSES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Command(click.Command):
    """A command whose help begins with examples and explains each argument."""

    def __init__(
        self, *given: Any, examples: Sequence[str] = (), arguments: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        """Make the command.

        Args:
            *given: See `click.Command`.
            examples: Commands to type, complete and true.
            arguments: The explanation of each argument, by its name in the usage line.
            **more: See `click.Command`.
        """
        super().__init__(*given, **more)
        self.examples = examples
        self.arguments = arguments or {}

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, the text and the arguments."""
        _write_examples(self.examples, formatter)
        super().format_help_text(ctx, formatter)
        if self.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(list(self.arguments.items()))


class Group(click.Group):
    """The whole command: its help lists commands in the order of their use, and the exit statuses."""

    command_class = Command

    def __init__(self, *given: Any, examples: Sequence[str] = (), **more: Any) -> None:
        """Make the group; `examples` are those of `Command`."""
        super().__init__(*given, **more)
        self.examples = examples

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the commands' names in the order of their use."""
        return list(self.commands)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and the text."""
        _write_examples(self.examples, formatter)
        super().format_help_text(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the exit statuses."""
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status), meaning) for status, meaning in EXIT_STATUSES.items()])


def _write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    with formatter.section("Examples"), formatter.indentation():
        for example in examples:
            formatter.write(f"  {example}\n")
