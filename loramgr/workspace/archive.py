"""Use cases: a whole home into one archive, and an archive into a home that may have some of it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedWriter
from pathlib import Path

from loramgr.catalog.chains import follow
from loramgr.catalog.reader import Reader
from loramgr.containment import is_contained
from loramgr.durable import appear, sync_folder
from loramgr.errors import ConflictError, IntegrityError, LoramgrError, NotFoundError
from loramgr.log import Entry
from loramgr.needs import mentioned, needs_of
from loramgr.records import ArchiveReport
from loramgr.references import check_name
from loramgr.store.archive import Contents, read_archive, write_archive
from loramgr.store.batch import StoreBatch, batch
from loramgr.store.locks import locked
from loramgr.store.store import Store
from loramgr.workspace.home import Home
from loramgr.workspace.promises import promised_versions, written

__all__ = ["export_home", "import_home"]

_UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def export_home(home: Home, archive: Path) -> ArchiveReport:
    """Write everything that counts in a home into one archive, as of one moment, while others may write.

    Of removed versions and bases it holds what is still here. Raises ConflictError when there is something at that
    path, NotFoundError when files are at a remote only, and IntegrityError when anything that is needed is missing or
    damaged.
    """
    if os.path.lexists(archive):
        if (left := _temporary(archive)).exists() and left.samefile(archive):
            left.unlink()  # its second name, which a process did not live to take away
        raise _taken(archive)
    with _gc_kept_away(home):
        with home.catalog.reading() as reader:
            entries, versions = sorted(reader.entry_digests()), len(list(reader.live_publications()))
        stray = {*home.store.entries.digests()} - {*entries}
        contents = _contents(home.store, entries)
        with _appearing(archive) as file:
            write_archive(home.store, contents, file)
    notes = [f"{len(stray)} log entries that do not count are not in it: loramgr verify names them"]
    return ArchiveReport(versions, contents.bytes, notes if stray else [])


def import_home(home: Home, archive: Path) -> ArchiveReport:
    """Take in what an archive holds and this home lacks; the report counts that alone.

    Nothing gets a name before everything is proved. Raises NotFoundError when there is no archive, IntegrityError when
    it is damaged or was not written by `export_home`, and ConflictError when a log went on differently here and there,
    or a name belongs to another log; then nothing is imported.
    """
    if not archive.is_file():
        raise NotFoundError(f"{archive}: no such file")
    with home.provisional() as new, batch(home.store) as staged:
        logs = _logs(archive, staged, read_archive(archive, staged))
        _check_complete(archive, staged, logs)
        with ExitStack() as group, home.writing() as writer:
            left_out = [log for log in logs if _is_other_remote(writer, log)]
            fresh = [
                [entry.digest for entry in log] for log in writer.join([log for log in logs if log not in left_out])
            ]
            arriving = [digest for log in fresh for digest in log]
            group.enter_context(home.store.groups.announced(arriving, home.store.entries))
            live = {*writer.live_publications()}
            size = _staged_bytes(staged)
            new.adopt(staged.settle_files())
            staged.settle_entries(fresh)
    notes = [f"the remote {log[-1].name} of the archive is left out: here that is another one" for log in left_out]
    return ArchiveReport(sum(digest in live for log in fresh for digest in log), size, notes)


def _is_other_remote(reader: Reader, log: Sequence[Entry]) -> bool:
    """Say whether a log is that of a remote whose name is taken here: everybody has an origin."""
    state = reader.log_state("remote", log[-1].name) if log[-1].log == "remote" else None
    return state is not None and state.root != log[0].digest


def _contents(store: Store, digests: Sequence[str]) -> Contents:
    """Return what belongs into the archive: what counts has to be there, the rest is taken where it is."""
    entries = [Entry.decode(store.entries.get(digest)) for digest in digests]
    logs = follow(entries).logs
    promised = list(written(logs, promised_versions(store, logs)))
    if promised:
        raise NotFoundError(
            f"the files of {', '.join(promised)} are not here, but at a remote", f"loramgr pull {' '.join(promised)}"
        )
    needs, rest = needs_of(logs), mentioned(entries)
    manifests = {*needs.manifests, *filter(store.manifests.contains, rest.manifests)}
    blobs = {*needs.blobs, *filter(store.blobs.contains, rest.blobs)}
    size = sum(map(store.entries.size, digests))
    size += sum(map(store.manifests.size, manifests)) + sum(map(store.blobs.size, blobs))
    return Contents(digests, sorted(manifests), sorted(blobs), size)


def _logs(archive: Path, staged: StoreBatch, contents: Contents) -> list[list[Entry]]:
    entries = [Entry.decode(staged.entries.get(digest)) for digest in contents.entries]
    for entry in entries:
        _check_names(archive, entry)
    chains = follow(entries)
    if chains.forks:
        raise IntegrityError(f"{archive}: log entry {chains.forks[0]} contradicts another one in the archive")
    return chains.logs


def _check_names(archive: Path, entry: Entry) -> None:
    """Refuse names and paths that no command here would have written."""
    try:
        check_name(entry.name)
    except LoramgrError as error:
        raise IntegrityError(f"{archive}: log entry {entry.digest} has an impossible name: {error.message}") from error
    for files in (manifest["files"] for manifest in mentioned([entry]).manifests.values()):
        for file in files:
            if not is_contained(file["path"]):
                raise IntegrityError(f"{archive}: log entry {entry.digest} names the file {file['path']!r}, outside")


def _check_complete(archive: Path, staged: StoreBatch, logs: Sequence[Sequence[Entry]]) -> None:
    """Refuse an archive that lacks, with what is here, a file of a version that counts, or whose parts disagree."""
    needs = needs_of(logs)
    for digest, size in needs.blobs.items():
        if (found := staged.blobs.size(digest)) != (found if size is None else size):
            raise IntegrityError(f"{archive}: blob {digest} has not the {size} bytes that its log entry names")
    for digest, said in needs.manifests.items():
        manifest = json.loads(staged.manifests.get(digest))
        if {key: manifest.get(key) for key in said} != said:
            raise IntegrityError(f"{archive}: manifest {digest} does not say what its log entry says")


def _staged_bytes(staged: StoreBatch) -> int:
    waiting = (staged.entries.waiting, staged.manifests.waiting, staged.blobs.waiting)
    return sum(path.stat().st_size for paths in waiting for path in paths.values())


@contextmanager
def _gc_kept_away(home: Home) -> Iterator[None]:
    """Hold the store's lock for the block; where nothing can be written, nothing can be collected either."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(home.store.root))
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
        yield


@contextmanager
def _appearing(path: Path) -> Iterator[BufferedWriter]:
    """Give a file that takes its name, durable, when the block ends well; what a killed process left is used again."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    with _claimed(temporary, path) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not appear(temporary, path):
                raise _taken(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.loramgr-partial")


@contextmanager
def _claimed(temporary: Path, output: Path) -> Iterator[BufferedWriter]:
    """Open a temporary file for this process alone; ConflictError while another one writes it."""
    while True:
        with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConflictError(f"{output}: another process is writing it", "wait for it") from error
            if _is_still(file, temporary) and os.fstat(file.fileno()).st_nlink > 1:
                temporary.unlink()  # a finished archive, to be found by another name by now
                continue
            if _is_still(file, temporary):  # else its owner gave it its name between the two calls
                file.truncate()
                yield file
                return


def _is_still(file: BufferedWriter, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _taken(path: Path) -> LoramgrError:
    return ConflictError(f"{path}: there is something already", "choose another file, or remove it")
