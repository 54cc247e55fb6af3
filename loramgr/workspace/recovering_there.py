"""Gives a log at a remote its end again, where its head got lost or is damaged."""

from __future__ import annotations

from loramgr.log import Entry
from loramgr.remotes.protocol import Remote, RemoteLog
from loramgr.workspace.home import Home
from loramgr.workspace.rebasing import rebase_here
from loramgr.workspace.remote_logs import compare, known_entries, local_log, went_apart

__all__ = ["recover"]


def recover(home: Home, remote: Remote, label: str, name: str, *, rebase: bool, dry_run: bool) -> RemoteLog | None:
    """Have the log of that name end where its entries there and here say, and return it; None where nothing is lost.

    Raises ConflictError when there are entries that went on in another way than those here, unless they are rebased.
    """
    lost = remote.lost(name, known_entries(home))
    if lost is None:
        return None
    if not lost.entries:
        if not dry_run:
            remote.delete(name)
        return None
    here = _local(home, name)
    if not here or here[0].digest != lost.entries[0].digest:
        return None  # another adapter's
    found = compare(here, lost)
    if found.state in ("diverged", "forked"):
        if not rebase:
            raise went_apart(name, label, found, lost.heads)
        rebase_here(home, here, lost, label, dry_run=dry_run)
    head = found.there[-1].digest
    if dry_run:
        return RemoteLog(name, tuple(found.there), (head,), lost.state)
    return remote.restore_head(lost, head)


def _local(home: Home, name: str) -> list[Entry]:
    with home.catalog.reading() as reader:
        return local_log(home, reader, name)
