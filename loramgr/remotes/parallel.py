"""Does the same for many things, some at once, and never has more than a few of them waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["each"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(jobs: int, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the results in the order of the items, worked on by that many threads, few ahead of what is asked for.

    The first error ends it: what has begun is finished, what has not is dropped.
    """
    left = iter(items)
    first = list(islice(left, 2))
    if jobs == 1 or len(first) < 2:  # one request needs no threads
        yield from map(work, first)
        yield from map(work, left)
        return
    with ThreadPoolExecutor(jobs) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            waiting.extend(pool.submit(work, item) for item in first)
            waiting.extend(pool.submit(work, item) for item in islice(left, 2 * jobs - len(waiting)))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(left, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
