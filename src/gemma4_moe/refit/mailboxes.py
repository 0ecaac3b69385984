"""Messages between the sender and one receiver of a pass, through a key-value store and within a time limit.

A receiver opens a pass by writing a token, which replaces an older one. All keys of the pass have the token in their
names, so messages of a pass that has ended are never read. Each message is deleted by its reader.
"""

from __future__ import annotations

import json
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from gemma4_moe.refit import endings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.distributed_c10d import Store


class Message(NamedTuple):
    """A message; `json` can write its content."""

    kind: str  # of the receiver: ready, done; of the sender: open, bucket, go, end, over; of both: failed
    content: Any


class Mailbox:
    """One side's messages to and from the other side, in their order."""

    def __init__(self, store: Store, own: str, other: str, timeout: float) -> None:
        self._store = store
        self._own = own
        self._other = other
        self._timeout = timeout
        self._sent = 0
        self._read = 0

    def put(self, kind: str, content: Any = None) -> None:
        """Leave a message, unless the store is gone: the next wait says so."""
        with suppress(dist.DistError):
            self._store.set(f"to {self._other}/{self._sent}", json.dumps([kind, content]))
        self._sent += 1

    def get(self, action: str, bucket: str | None = None) -> Message:
        """Return the other side's next message.

        Raises:
            ParallelError: The other side has ended the pass; or has sent nothing within the time limit.
        """
        try:
            return self._next(action, bucket)
        except dist.DistError as error:
            raise endings.lost("the process that holds the store", bucket) from error

    def get_last(self, action: str) -> None:
        """Wait until the other side has ended the pass, and raise its error."""
        with suppress(dist.DistError):  # a process that holds the store may end with its last message
            self._next(action, None)

    def _next(self, action: str, bucket: str | None) -> Message:
        text = _taken(self._store, f"to {self._own}/{self._read}", self._timeout, self._other, action, bucket)
        self._read += 1
        message = Message(*json.loads(text))
        if message.kind == "failed":
            raise endings.told(self._other, message.content, bucket)
        return message


class Passes:
    """All passes from one sender to one receiver."""

    def __init__(self, store: Store, sender: str, receiver: str, timeout: float) -> None:
        self._store = store
        self._sender = sender
        self._receiver = receiver
        self._timeout = timeout

    def wait_for_receiver(self) -> str:
        """Return the token of the pass that the receiver has opened."""
        try:
            return _taken(self._store, "opened", self._timeout, self._receiver, "call `receive`", None)
        except dist.DistError as error:
            raise endings.lost("the process that holds the store", None) from error

    def open(self, token: str) -> Mailbox:
        """Return the sender's mailbox of a pass, and tell the receiver that it begins."""
        mailbox = Mailbox(PrefixStore(token, self._store), self._sender, self._receiver, self._timeout)
        mailbox.put("open")
        return mailbox

    @contextmanager
    def opened(self) -> Iterator[Mailbox]:
        """Open a pass for a `with` block of the receiver, and give it its mailbox once the sender has come."""
        token = uuid.uuid4().hex
        self._store.set("opened", token)
        mailbox = Mailbox(PrefixStore(token, self._store), self._receiver, self._sender, self._timeout)
        try:
            mailbox.get("call `send`")
        except BaseException as error:
            self._store.delete_key("opened")  # or the next sender would wait for a pass that has ended
            mailbox.put("failed", endings.text_of(error))
            raise
        yield mailbox


def passes_between(sender: int, receiver: int, timeout: float) -> Passes:
    """Return the passes from one rank of the default process group to another, through its store."""
    store = PrefixStore(f"gemma4_moe/refit/{sender}/{receiver}", _get_default_store())
    return Passes(store, f"the sender, rank {sender},", f"the receiver, rank {receiver},", timeout)


def _taken(store: Store, key: str, timeout: float, other: str, action: str, bucket: str | None) -> str:
    """Return the value of a key once it is there, and delete it. A DistError says that the store is gone."""
    try:
        store.wait([key], timedelta(seconds=timeout))
        value: str = store.get(key).decode()
        store.delete_key(key)
    except dist.DistStoreError as error:
        raise endings.waited(other, action, bucket, timeout) from error
    return value
