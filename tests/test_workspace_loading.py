"""Torch is loaded beside other work, and an interrupt meanwhile waits until it is there."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loramgr.workspace.loading import _IMPORTING, _interrupts_wait, loading_torch

BESIDE = """
import sys
from loramgr.workspace.loading import loading_torch
with loading_torch():
    print("torch.nn" in sys.modules)
import torch
print(torch.get_num_threads())
"""


def test_the_block_runs_while_torch_is_loaded() -> None:
    own = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    alone, beside = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        for command in (own, [sys.executable, "-c", BESIDE])
    )
    assert beside == ["False", *alone]


def test_the_number_of_threads_comes_back_after_a_failure() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), loading_torch():
        raise KeyError
    assert torch.get_num_threads() == before


def test_blocks_that_overlap_put_back_what_the_first_of_them_found() -> None:
    before = torch.get_num_threads(), sys.getswitchinterval(), gc.isenabled()
    inside, leave = threading.Event(), threading.Event()

    def second() -> None:
        with loading_torch():
            inside.set()
            leave.wait(60)

    _IMPORTING.begin()  # as a thread that is still loading
    torch.set_num_threads(3)
    try:
        with loading_torch():
            thread = threading.Thread(target=second)
            thread.start()
            assert inside.wait(60)
        leave.set()
        thread.join()
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(torch.get_num_threads).result()
    finally:
        _IMPORTING.end()
        torch.set_num_threads(before[0])
    assert found == 3
    assert (torch.get_num_threads(), sys.getswitchinterval(), gc.isenabled()) == before


def interrupted(reached: list[str]) -> None:
    with _interrupts_wait() as let_go:
        signal.raise_signal(signal.SIGINT)
        reached.append("still here")
        threading.Thread(target=let_go).start()
        for _ in range(1000):
            threading.Event().wait(0.01)
        reached.append("never here")


def test_an_interrupt_waits_until_it_is_let_go() -> None:
    reached: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted(reached)
    assert reached == ["still here"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_after_that_is_delivered_once_and_at_once() -> None:
    with _interrupts_wait() as let_go:
        let_go()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_nothing_is_held_back_in_other_threads() -> None:
    handlers = []

    def look() -> None:
        with _interrupts_wait():
            handlers.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [before]
