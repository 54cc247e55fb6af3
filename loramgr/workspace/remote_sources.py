"""The registered remotes as places where a repair finds lost files, manifests and log entries again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from loramgr.catalog.query import VersionQuery
from loramgr.errors import IntegrityError, LoramgrError, NotFoundError
from loramgr.log import Entry
from loramgr.records import VersionRecord
from loramgr.remotes.protocol import DamagedLogs, Remote
from loramgr.store.blobs import BlobStore
from loramgr.workspace.fetching import Wanted, fetch, partial_folder
from loramgr.workspace.home import Home
from loramgr.workspace.remote_logs import known_entries
from loramgr.workspace.remotes import ORIGIN, Place
from loramgr.workspace.repairing import Source

__all__ = ["RemoteSources"]


@dataclass
class RemoteSources:
    """Every registered remote, the one named origin first; one that fails is not asked again.

    `notes` says which ones could not be asked, and why. What they give is hashed before it counts.
    """

    home: Home
    notes: list[str] = field(default_factory=list)
    fetched: list[Path] = field(default_factory=list)

    def sources(self) -> list[Source]:
        """Return them as sources for `repairing.repair`; nothing is asked of them yet."""
        try:
            with self.home.catalog.reading() as reader, self.home.catalog.suspecting():
                remotes = sorted(reader.remotes(), key=lambda remote: (remote.name != ORIGIN, remote.name))
        except IntegrityError:
            self.notes.append("remotes were not asked: the catalog does not tell which there are")
            return []
        places = [_Place(self, Place(remote.name, remote.url)) for remote in remotes]
        return [Source(each.place.label, each.find) for each in places]

    @cached_property
    def versions(self) -> list[VersionRecord]:
        """The versions that the catalog knows."""
        with self.home.catalog.reading() as reader, self.home.catalog.suspecting():
            return reader.versions(VersionQuery(all_versions=True))

    def tidy(self) -> None:
        """Delete what was fetched, once it is in the store."""
        for path in self.fetched:
            path.unlink(missing_ok=True)


@dataclass
class _Place:
    """One remote."""

    among: RemoteSources
    place: Place
    failed: bool = False

    def find(self, collection: BlobStore, digest: str) -> Path | bytes | None:
        """Return what has that digest, or None; as `Source.find`."""
        if self.failed:
            return None
        try:
            return self._found(collection, digest)
        except NotFoundError:
            return None
        except LoramgrError as error:
            self.failed = not isinstance(error, IntegrityError)
            self.among.notes.append(f"{self.place.label} was asked in vain for {digest}: {error.message}")
            return None

    def _found(self, collection: BlobStore, digest: str) -> Path | bytes | None:
        store = self.among.home.store
        if collection is store.entries:
            entry = self._entries.get(digest)
            return None if entry is None else entry.encode()
        for version in self.among.versions:
            if collection is store.manifests and version.digest == digest:
                return self._remote.read_manifest(version.name, version.version, digest)
            for file in version.files if collection is store.blobs else ():
                if file.digest == digest:
                    wanted = Wanted(version.name, version.version, file)
                    path = fetch(self._remote, wanted, partial_folder(self.among.home.cache), _uncounted)
                    self.among.fetched.append(path)
                    return path
        return None

    @cached_property
    def _remote(self) -> Remote:
        return self.place.open(self.among.home.jobs)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """The entries there that are not here, or are damaged here."""
        known = known_entries(self.among.home)
        found: dict[str, Entry] = {}
        with suppress(DamagedLogs):  # the others may have what is looked for
            for log in self._remote.logs(known):
                found |= {entry.digest: entry for entry in log.entries if known(entry.digest) is None}
        return found


def _uncounted(_: int) -> None:
    return None
