"""Every error that this package raises on purpose, with its exit status and the next step.

A message has one line that says what is wrong, then one line for each fact that is known: the tensor, the file, what
was expected, what was found, and what to do next. Names that come from a checkpoint are made printable first, so that
no file can send control sequences to a terminal.
"""

from __future__ import annotations

import shlex
from typing import Any, ClassVar


def printable(text: str) -> str:
    """Return `text` with every character that a terminal might obey, or can't show, as a backslash escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def command_line(*words: object) -> str:
    """Return a command as a hint shows it: a shell takes it as it is, whatever is in a path."""
    return shlex.join(map(str, words))


class Gemma4MoEError(Exception):
    """The root of the tree.

    Attributes:
        problem: One sentence that says what is wrong.
        facts: Label and value of each known fact, in the order in which they are shown.
        hint: What to do next: the raiser's own word, or else the class's, or None where neither has one.
        exit_status: The status with which the command line ends.
    """

    exit_status: ClassVar[int] = 1
    _usual_hint: ClassVar[str | None] = None

    def __init__(
        self,
        problem: str,
        *,
        tensor: str | None = None,
        file: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.problem = printable(problem)
        labelled = {"tensor": tensor, "file": file, "expected": expected, "found": found}
        self.facts = {label: printable(str(value)) for label, value in labelled.items() if value is not None}
        hint = self._usual_hint if hint is None else hint
        self.hint = None if hint is None else printable(hint)
        super().__init__(self.problem)

    def __str__(self) -> str:
        lines = [self.problem, *(f"  {label}: {value}" for label, value in self.facts.items())]
        if self.hint is not None:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)


class UsageError(Gemma4MoEError):
    """What was asked for can't be done as asked: the target exists, an argument has no meaning."""

    exit_status = 2
    _usual_hint = "call again with what is expected"


class InputError(Gemma4MoEError, ValueError):
    """What was given is not a Gemma 4 MoE checkpoint or state dict that we understand."""

    exit_status = 3


class UnknownTensorError(InputError):
    """A name in a place that belongs to the experts or the router, but not one of the layout's names."""


class TensorShapeError(InputError):
    """A tensor whose shape or dtype is not the one that its name promises."""

    _usual_hint = "give a tensor of the shape and dtype that are expected"


class DuplicateTensorError(InputError):
    """Two entries that name the same tensor, in one spelling or in two."""

    _usual_hint = "give each tensor once: remove all but one"


class IncompleteExpertsError(InputError, RuntimeError):
    """A layer that lacks one of the tensors that only together make its experts."""


class UnsupportedCheckpointError(InputError):
    """A known form that this package recognises and does not convert.

    Attributes:
        form: What the form is called, or None where it has no name.
    """

    def __init__(self, problem: str, *, form: str | None = None, **facts: Any) -> None:
        self.form = form
        super().__init__(problem, **facts)


class CheckpointFormatError(InputError):
    """A file or directory that breaks the rules of safetensors or of its index."""

    _usual_hint = "get the file again, or save it again with the safetensors library"


class ConfigError(InputError):
    """A config.json that is missing, senseless, or at odds with the tensors."""


class SourceChangedError(InputError):
    """A source file that changed while it was read."""


class DifferenceError(Gemma4MoEError):
    """Two checkpoints that should be equal are not."""

    exit_status = 4


class StorageError(Gemma4MoEError, OSError):
    """The disk or its permissions refused: no space, no right, an input or output error."""

    exit_status = 5
    _usual_hint = "check the disk, the path and its permissions, then call again"


class TargetBusyError(Gemma4MoEError):
    """Another process is writing the same target."""

    exit_status = 6


class ParallelError(Gemma4MoEError, RuntimeError):
    """Ranks that disagree, a mesh or placement that we don't know, or a collective that failed."""
