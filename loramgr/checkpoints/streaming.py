"""Writes the weights of a model folder: many tensors at once, within a bound of memory, shard by shard durable.

A shard that is complete and durable is noted in a journal in the folder. A run that was killed leaves both, and the
next one with the same plan takes the shards that are as the journal says, hashed again, and makes the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition

from loramgr.checkpoints.fingerprint import digest_tensor
from loramgr.checkpoints.journal import Journal
from loramgr.checkpoints.output import OutputTensor, Shard
from loramgr.checkpoints.regions import Region
from loramgr.digests import TensorDigest
from loramgr.tensorfile import FileTensor, encode_header

__all__ = ["Writing", "write_shards"]


class Budget:
    """Bytes of memory that several threads may hold together; one that wants more than all waits to be alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._freed = Condition()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Hold so many bytes for the block, as soon as they are free."""
        with self._freed:
            self._freed.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._freed:
                self._used -= size
                self._freed.notify_all()


@dataclass(frozen=True, slots=True)
class Writing:
    """How shards are written.

    `jobs` threads; `memory` bytes that tensors in the making may hold together; `progress` is told the bytes of every
    tensor that is done; `journal` None where nothing is resumed; `finish` is called when a shard's tensors are all
    there and returns the further files, relative to the folder, that belong to it and are durable.
    """

    jobs: int
    memory: int
    progress: Callable[[int], object]
    journal: Journal | None = None
    finish: Callable[[Shard], Sequence[str]] = lambda _: ()


def write_shards(folder: Path, shards: Sequence[Shard], how: Writing) -> dict[str, TensorDigest]:
    """Write the shards, durable, and return the digests of their tensors, by name.

    Those that the journal has are not made again. What a tensor's `produce` raises is passed on, when no thread works
    on anything any more; the files are then incomplete, and the caller drops them.
    """
    budget = Budget(how.memory)
    written: dict[str, TensorDigest] = {}
    finished = {} if how.journal is None else how.journal.begin()
    with ThreadPoolExecutor(max(1, how.jobs)) as pool, ThreadPoolExecutor(1) as closer:
        closing = []
        for shard in shards:
            tensors = finished.get(shard.name)
            if tensors is not None and _is_there(folder, shard, tensors, pool):
                how.progress(sum(tensor.spec.nbytes for tensor in shard.tensors))
            else:
                tensors = _write_shard(folder, shard, how, pool, budget)
                closing.append(closer.submit(_close, folder, shard, tensors, how))
            written.update((tensor.name, tensor) for tensor in tensors)
        for future in closing:
            future.result()
    return written


def _write_shard(
    folder: Path, shard: Shard, how: Writing, pool: ThreadPoolExecutor, budget: Budget
) -> list[TensorDigest]:
    header = _header(shard)
    (folder / shard.name).unlink(missing_ok=True)
    file = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.pwrite(file, header, 0)

        def fill(tensor: OutputTensor, start: int) -> TensorDigest:
            region = Region(tensor.spec, file, start)
            with budget.holding(tensor.memory):
                tensor.produce(region)
            how.progress(tensor.spec.nbytes)
            return region.digest

        return _all([pool.submit(fill, *each) for each in zip(shard.tensors, _starts(shard, len(header)), strict=True)])
    finally:
        os.close(file)


def _all(futures: list[Future[TensorDigest]]) -> list[TensorDigest]:
    """Return all results; when one fails, wait for those that have begun, and raise what it raised."""
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    return [future.result() for future in futures]


def _close(folder: Path, shard: Shard, tensors: list[TensorDigest], how: Writing) -> None:
    """Make a shard that has all its tensors durable, and note it."""
    further = how.finish(shard)
    descriptor = os.open(folder / shard.name, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if how.journal is not None:
        how.journal.note(shard.name, further, tensors)


def _is_there(folder: Path, shard: Shard, tensors: list[TensorDigest], pool: ThreadPoolExecutor) -> bool:
    """Say whether the shard's file is what its header must be and has the tensors of these digests."""
    header, path = _header(shard), folder / shard.name
    size = len(header) + sum(tensor.spec.nbytes for tensor in shard.tensors)
    with path.open("rb", buffering=0) as file:
        if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != size:
            return False
    views = [
        FileTensor(each.spec, path, start)
        for each, start in zip(shard.tensors, _starts(shard, len(header)), strict=True)
    ]
    return [digest for digest, _ in pool.map(digest_tensor, views)] == tensors


def _header(shard: Shard) -> bytes:
    return encode_header([tensor.spec for tensor in shard.tensors], shard.metadata)


def _starts(shard: Shard, begin: int) -> Iterator[int]:
    for tensor in shard.tensors:
        yield begin
        begin += tensor.spec.nbytes
