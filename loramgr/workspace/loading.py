"""Loads torch beside other work: that takes longer than copying a shard of a model."""

from __future__ import annotations

import _thread
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread, current_thread, main_thread
from types import FrameType

__all__ = ["loading_torch"]

_PATIENCE = 0.0005  # seconds: a thread that copies needs the interpreter rarely, and is not to wait long for it


@contextmanager
def loading_torch() -> Iterator[None]:
    """Load torch beside what the block does, and let it compute with one thread for each that asks it.

    Whoever needs no torch yet goes on, and who does waits for it. An interrupt waits too: one that strikes the main
    thread inside of Python's import machinery leaves a lock behind, for which the loading thread would wait for ever.
    """
    begun = Event()
    with _interrupts_wait() as let_go:

        def load() -> None:
            _IMPORTING.begin()
            try:
                _COMPUTING.begin()
                begun.set()
            finally:
                _IMPORTING.end()
                let_go()

        thread = Thread(target=load, name="loading torch")
        thread.start()
        try:
            yield
        finally:
            thread.join()
            if begun.is_set():
                _COMPUTING.end()


def _import_quietly() -> Callable[[], None]:
    """Make threads take turns often, and collect no garbage; return what takes that back."""
    interval, collecting = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(_PATIENCE)
    gc.disable()  # a seventh of the time goes into looking for garbage, where modules leave none

    def undo() -> None:
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()

    return undo


def _compute_alone() -> Callable[[], None]:
    """Load torch and let it compute with one thread; return what gives it back the threads that it had."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(threads)


class _Setting:
    """A setting of the process that blocks change while they run, each in its thread.

    The first of several that overlap finds what every one of them puts back: the others find it changed already.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._lock = Lock()
        self._blocks = 0
        self._undo: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Change the setting for a block."""
        with self._lock:
            undo = self._change()
            if not self._blocks:
                self._undo = undo
            self._blocks += 1

    def end(self) -> None:
        """Put back what the first of the blocks found."""
        with self._lock:
            self._blocks -= 1
            self._undo()


_IMPORTING = _Setting(_import_quietly)
_COMPUTING = _Setting(_compute_alone)


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
