"""The place of one tensor in an output file: written or copied in the kernel, and hashed as it arrives."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass, field
from typing import Any

from loramgr.checkpoints.direct import PAGE, write_direct
from loramgr.digests import CHUNK, TensorDigest
from loramgr.durable import begin_writing
from loramgr.errors import IntegrityError
from loramgr.memory import piece
from loramgr.tensorfile import Data, FileTensor, TensorSpec

__all__ = ["Region"]

_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
_PIECE = 1 << 23  # bytes that are hashed at once: large ones let other threads run meanwhile
_STEP = 1 << 30  # bytes that one call of the kernel may copy


@dataclass(slots=True)
class Region:
    """Where the bytes of one tensor go: an open file and the offset of its first byte there.

    `direct` is the same file, open for direct writes; None where there are none. A region is filled once, from one
    thread; several regions of a file may be filled at once.
    """

    spec: TensorSpec
    file: int
    start: int
    direct: int | None = None
    _sha256: Any = field(default_factory=hashlib.sha256)
    _filled: int = 0

    def write(self, data: Data) -> None:
        """Write all of the tensor's bytes."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._sha256.update(view)
        self._put(view, self.start)
        self._done(self.start + len(view))

    def memory(self, slot: str, size: int) -> memoryview:
        """Return this thread's own memory for a slot; the "result" lies in its page as the tensor does in the file's.

        That is what direct writes need.
        """
        phase = self.start % PAGE if slot == "result" else 0
        return piece(slot, size + PAGE)[phase : phase + size]

    def copy(self, source: FileTensor) -> None:
        """Copy a tensor as it lies in its file, and hash it: past the page cache, or in the kernel, then what arrived.

        Raises IntegrityError when the file has become shorter.
        """
        if self.direct is not None and source.spec.nbytes >= _PIECE and _is_on_disk(self.file):
            self._copy_directly(source)
            return
        with source.path.open("rb", buffering=0) as file:
            at = self._copy(file.fileno(), source)
        self._done(at)
        buffer = piece("copy", min(_PIECE, source.spec.nbytes))
        at, end = self.start, self.start + source.spec.nbytes
        while at < end:
            count = os.preadv(self.file, [buffer[: end - at]], at)
            self._sha256.update(buffer[:count])
            at += count

    @property
    def digest(self) -> TensorDigest:
        """The digest of the tensor that was written; IntegrityError when it has not all of its bytes."""
        if self._filled != self.spec.nbytes:
            raise IntegrityError(f"{self.spec.name}: {self._filled} bytes were written, not {self.spec.nbytes}")
        return TensorDigest(self.spec.name, self.spec.dtype, self.spec.shape, self._sha256.hexdigest())

    def _copy_directly(self, source: FileTensor) -> None:
        """Copy through memory, in pieces that end with a page; a copy in the kernel would fill the page cache."""
        at, end = 0, source.spec.nbytes
        with source.path.open("rb", buffering=0) as file:
            while at < end:
                phase = (self.start + at) % PAGE
                data = piece("copy", _PIECE + PAGE)[phase : phase + min(_PIECE - phase, end - at)]
                count = os.preadv(file.fileno(), [data], source.start + at)
                if not count:
                    raise IntegrityError(f"{source.path}: the file ends inside tensor {source.spec.name!r}")
                self._sha256.update(data[:count])
                self._put(data[:count], self.start + at)
                at += count
        self._done(self.start + end)

    def _put(self, data: memoryview, offset: int) -> None:
        """Write bytes to a place in the file, whole pages of them directly where that is possible."""
        written = range(0) if self.direct is None else write_direct(self.direct, data, offset)
        for part in (range(written.start), range(written.stop, len(data))):
            at = part.start
            while at < part.stop:
                at += os.pwrite(self.file, data[at : min(at + _STEP, part.stop)], offset + at)

    def _copy(self, descriptor: int, source: FileTensor) -> int:
        """Copy and return where the copy ends."""
        offset, at, left = source.start, self.start, source.spec.nbytes
        while left:
            count = _copy_range(descriptor, self.file, min(left, _STEP), offset, at)
            if not count:
                raise IntegrityError(f"{source.path}: the file ends inside tensor {source.spec.name!r}")
            offset, at, left = offset + count, at + count, left - count
        return at

    def _done(self, end: int) -> None:
        self._filled = end - self.start
        begin_writing(self.file, self.start, self._filled)


def _is_on_disk(file: int) -> bool:
    """Say whether a file is on a device of blocks; others copy on a server (NFS), share what they copy, or are memory.

    A tensor begins anywhere in a block, which file systems on such a device cannot share.
    """
    return os.major(os.fstat(file).st_dev) != 0


def _copy_range(source: int, target: int, count: int, offset: int, at: int) -> int:
    """Copy bytes from file to file in the kernel, or through this process where it does not; return how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, offset, at)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    return os.pwrite(target, os.pread(source, min(count, CHUNK), offset), at)
