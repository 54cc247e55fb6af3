"""Use cases about which remotes there are, and how a command finds the one that is meant."""

from __future__ import annotations

import shlex
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loramgr.catalog.query import VersionQuery
from loramgr.catalog.reader import Reader
from loramgr.errors import ConflictError, NotFoundError, UsageError
from loramgr.records import RemoteRecord, Removal
from loramgr.references import check_name
from loramgr.workspace.home import Home

if TYPE_CHECKING:
    from loramgr.remotes.protocol import Remote

__all__ = ["ORIGIN", "Place", "add_remote", "list_remotes", "promised_at", "remove_remote", "resolve"]

ORIGIN = "origin"


class Place(NamedTuple):
    """A remote as a person means it: the name it is registered under, else its address; and the address."""

    label: str
    url: str

    @property
    def given(self) -> str:
        """The remote as it is typed in a command."""
        return shlex.quote(self.label)

    def open(self, jobs: int) -> Remote:
        """Open the remote, to use that many connections at once."""
        from loramgr.remotes.opening import open_remote

        return open_remote(self.url, jobs)


def add_remote(home: Home, name: str, url: str, hint: str | None = None) -> RemoteRecord:
    """Register a remote; the same one once more changes nothing. `hint` is the way on when the name is taken.

    Nothing is asked of the remote. Raises UsageError for an address that is none or has credentials in it, and
    ConflictError when the name belongs to another one.
    """
    check_name(name)
    url = _checked(url)
    with home.writing() as writer:
        existing = _registered(writer, name)
        if existing is not None and existing.url != url:
            raise ConflictError(
                f"the name {name} belongs to another remote, {existing.url}",
                hint or f"choose another, or loramgr remote remove {name}",
            )
        if existing is None:
            home.record(writer, "remote", "add", name, {"url": url})
        return next(remote for remote in writer.remotes() if remote.name == name)


def list_remotes(home: Home) -> list[RemoteRecord]:
    """Return all registered remotes, by name."""
    with home.catalog.reading() as reader:
        return reader.remotes()


def remove_remote(home: Home, name: str, *, dry_run: bool) -> Removal:
    """Forget a remote; what is there stays there. NotFoundError when there is none of that name."""
    with home.writing() as writer:
        if _registered(writer, name) is None:
            raise _absent(writer, name)
        if not dry_run:
            home.record(writer, "remote", "remove", name, {})
    return Removal([name])


def promised_at(home: Home, name: str) -> int:
    """Return how many versions have their files at that remote and not here."""
    promised = {digest for digest, remote in home.store.promised.all().items() if remote == name}
    if not promised:
        return 0
    with home.catalog.reading() as reader:
        versions = reader.versions(VersionQuery(all_versions=True))
    files = {version.digest: [file.digest for file in version.files] for version in versions}
    return len(promised.intersection(home.store.unkept_promises(files)))


def resolve(home: Home, text: str | None) -> Place:
    """Return the remote that a name or address means; None: the only one registered, or the one named origin.

    Raises NotFoundError for a name that is not registered, UsageError when none is given and none goes without saying.
    """
    if text is not None and _is_address(text):
        url = _checked(text)
        return Place(url, url)
    with home.catalog.reading() as reader:
        remotes = {remote.name: remote for remote in reader.remotes()}
        if text is not None and text not in remotes:
            raise _absent(reader, text)
    if text is None:
        text = ORIGIN if ORIGIN in remotes or len(remotes) != 1 else next(iter(remotes))
    if text not in remotes:
        if not remotes:
            raise UsageError("there is no remote yet", "loramgr remote add NAME URL")
        names = ", ".join(remotes)
        raise UsageError(f"there are several remotes, {names}, and none is named {ORIGIN}", "say which one is meant")
    return Place(text, remotes[text].url)


def _checked(url: str) -> str:
    """Return the address in full; UsageError for one that is none, or that has credentials in it."""
    from loramgr.remotes.urls import parse_url

    return str(parse_url(url))


def _is_address(text: str) -> bool:
    return ":" in text or "/" in text


def _registered(reader: Reader, name: str) -> RemoteRecord | None:
    return next((remote for remote in reader.remotes() if remote.name == name), None)


def _absent(reader: Reader, name: str) -> NotFoundError:
    close = get_close_matches(name, [remote.name for remote in reader.remotes()], n=3)
    hint = f"did you mean {' or '.join(close)}? loramgr remote list shows all" if close else "loramgr remote list"
    if Path(name).is_dir():
        hint = f"for the folder of that name, ./{name}"
    return NotFoundError(f"there is no remote {name!r}", hint)
