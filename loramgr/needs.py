"""What the logs need of the store: the manifests and files of live versions, and the tensor lists of bases.

Told from the log entries alone, without the rows of the catalog, which may be damaged.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loramgr.errors import IntegrityError
from loramgr.log import Entry

__all__ = ["Needs", "live", "mentioned", "needs_of"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What has to be in the store.

    `blobs` has the size in bytes that each must have, None for the tensor list of a base, whose size is not recorded.
    `manifests` has what each must say: method, base and files of the version.
    """

    blobs: dict[str, int | None] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_version(self, version: str, method: str, base: str | None, files: Sequence[dict[str, Any]]) -> None:
        """Need a version: its manifest, which the version digest names, and its files {path, digest, bytes}."""
        self.manifests[version] = {"method": method, "base": base, "files": [*files]}
        self.blobs.update((file["digest"], file["bytes"]) for file in files)

    def without(self, other: Needs) -> Needs:
        """Return what the other one does not need."""
        blobs = {digest: size for digest, size in self.blobs.items() if digest not in other.blobs}
        manifests = {digest: told for digest, told in self.manifests.items() if digest not in other.manifests}
        return Needs(blobs, manifests)

    def add_base(self, digest: str) -> None:
        """Need the list of a base's tensors."""
        self.blobs.setdefault(digest, None)


def needs_of(logs: Iterable[Sequence[Entry]], elsewhere: Container[str] = ()) -> Needs:
    """Return what the logs need, each given from its first entry to its last.

    `elsewhere` are the digests of versions that need not be here. Raises IntegrityError, naming the entry, for one that
    lacks what an entry of its kind has.
    """
    needs = Needs()
    for log in logs:
        for entry in live(log):
            if entry.content.get("version") not in elsewhere:
                _add(needs, entry)
    return needs


def mentioned(entries: Iterable[Entry]) -> Needs:
    """Return what the entries would need if nothing were ever removed; errors as in `needs_of`."""
    needs = Needs()
    for entry in entries:
        if entry.kind in ("publish", "add"):
            _add(needs, entry)
    return needs


def live(log: Sequence[Entry]) -> list[Entry]:
    """Return the entries that published the versions which are not removed, or that added the base as it is.

    Errors as in `needs_of`.
    """
    made: dict[int, Entry] = {}
    live: set[int] = set()
    for entry in log:
        with _understood(entry):
            if entry.kind in ("publish", "add"):
                number = entry.content.get("number", 0)
                made[number] = entry
                live.add(number)
            elif entry.kind == "remove":
                whole = entry.content.get("whole", True)  # a base or a remote goes as a whole
                live -= live if whole else set(entry.content["numbers"])
            elif entry.kind == "restore":
                live.update(entry.content["numbers"])
    with _understood(log[-1]):
        return [made[number] for number in sorted(live)]


def _add(needs: Needs, entry: Entry) -> None:
    with _understood(entry):
        content = entry.content
        if entry.log == "base":
            needs.add_base(content["digest"])
        elif entry.log == "adapter":
            summary = content["summary"]
            needs.add_version(content["version"], summary["method"], summary["base"], summary["files"])


@contextmanager
def _understood(entry: Entry) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise IntegrityError(
            f"log entry {entry.digest} of {entry.log} {entry.name!r} lacks a value or has a wrong one: {error}",
            "loramgr verify",
        ) from error
