"""Goes on after a lost race: reads again what another client has changed meanwhile, and tries once more."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from loramgr.errors import RacedError

__all__ = ["LONGEST_SECONDS", "TRIES", "until_won"]

TRIES = 9
LONGEST_SECONDS = 30.0  # no try begins later than this after the first one
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 4.0
Result = TypeVar("Result")


def until_won(call: Callable[[], Result]) -> Result:
    """Return what the call returns, made again after each RacedError; the last one, in the end, is raised.

    The pauses are random, up to a bound that doubles each time, so that clients that met do not meet again.
    """
    begin = time.monotonic()
    for lost in range(1, TRIES):
        try:
            return call()
        except RacedError:
            if time.monotonic() - begin > LONGEST_SECONDS:
                raise
            time.sleep(random.uniform(0, min(FIRST_PAUSE_SECONDS * 2**lost, LONGEST_PAUSE_SECONDS)))
    return call()
