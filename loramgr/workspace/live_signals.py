"""Signals during a change of weights: what their handlers raise waits until every change is on record."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["held_back"]


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Hold the handlers of signals back for the block, and give it a function that lets them run at a safe point.

    A KeyboardInterrupt between the change of a tensor and its record would leave a weight that nobody can restore.
    Python runs handlers in the main thread only, so that in any other thread there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _nothing
        return
    came: list[tuple[int, FrameType | None]] = []
    found = ((int(number), signal.getsignal(number)) for number in signal.valid_signals())
    handlers = {number: handler for number, handler in found if callable(handler)}

    def deliver() -> None:
        while came:
            number, frame = came.pop(0)
            handlers[number](number, frame)

    try:
        for number in handlers:
            signal.signal(number, lambda *each: came.append(each))
        yield deliver
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        deliver()


def _nothing() -> None:
    pass
