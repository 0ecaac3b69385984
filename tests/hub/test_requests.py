"""Requests to the Hub: what is taken of an answer, what is asked again, and what each refusal is called."""

import errno
import os
import re
import sys
import time

import huggingface_hub
import pytest
from huggingface_hub import errors

from gemma4_moe import inspect
from gemma4_moe.errors import CheckpointFormatError, InputError, StorageError, UsageError
from gemma4_moe.hub.remote import RemoteFile, open_on_hub
from gemma4_moe.hub.requests import read_range, read_small, refusals
from gemma4_moe.hub.source import locate
from support.hub_server import COMMIT, FILE_PATH, serving

MODEL = "google/small-gemma"
WEIGHTS = "model-00001-of-00002.safetensors"


@pytest.fixture
def slept(monkeypatch):
    """How long each pause between two attempts was to be; none is made."""
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture
def hub(source, slept, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    with serving(MODEL, source) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + FILE_PATH)
        yield hub
        huggingface_hub.close_session()


def url_of(hub, name=WEIGHTS):
    return f"{hub.url}/{MODEL}/resolve/{COMMIT}/{name}"


def read(hub, first=100, count=57):
    buffer = bytearray(count)
    size = read_range(url_of(hub), first, memoryview(buffer), file=WEIGHTS)
    assert size == (hub.directory / WEIGHTS).stat().st_size
    return bytes(buffer)


def read_config(hub, most=1000):
    return read_small(url_of(hub, "config.json"), most, file="it")


def require_the_files_bytes(hub):
    assert read(hub) == (hub.directory / WEIGHTS).read_bytes()[100:157]


def test_a_range_is_the_file_s_bytes(hub):
    require_the_files_bytes(hub)
    assert hub.requests == [(WEIGHTS, "bytes=100-156")]


@pytest.mark.parametrize("failures", [1, 5])
def test_an_answer_that_breaks_off_is_asked_for_again(failures, hub):
    hub.broken = failures
    require_the_files_bytes(hub)
    assert len(hub.requests) == failures + 1
    hub.broken = failures
    assert read_config(hub) == (hub.directory / "config.json").read_bytes()


def test_a_server_that_says_nothing_is_left_in_time(hub):
    hub.stalled = 1
    start = time.monotonic()
    require_the_files_bytes(hub)
    assert 0.5 <= time.monotonic() - start < 2


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(status, hub):
    hub.answers = [(status, {"Retry-After": "1"})] * 2
    require_the_files_bytes(hub)


@pytest.mark.parametrize(
    ("trouble", "words", "requests"),
    [({"broken": 100}, "the Hub can't be read: ", 6), ({"answers": [(429, {})] * 100}, r"can't be read: .*429", 0)],
    ids=["it breaks off", "it is busy"],
)
def test_trouble_without_end_is_told(trouble, words, requests, hub):
    vars(hub).update(trouble)
    with pytest.raises(StorageError, match=words):
        read(hub)
    assert len(hub.requests) == requests


@pytest.mark.parametrize(
    ("trouble", "found"),
    [
        ({"whole": True}, "status 200.*and 0 bytes"),
        ({"cut": True}, ""),
        ({"longer": 2**26}, ""),
        ({"shift": 1}, "bytes 101-157"),
    ],
)
def test_anything_but_the_range_is_not_taken(trouble, found, hub):
    os.truncate(hub.directory / WEIGHTS, 2**26)
    vars(hub).update(trouble)
    buffer = bytearray(b"-" * 100)
    with pytest.raises(StorageError, match="did not answer with the range") as caught:
        read_range(url_of(hub), 100, memoryview(buffer)[:57], file=WEIGHTS)
    assert re.search(found, caught.value.facts["found"])
    assert buffer[57:] == b"-" * 43
    assert hub.served[WEIGHTS] < 100, "the connection is closed before 64 MiB have come"


def test_a_range_beyond_the_end_is_not_taken(hub):
    size = (hub.directory / WEIGHTS).stat().st_size
    with pytest.raises(StorageError, match="did not answer with the range"):
        read(hub, size - 10)


def test_a_server_that_compresses_changes_nothing(hub):
    hub.encodes = True
    require_the_files_bytes(hub)
    assert read_config(hub) == (hub.directory / "config.json").read_bytes()


def test_a_small_file_is_never_a_large_one(hub):
    size = (hub.directory / "config.json").stat().st_size
    assert len(read_config(hub, size)) == size
    with pytest.raises(CheckpointFormatError, match="far larger"):
        read_config(hub, size - 1)


