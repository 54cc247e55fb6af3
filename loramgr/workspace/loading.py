"""Loads torch beside other work: that takes longer than copying a shard of a model."""

from __future__ import annotations

import _thread
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread, current_thread, main_thread
from types import FrameType

__all__ = ["loading_torch"]

_PATIENCE = 0.0005  # seconds: a thread that copies needs the interpreter rarely, and is not to wait long for it


@contextmanager
def loading_torch() -> Iterator[None]:
    """Load torch beside what the block does, and let it compute with one thread for each that asks it.

    Whoever needs no torch yet goes on, and who does waits for it. An interrupt waits too: one that strikes the main
    thread inside of Python's import machinery leaves a lock behind, for which the loading thread would wait for ever.
    """
    before: list[int] = []
    with _interrupts_wait() as let_go:

        def load() -> None:
            interval, collecting = sys.getswitchinterval(), gc.isenabled()
            sys.setswitchinterval(_PATIENCE)
            gc.disable()  # a seventh of the time goes into looking for garbage, where modules leave none
            try:
                import torch

                before.append(torch.get_num_threads())
                torch.set_num_threads(1)
            finally:
                sys.setswitchinterval(interval)
                if collecting:
                    gc.enable()
                let_go()

        thread = Thread(target=load, name="loading torch")
        thread.start()
        try:
            yield
        finally:
            thread.join()
            if before:
                import torch

                torch.set_num_threads(before[0])


@contextmanager
def _interrupts_wait() -> Iterator[Callable[[], None]]:
    """Hold SIGINT back for the block until the given function is called, from any thread; it is then delivered.

    Only the main thread can change handlers; where it has none, or in another thread, nothing is held back.
    """
    previous = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or not callable(previous):
        yield lambda: None
        return
    free, held = Event(), list[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        held.append(number)
        if free.is_set() and _taken(held):
            previous(number, frame)

    def let_go() -> None:
        free.set()
        if _taken(held):  # else none came, or the handler delivers it itself
            _thread.interrupt_main()

    signal.signal(signal.SIGINT, handle)
    try:
        yield let_go
    finally:
        signal.signal(signal.SIGINT, previous)


def _taken(held: list[int]) -> bool:
    """Take what is held; False when somebody else has."""
    try:
        held.pop()
    except IndexError:
        return False
    return True
