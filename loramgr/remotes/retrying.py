"""Trying again: how often and after which pauses, for requests that a store could not answer just now."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = [
    "BASE",
    "FIRST_PAUSE_SECONDS",
    "GIVE_UP_SECONDS",
    "LONGEST_PAUSE_SECONDS",
    "RETRIES",
    "attempts",
    "try_again",
]

RETRIES = 6
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0
BASE = 2.0
GIVE_UP_SECONDS = 300.0  # no attempt begins later than this after the first one
Result = TypeVar("Result")


def attempts() -> Iterator[bool]:
    """Yield once for each attempt, with a pause before all but the first; True when no other one follows.

    The pauses grow from `FIRST_PAUSE_SECONDS` by `BASE`, up to `LONGEST_PAUSE_SECONDS`, each cut at random by up to
    half, so that clients refused together do not come back together.
    """
    begin = time.monotonic()
    for attempt in range(RETRIES):
        last = time.monotonic() - begin > GIVE_UP_SECONDS
        yield last
        if last:
            return
        pause = min(FIRST_PAUSE_SECONDS * BASE**attempt, LONGEST_PAUSE_SECONDS)
        time.sleep(pause * random.uniform(0.5, 1.0))
    yield True


def try_again(call: Callable[[], Result], is_transient: Callable[[Exception], bool]) -> Result:
    """Return what the call returns, made again after errors that pass, up to `RETRIES` times."""
    for last in attempts():
        try:
            return call()
        except Exception as error:
            if last or not is_transient(error):
                raise
    raise AssertionError("the last attempt neither returned nor raised")
