"""The words with which both sides of a transport end a pass that did not arrive."""

from __future__ import annotations

from gemma4_moe.errors import ParallelError

#: How long each side waits for the other, in seconds, unless `timeout` says otherwise.
TIMEOUT_SECONDS = 300.0

#: The most characters of the other side's error that are sent.
_LONGEST_TEXT = 2000


def waited(other: str, action: str, bucket: str | None, seconds: float) -> ParallelError:
    """Return the error of a side that has waited `seconds` for the `other` to do something at a bucket."""
    return ParallelError(
        f"{other} did not {action} within {seconds:g} s",
        expected=None if bucket is None else f"an answer at the bucket that starts with {bucket}",
        hint="read the other side's log; then start a new pass on both sides, or raise timeout first",
    )


def lost(other: str, bucket: str | None) -> ParallelError:
    """Return the error of a side whose peer has closed the connection, or died."""
    return ParallelError(
        f"{other} has closed the connection, or was killed",
        found=None if bucket is None else f"at the bucket that starts with {bucket}",
        hint="read the other side's log, start its process again, and go on with a new connection",
    )


def told(other: str, text: str, bucket: str | None) -> ParallelError:
    """Return the error of a side that was told of the other's failure."""
    return ParallelError(
        f"{other} ended the pass",
        expected=None if bucket is None else f"an answer at the bucket that starts with {bucket}",
        found=text.replace("\n", ";"),
        hint="mend the cause, then start a new pass on both sides",
    )


def text_of(error: BaseException) -> str:
    """Return an error as the text for the other side."""
    return f"{type(error).__name__}: {error}"[:_LONGEST_TEXT]


#: The text for the sender if the consumer stops before the last tensor without an error.
ABANDONED = "the pass was abandoned before its last tensor"
