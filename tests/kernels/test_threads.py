"""The thread pool: any count of threads, calls from several threads, children of fork, and no hold on the GIL."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gemma4_moe import kernels
from support.rounding import FP32, assert_same_bits, expected, random_codes

X = random_codes(np.random.default_rng(8), (4, 300, 501), FP32)
FACTORS = np.array([1.37, 1.0, -0.3, 1e20], np.float32)
WANTED = np.ascontiguousarray(expected(X, FACTORS, FP32).swapaxes(1, 2))


def convert(threads):
    return kernels.transpose_scale_cast(X, scale=FACTORS, threads=threads, kernel="cpu")


@pytest.mark.parametrize("threads", [0, 1, 2, 7, 64])
def test_any_number_of_threads(threads):
    assert_same_bits(convert(threads), WANTED)


def test_calls_from_several_threads_share_the_pool():
    with ThreadPoolExecutor(6) as callers:
        for found in callers.map(convert, [3] * 40):
            assert_same_bits(found, WANTED)


def child(connection):
    connection.send(bool((convert(3).view(np.uint32) == WANTED.view(np.uint32)).all()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads():
    convert(3)
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    assert receiver.poll(60), "the child hangs"
    assert receiver.recv()
    process.join()


def test_other_python_threads_run_meanwhile():
    x = np.zeros((8, 2000, 2000), np.float32)
    done = threading.Event()
    seen = 0

    def work():
        kernels.transpose_scale_cast(x, scale=np.full(8, np.nan, np.float32), threads=1, kernel="cpu")
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        seen += 1
        time.sleep(0.001)
    worker.join()
    assert seen > 3