def test_a_header_is_one_request_and_a_long_one_two(hub, monkeypatch):
    size = (hub.directory / WEIGHTS).stat().st_size
    whole = RemoteFile(MODEL, COMMIT, WEIGHTS, size)
    assert len(hub.requests) == 1
    monkeypatch.setattr("gemma4_moe.hub.remote._HEAD", 100)
    in_two = RemoteFile(MODEL, COMMIT, WEIGHTS, size)
    assert [asked for _, asked in hub.requests[1:]] == ["bytes=0-99", f"bytes=100-{whole.header.data_start - 1}"]
    unlisted = RemoteFile(MODEL, COMMIT, WEIGHTS, None)
    assert whole.identity == in_two.identity == unlisted.identity
    assert whole.header == in_two.header == unlisted.header


@pytest.mark.parametrize(
    ("answer", "kind", "words", "hint"),
    [
        ((404, {"X_Error_Code": "RepoNotFound"}), InputError, "no such model on the Hub", "hf auth login"),
        ((404, {"X_Error_Code": "RevisionNotFound"}), InputError, "no such revision", "--revision"),
        ((401, {"X_Error_Code": "RepoNotFound"}), InputError, "no such model on the Hub", "private or gated"),
        ((403, {"X_Error_Code": "GatedRepo"}), InputError, "a gated model", "ask for access"),
        ((401, {"X_Error_Message": "Invalid credentials in Authorization header"}), StorageError, "401", "auth login"),
        ((403, {}), StorageError, "refuses this token: status 403", "hf auth login"),
        ((404, {"X_Error_Code": "EntryNotFound"}), StorageError, "can't be read: ", "connection"),
        ((418, {}), StorageError, "can't be read: .*418", "connection"),
    ],
)
def test_a_refusal_is_told_once_and_in_words(answer, kind, words, hint, hub):
    hub.answers = [answer]
    with pytest.raises(kind, match=words) as caught:
        read_config(hub)
    assert hint in str(caught.value.hint)
    assert hub.answers == hub.requests == []


def test_the_first_request_for_a_model_is_not_tried_again(hub, slept, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="the Hub can't be read"), open_on_hub(MODEL):
        pass
    assert not slept


def test_a_connection_that_does_not_come_about_is_tried_a_few_times(hub, slept):
    with pytest.raises(StorageError, match="the Hub can't be read"):
        read_small("http://127.0.0.1:9/x", 1000, file="it")
    assert slept == [1, 2, 4, 8, 8]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(), "the Hub can't be read: OSError"),
        (OSError("\n\n reset by peer\nmore"), "the Hub can't be read: reset by peer"),
        (OSError("410 for 'https://cdn/a?X-Signature=secret&b'"), "the Hub can't be read: 410 for 'https://cdn/a?…'"),
        (errors.OfflineModeIsEnabled("offline"), "the Hub may not be asked: HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("not here"), "no such directory, and the Hub can't be reached"),
    ],
)
def test_an_error_that_says_little_is_told_too(error, words):
    with pytest.raises(StorageError) as caught, refusals("it"):
        raise error
    assert caught.value.facts == {"file": "it"}
    assert caught.value.problem == words


XET = "Task error: File reconstruction error: IO Error: "


CACHE, NETWORK = "can't bring the model into the Hub's cache: ", "the Hub can't be read: "


@pytest.mark.parametrize(
    ("error", "problem", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), f"{CACHE}No space left on device", "--stream"),
        (RuntimeError(f"{XET}No space left on device (os error 28)"), f"{CACHE}No space left on device", "--stream"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), f"{CACHE}Permission denied", "check the directory"),
        (
            RuntimeError(f"{XET}Not a directory (os error 20)"),
            f"{CACHE}Not a directory",
            "let HF_HOME name another one",
        ),
        (RuntimeError("Task error: no answer"), f"{NETWORK}Task error: no answer", "check the connection"),
        (ConnectionResetError(104, "no answer"), f"{NETWORK}[Errno 104] no answer", "check the connection"),
    ],
)
def test_a_disk_that_refuses_the_cache_is_told_from_a_connection_that_fails(error, problem, hint, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/there/hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(StorageError) as caught:
        locate(MODEL)
    assert caught.value.problem == problem
    assert (caught.value.facts == {"file": "/there/hub"}) == problem.startswith(CACHE)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("use", [locate, inspect])
def test_without_the_client_the_extra_is_named(use, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="needs huggingface_hub") as caught:
        use(MODEL)
    assert "gemma4-moe[hub]" in str(caught.value.hint)


@pytest.mark.parametrize("error", [InputError("ours", hint="so"), StorageError("ours", hint="so")])
def test_our_own_errors_pass(error):
    with pytest.raises(type(error)) as caught, refusals("it"):
        raise error
    assert caught.value is error
