"""Lent memory: used again once no view of it is left, whoever holds the view, and not before."""

import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from gemma4_moe.errors import UsageError
from gemma4_moe.refit.lending import Lender

CPU = torch.device("cpu")


def place_of(loan):
    return loan.memory.data_ptr()


def test_memory_that_was_dropped_is_used_again():
    lender = Lender(CPU, 2)
    places = [place_of(lender.lend(512, "a")) for _ in range(9)]
    assert len(set(places)) == 1


@pytest.mark.parametrize(
    "hold",
    [
        lambda loan: loan,
        lambda loan: loan.memory,
        lambda loan: loan.memory[8:24].view(torch.float32).view(2, 2)[1:],
        lambda loan: loan.memory.detach(),
        lambda loan: loan.memory.numpy(),
        lambda loan: memoryview(loan.memory.numpy()),
        lambda loan: np.from_dlpack(loan.memory),
        lambda loan: torch.from_dlpack(loan.memory),
        lambda loan: torch.nn.Parameter(loan.memory[:8].view(torch.float32)),
    ],
)
def test_any_view_keeps_the_loan(hold):
    lender = Lender(CPU, 2)
    loan = lender.lend(512, "the first")
    first, held = place_of(loan), hold(loan)
    del loan
    others = {place_of(lender.lend(512, "another")) for _ in range(5)}
    assert len(others) == 1
    assert first not in others
    del held
    held = lender.lend(512, "the one in the other buffer")
    assert place_of(lender.lend(512, "in the first")) == first or place_of(held) == first


def test_views_in_a_reference_cycle_are_collected():
    lender = Lender(CPU, 2)
    cycle = [lender.lend(512, "a").memory, lender.lend(512, "b").memory]
    cycle.append(cycle)
    del cycle
    assert lender.lend(512, "c").memory.numel() == 512


def test_the_limit_names_all_that_is_held():
    lender = Lender(CPU, 3)
    held = [lender.lend(512, label) for label in ("red", "green", "blue")]
    with pytest.raises(UsageError, match=r"(?s)all 3 buffers.*red, green, blue"):
        lender.lend(512, "white")
    del held


def test_a_larger_loan_takes_the_place_of_a_smaller_buffer():
    lender = Lender(CPU, 2)
    held = lender.lend(512, "small")
    lender.lend(512, "small again")
    large = lender.lend(4096, "large")
    assert large.memory.numel() == 4096
    assert held.memory.numel() == 512


def test_a_loan_has_the_size_that_was_asked_for():
    lender = Lender(CPU, 2)
    assert lender.lend(512, "a", at_least=4096).memory.numel() == 512
    assert lender.lend(4096, "b").memory.numel() == 4096
    loan = lender.lend(100, "c")
    loan.memory.fill_(7)
    assert loan.shareable().tolist() == [7] * 100


def read_twice(connection):
    tensor = connection.recv()
    connection.send(tensor.tolist())
    connection.recv()
    connection.send(tensor.tolist())


def test_another_process_sees_the_memory_and_views_stay_right():
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=read_twice, args=(there,), daemon=True)
    process.start()
    lender = Lender(CPU, 1)
    loan = lender.lend(4, "a")
    loan.memory.copy_(torch.tensor([3, 1, 4, 1]))
    view = loan.memory[1:]
    here.send(loan.shareable())
    assert here.recv() == [3, 1, 4, 1]
    assert view.tolist() == [1, 4, 1]
    del loan, view
    lender.lend(4, "b").memory.copy_(torch.tensor([5, 9, 2, 6]))  # the shared memory itself
    here.send("look again")
    assert here.recv() == [5, 9, 2, 6]
    process.join(60)


def test_a_shared_buffer_is_not_copied_again():
    lender = Lender(CPU, 1)
    first = lender.lend(4, "a").shareable()
    loan = lender.lend(4, "b")
    assert loan.shareable().data_ptr() == first.data_ptr() == place_of(loan)
    assert pickle.loads(bytes(ForkingPickler.dumps(loan.shareable()))).shape == (4,)
