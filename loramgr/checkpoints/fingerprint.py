"""The sha256 of every tensor of a checkpoint, read once, and remembered as long as the files stay untouched."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramgr.checkpoints.source import Checkpoint, WeightFile
from loramgr.digests import CHUNK, TensorDigest
from loramgr.errors import IntegrityError, UncheckedError
from loramgr.tensorfile import FileTensor, TensorView

__all__ = ["FingerprintCache", "digest_tensor", "fingerprint"]

RACY_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class _State:
    """What tells a file that was written to from one that was not."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def read(cls, path: Path) -> _State:
        """Return the file's state now; OSError where it cannot be looked at."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


class FingerprintCache:
    """The digests of files that were read before, one JSON file each in `folder`.

    An entry counts while size, mtime, inode and device are those of the file. As in git's index, a file that was
    written less than two seconds before it was read is read again: a later write could have left the same mtime.
    A cache that cannot be written is no failure, an entry that cannot be read is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, path: Path, state: _State) -> dict[str, TensorDigest]:
        """Return the file's tensors by name, nothing when the file is new or may have changed."""
        try:
            content = _sealed(self._entry(path).read_bytes())
            if content["path"] != str(path.absolute()) or _State(**content["state"]) != state:
                return {}
            if state.mtime_ns >= content["hashed_ns"] - RACY_NS:
                return {}
            digests = (TensorDigest(name, dtype, tuple(shape), sha) for name, dtype, shape, sha in content["tensors"])
            return {tensor.name: tensor for tensor in digests}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def put(self, path: Path, state: _State, hashed_ns: int, tensors: list[TensorDigest]) -> None:
        """Remember a file as it was when reading it began, at `hashed_ns`."""
        content = {"path": str(path.absolute()), "state": asdict(state), "hashed_ns": hashed_ns, "tensors": tensors}
        with suppress(OSError):  # a read-only or full disk costs the next reading its shortcut, nothing else
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self._entry(path), _seal(content))

    def _entry(self, path: Path) -> Path:
        return self.folder / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}.json"

    def _write(self, entry: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(entry)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _seal(content: dict[str, Any]) -> bytes:
    """Return an entry's bytes, with the sha256 of its text: a flipped bit must not become a wrong base digest."""
    text = json.dumps(content)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}).encode()


def _sealed(entry: bytes) -> dict[str, Any]:
    """Return the content of an entry; ValueError when it is not what was written."""
    sealed = json.loads(entry)
    if hashlib.sha256(sealed["content"].encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("the entry is damaged")
    content: dict[str, Any] = json.loads(sealed["content"])
    return content


def fingerprint(
    checkpoint: Checkpoint, jobs: int, progress: bool, cache: FingerprintCache | None = None
) -> dict[str, TensorDigest]:
    """Return the digest of every tensor, by name, read by `jobs` threads in chunks of 1 MiB.

    With a cache, files that are known and untouched are not read; without one, everything is. `progress` shows a bar
    on stderr when that is a terminal. Raises IntegrityError when a file ends early, and UncheckedError when one cannot
    be read or was written to meanwhile.
    """
    try:
        return _fingerprint(checkpoint, jobs, progress, cache)
    except OSError as error:
        raise UncheckedError(f"{error.filename or checkpoint.path}: cannot be read: {error.strerror}") from error


def _fingerprint(
    checkpoint: Checkpoint, jobs: int, progress: bool, cache: FingerprintCache | None
) -> dict[str, TensorDigest]:
    found: dict[str, TensorDigest] = {}
    unread: list[tuple[WeightFile, _State]] = []
    for file in checkpoint.files:
        state = _State.read(checkpoint.root / file.name)
        known = cache.get(checkpoint.root / file.name, state) if cache is not None else {}
        if _describes(known, file, checkpoint.tensors):
            found.update(known)
        else:
            unread.append((file, state))
    started = time.time_ns()
    found.update(_read([checkpoint.tensors[name] for file, _ in unread for name in file.tensors], jobs, progress))
    for file, state in unread:
        path = checkpoint.root / file.name
        if _State.read(path) != state:
            raise UncheckedError(f"{path}: the file was written to while it was read", "try again when it is complete")
        if cache is not None:
            cache.put(path, state, started, [found[name] for name in file.tensors])
    return found


def _describes(known: dict[str, TensorDigest], file: WeightFile, tensors: dict[str, TensorView]) -> bool:
    specs = {name: (tensors[name].spec.dtype, tensors[name].spec.shape) for name in file.tensors}
    return bool(known) and {name: (digest.dtype, digest.shape) for name, digest in known.items()} == specs


def _read(views: list[TensorView], jobs: int, progress: bool) -> dict[str, TensorDigest]:
    from tqdm import tqdm

    found = {}
    total = sum(view.spec.nbytes for view in views)
    bar: Any = tqdm(
        total=total,
        desc="fingerprint",
        unit="B",
        unit_scale=True,
        delay=1,
        file=sys.stderr,
        disable=None if progress else True,  # None: a bar on terminals only
    )
    with bar, ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        pending = [pool.submit(digest_tensor, view) for view in views]
        try:
            for future in as_completed(pending):
                digest, size = future.result()
                found[digest.name] = digest
                bar.update(size)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def digest_tensor(view: TensorView) -> tuple[TensorDigest, int]:
    """Return the tensor's digest and its size in bytes."""
    digest = hashlib.sha256()
    for chunk in _chunks(view):
        digest.update(chunk)
    spec = view.spec
    return TensorDigest(spec.name, spec.dtype, spec.shape, digest.hexdigest()), spec.nbytes


def _chunks(view: TensorView) -> Iterator[memoryview]:
    if not isinstance(view, FileTensor):
        data = memoryview(view.read_bytes())
        yield from (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))
        return
    left = view.spec.nbytes
    buffer = memoryview(bytearray(min(CHUNK, left)))
    with view.path.open("rb", buffering=0) as file:
        file.seek(view.start)
        while left:
            count = file.readinto(buffer[: min(CHUNK, left)])
            if not count:
                raise IntegrityError(f"{view.path}: the file ends inside tensor {view.spec.name!r}")
            yield buffer[:count]
            left -= count
