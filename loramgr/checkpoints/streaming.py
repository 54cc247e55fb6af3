"""Writes the weights of a model folder: many tensors at once, within a bound of memory, shard by shard durable.

A shard that is complete and durable is noted in a journal in the folder. A run that was killed leaves both, and the
next one with the same plan takes the shards that are as the journal says, hashed again, and makes the others.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Event

from loramgr.checkpoints.direct import open_direct
from loramgr.checkpoints.fingerprint import digest_tensor
from loramgr.checkpoints.journal import Journal
from loramgr.checkpoints.output import OutputTensor, Shard
from loramgr.checkpoints.regions import Region
from loramgr.digests import TensorDigest
from loramgr.durable import reserve
from loramgr.tensorfile import FileTensor, encode_header

__all__ = ["Budget", "Writing", "write_shards"]

_AHEAD = 4  # shards that are begun before the first of them has to be complete


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

    `jobs` threads compute, and some more wait for the disk; `memory` bytes that tensors in the making may hold
    together; `progress` is told the bytes of every tensor that is done; `journal` None where nothing is resumed;
    `finish` is called when a shard's tensors are all there and returns the further files, relative to the folder,
    that belong to it and are durable.
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
    finished = {} if how.journal is None else how.journal.begin()
    jobs = max(1, how.jobs)
    # Some of them wait for the disk: one of those that compute, and half of those that copy.
    with ThreadPoolExecutor(jobs + 2) as copying, ThreadPoolExecutor(jobs + 1) as making:
        pools = _Pools(copying, making, Budget(how.memory), how.progress)
        there = {
            shard.name: tensors
            for shard in shards
            if (tensors := finished.get(shard.name)) is not None and _is_there(folder, shard, tensors, copying)
        }
        left = [shard for shard in shards if shard.name not in there]
        how.progress(sum(each.spec.nbytes for shard in shards if shard.name in there for each in shard.tensors))
        made = _write_all(folder, left, how, pools)
    return {tensor.name: tensor for tensors in (*there.values(), *made) for tensor in tensors}


def _write_all(folder: Path, shards: Sequence[Shard], how: Writing, pools: _Pools) -> list[list[TensorDigest]]:
    """Write shards, some of them at once, and return the digests of the tensors of each."""
    begun: deque[_Open] = deque()
    made: list[list[TensorDigest]] = []
    with ThreadPoolExecutor(1) as closer:
        closing: list[Future[None]] = []

        def complete(oldest: _Open) -> None:
            made.append(oldest.result(pools))
            closing.append(closer.submit(_close, folder, oldest.shard, made[-1], how))

        try:
            for at, shard in enumerate(shards):
                lanes = max(1, how.jobs // (len(shards) - at))
                begun.append(_Open.begin(folder, shard, pools, lanes))
                if len(begun) > _AHEAD:
                    complete(begun.popleft())
            while begun:
                complete(begun.popleft())
        finally:  # nothing is left, unless something failed
            if begun:
                pools.stop.set()
            for each in begun:
                each.abandon()
        for future in closing:
            future.result()
    return made


@dataclass(frozen=True, slots=True)
class _Pools:
    """The threads that copy and those that make tensors, what these may hold, whether to go on, and why not.

    Copies have threads of their own, so that they need not wait for what is loaded to make the others.
    """

    copying: ThreadPoolExecutor
    making: ThreadPoolExecutor
    budget: Budget
    progress: Callable[[int], object]
    stop: Event = field(default_factory=Event)
    failures: list[BaseException] = field(default_factory=list)


@dataclass(slots=True)
class _Open:
    """A shard that is being written."""

    shard: Shard
    file: int
    direct: int | None
    futures: list[Future[list[TensorDigest]]] = field(default_factory=list)

    @classmethod
    def begin(cls, folder: Path, shard: Shard, pools: _Pools, lanes: int) -> _Open:
        """Make the file with its header, and have its tensors made, and copied by so many threads.

        These are few: two that write to one file wait for each other.
        """
        header = _header(shard)
        (folder / shard.name).unlink(missing_ok=True)
        file = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            reserve(file, len(header) + sum(tensor.spec.nbytes for tensor in shard.tensors))
            os.pwrite(file, header, 0)
            opened = cls(shard, file, open_direct(folder / shard.name))
        except BaseException:
            os.close(file)
            raise
        placed = list(zip(shard.tensors, _starts(shard, len(header)), strict=True))
        copies = [each for each in placed if not each[0].memory]
        for lane in range(lanes):
            opened._submit(pools.copying, copies[lane::lanes], pools)
        for each in placed:
            if each[0].memory:
                opened._submit(pools.making, [each], pools)
        return opened

    def _submit(self, pool: ThreadPoolExecutor, placed: Sequence[tuple[OutputTensor, int]], pools: _Pools) -> None:
        def fill() -> list[TensorDigest]:
            regions = [Region(tensor.spec, self.file, start, self.direct) for tensor, start in placed]
            for (tensor, _), region in zip(placed, regions, strict=True):
                _fill(tensor, region, pools)
            return [region.digest for region in regions]

        self.futures.append(pool.submit(fill))

    def result(self, pools: _Pools) -> list[TensorDigest]:
        """Wait for all tensors and close the file; return their digests in the order of the shard."""
        try:
            done, _ = wait(self.futures, return_when=FIRST_EXCEPTION)
            found = {digest.name: digest for future in done for digest in future.result()}
        except CancelledError:  # because of a failure, maybe in another shard
            self.abandon()
            raise pools.failures[0] from None
        except BaseException:
            pools.stop.set()
            self.abandon()
            raise
        self._close()
        return [found[tensor.spec.name] for tensor in self.shard.tensors]

    def abandon(self) -> None:
        """Wait for what has begun, do nothing more, and close the file."""
        for future in self.futures:
            future.cancel()
        wait(self.futures)
        self._close()

    def _close(self) -> None:
        os.close(self.file)
        if self.direct is not None:
            os.close(self.direct)


def _fill(tensor: OutputTensor, region: Region, pools: _Pools) -> None:
    """Have a tensor made, unless another one failed; a failure stops the others."""
    if pools.stop.is_set():
        raise CancelledError
    try:
        with pools.budget.holding(tensor.memory):
            tensor.produce(region)
    except BaseException as error:
        pools.failures.append(error)
        pools.stop.set()
        raise
    pools.progress(tensor.spec.nbytes)


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
