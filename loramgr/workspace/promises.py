"""Which versions are only promised: their log entries count here, their files are at a remote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loramgr.errors import NotFoundError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import VersionRecord
from loramgr.store.store import Store

__all__ = ["check_here", "files_of_entry", "is_elsewhere", "promised_versions", "written"]


def promised_versions(store: Store, logs: Iterable[Sequence[Entry]]) -> dict[str, str]:
    """Return the digests of the versions in these logs whose files are not here, each with the remote that has them."""
    if not store.promised.all():
        return {}
    published = [entry for log in logs for entry in live(log) if entry.kind == "publish"]
    return store.unkept_promises({entry.content["version"]: files_of_entry(entry) for entry in published})


def written(logs: Iterable[Sequence[Entry]], promised: Mapping[str, str]) -> dict[str, str]:
    """Return the promised versions of these logs as `name@vN`, each with the remote that has its files."""
    return {
        f"{log[-1].name}@v{entry.content['number']}": promised[entry.content["version"]]
        for log in logs
        for entry in live(log)
        if entry.content.get("version") in promised
    }


def check_here(store: Store, version: VersionRecord) -> None:
    """Raise NotFoundError, with the command that brings them, for a version whose files are at a remote only."""
    if is_elsewhere(store, version):
        remote = store.promised.remote_of(version.digest)
        ref = f"{version.name}@v{version.version}"
        raise NotFoundError(f"the files of {ref} are not here, but at {remote}", f"loramgr pull {ref}")


def is_elsewhere(store: Store, version: VersionRecord) -> bool:
    """Say whether the files of a version are at a remote only."""
    marked = store.promised.remote_of(version.digest) is not None
    return marked and not store.holds(version.digest, [file.digest for file in version.files])


def files_of_entry(entry: Entry) -> list[str]:
    """Return the digests of the files of the version that an entry published."""
    return [file["digest"] for file in entry.content["summary"]["files"]]
