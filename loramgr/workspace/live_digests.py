"""Digests of tensors in memory, on any device, several hashed at once."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from loramgr.cores import usable_cores

if TYPE_CHECKING:
    import torch

__all__ = ["sha256_of", "sha256s"]

_THREADS = min(8, usable_cores())


def sha256s(tensors: Iterable[torch.Tensor]) -> Iterator[str]:
    """Yield the sha256 of every tensor's bytes, row-major and little-endian, in bare hex, in their order.

    A tensor is fetched to the CPU here, in the caller's stream, and hashed by another thread while the next one comes;
    no more of them are held than there are threads.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[str]] = deque()
        for tensor in tensors:
            if len(waiting) == _THREADS:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_sha256, tensor.detach().cpu().contiguous()))
        while waiting:
            yield waiting.popleft().result()


def sha256_of(tensor: torch.Tensor) -> str:
    """Return the sha256 of one tensor's bytes, as `sha256s`."""
    return _sha256(tensor.detach().cpu().contiguous())


def _sha256(tensor: torch.Tensor) -> str:
    from loramgr.tensors import as_bytes

    return hashlib.sha256(as_bytes(tensor)).hexdigest()
