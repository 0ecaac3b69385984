"""The error tree: what a person reads, what a shell gets, and that no checkpoint can write to the terminal."""

import copy
import pickle
import subprocess
from pathlib import Path

import pytest

from gemma4_moe import errors
from gemma4_moe.errors import Gemma4MoEError, InputError, UnsupportedCheckpointError, command_line, printable

#: Every error and the status with which the command ends.
EXIT_STATUS = {
    "UsageError": 2, "UnfinishedRunError": 2, "DifferenceError": 4, "StorageError": 5, "TargetBusyError": 6,
    "ParallelError": 1,
    **dict.fromkeys(
        ("InputError", "UnknownTensorError", "TensorShapeError", "DuplicateTensorError", "IncompleteExpertsError",
         "UnsupportedCheckpointError", "CheckpointFormatError", "ConfigError", "SourceChangedError"), 3,
    ),
}  # fmt: skip

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Gemma4MoEError)]
EVERY_ERROR = [value for value in CLASSES if value is not Gemma4MoEError]

#: Errors whose every meaning has one next step, so that who raises them need not name it.
WITH_A_USUAL_HINT = {
    "UsageError", "UnfinishedRunError", "TensorShapeError", "DuplicateTensorError", "CheckpointFormatError",
    "StorageError",
}  # fmt: skip


def test_every_error_has_its_exit_status():
    assert {error.__name__: error.exit_status for error in EVERY_ERROR} == EXIT_STATUS
    assert Gemma4MoEError.exit_status == 1


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_every_error_has_its_usual_hint_unless_told_another_and_is_a_value_error_if_input(
    error,
):
    assert (error("it is wrong", hint=None).hint is not None) == (error.__name__ in WITH_A_USUAL_HINT)
    assert error("it is wrong", hint="do this").hint == "do this"
    assert issubclass(error, ValueError) == (error.exit_status == 3) == issubclass(error, InputError)


def test_errors_are_what_callers_of_a_framework_or_the_system_catch():
    assert issubclass(errors.IncompleteExpertsError, RuntimeError)
    assert issubclass(errors.StorageError, OSError)


def test_the_text_has_the_problem_then_each_fact_then_the_next_step():
    error = InputError("it is wrong", hint="do this", found=2, expected=1, file="a.safetensors", tensor="w")
    assert str(error).splitlines() == [
        "it is wrong",
        "  tensor: w",
        "  file: a.safetensors",
        "  expected: 1",
        "  found: 2",
        "  next: do this",
    ]
    assert list(error.facts) == ["tensor", "file", "expected", "found"]


def test_a_command_in_a_hint_is_one_that_a_shell_takes():
    assert command_line("gemma4-moe", "clean", Path("a/nemo")) == "gemma4-moe clean a/nemo"
    path = "a b/it's $HOME; `rm`"
    assert subprocess.check_output(["sh", "-c", command_line("printf", "%s", path)], text=True) == path


def test_facts_that_are_not_known_are_not_shown():
    assert str(InputError("it is wrong")) == "it is wrong"
    assert InputError("it is wrong", found=0).facts == {"found": "0"}
    assert str(InputError("it is wrong", expected="", hint="")) == "it is wrong\n  expected: \n  next: "


def test_a_form_without_a_name_is_none():
    assert UnsupportedCheckpointError("refused").form is None
    assert UnsupportedCheckpointError("refused", form="MLX", tensor="w").form == "MLX"


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_errors_survive_the_way_between_processes(kind):
    error = kind("it is wrong", tensor="w", expected=1, hint="do this")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.facts == error.facts
        assert again.hint == "do this"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.router.scale", "model.layers.0.router.scale"),
        ("größe 漢字 🙂", "größe 漢字 🙂"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("two\nlines\r\ttab\0nul\x7f", r"two\nlines\r\ttab\x00nul\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202ecba\u2066\u200b\ufeff", r"abc\u202ecba\u2066\u200b\ufeff"),
        ("half \ud800 a pair", r"half \ud800 a pair"),
        ("\U000e0041 tag", r"\U000e0041 tag"),
    ],
)
def test_printable_leaves_words_and_escapes_what_a_terminal_obeys(text, shown):
    assert printable(text) == shown


def test_every_code_point_becomes_something_that_any_terminal_takes():
    shown = printable("".join(map(chr, range(0x110000))))
    assert shown.isprintable()
    shown.encode()


def test_no_part_of_a_message_carries_a_control_sequence():
    evil = "\x1b]0;owned\x07\n  next: rm -rf"
    error = UnsupportedCheckpointError(evil, tensor=evil, file=evil, expected=evil, found=evil, hint=evil)
    lines = str(error).splitlines()
    assert len(lines) == 6
    assert all(line.isprintable() for line in lines)
    assert error.args == (printable(evil),)
