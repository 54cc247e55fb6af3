"""What a `Workspace` is opened on, and its use cases with remotes, as methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

from loramgr.cores import usable_cores
from loramgr.errors import LoramgrError
from loramgr.hints import ReadHints
from loramgr.records import (
    GcReport,
    RemoteRecord,
    RemoteStatus,
    RemoteVerification,
    RemoteVersionRecord,
    Removal,
    TransferReport,
)
from loramgr.workspace.home import Home, default_home
from loramgr.workspace.options import PullOptions, PushOptions

__all__ = ["DAY", "Exchange"]

DAY = timedelta(days=1)
Where = Path | str | None
_CONNECTIONS = 8


class Exchange:
    """A home, opened when it is first used, that can push to remotes and pull from them.

    A `remote` is a registered name or a URL, None the only one registered, or the one named origin.
    """

    def __init__(
        self, home: Where = None, *, jobs: int | None = None, progress: bool = False, hints: ReadHints | None = None
    ) -> None:
        self.home = default_home() if home is None else Path(home)
        self._jobs = jobs or usable_cores()
        self._connections = jobs or max(_CONNECTIONS, usable_cores())
        self._progress = progress
        self._hints = hints

    @cached_property
    def _opened(self) -> Home:
        return Home.open(self.home, self._jobs, self._progress, self._hints)

    @property
    def _connected(self) -> Home:
        """The home as transfers use it: most of their time they wait for the other side, not for a core."""
        return replace(self._opened, jobs=self._connections)

    def remote_add(self, name: str, url: str) -> RemoteRecord:
        """Register a remote under a name."""
        from loramgr.workspace import remotes

        return remotes.add_remote(self._opened, name, url)

    def remote_list(self) -> list[RemoteRecord]:
        """Return the registered remotes, by name."""
        from loramgr.workspace import remotes

        return remotes.list_remotes(self._opened)

    def remote_remove(self, name: str, *, dry_run: bool = False) -> Removal:
        """Forget a remote; what is there stays there."""
        from loramgr.workspace import remotes

        return remotes.remove_remote(self._opened, name, dry_run=dry_run)

    def promised_at(self, remote: str) -> int:
        """Return how many versions have their files only at that registered remote."""
        from loramgr.workspace import remotes

        return remotes.promised_at(self._opened, remote)

    def push(self, refs: Sequence[str], options: PushOptions | None = None) -> TransferReport:
        """Bring adapters to a remote, all of them where none is named."""
        from loramgr.workspace import pushing

        return pushing.push(self._connected, refs, options or PushOptions())

    def pull(self, refs: Sequence[str], options: PullOptions | None = None) -> TransferReport:
        """Bring adapters from a remote, everything that is there where none is named."""
        from loramgr.workspace import pulling

        return pulling.pull(self._connected, refs, options or PullOptions())

    def clone(self, url: str, name: str | None = None) -> TransferReport:
        """Register a remote, as `origin` where no name is given, and bring everything that is there."""
        from loramgr.workspace import pulling

        return pulling.clone(self._connected, url, name)

    def remote_adapters(
        self, remote: str | None = None, *, damage: dict[str, LoramgrError] | None = None
    ) -> list[RemoteVersionRecord]:
        """Return the adapters at a remote, by their newest versions; damaged ones go into `damage`, None raises."""
        from loramgr.workspace import remote_status

        return remote_status.list_adapters(self._connected, remote, damage)

    def remote_status(
        self,
        remote: str | None = None,
        names: Sequence[str] = (),
        *,
        damage: dict[str, LoramgrError] | None = None,
    ) -> list[RemoteStatus]:
        """Return how adapters here compare with those at a remote, of the names given, else of all.

        What is wrong with adapters that cannot be read there is put into `damage`, by name; None raises it.
        """
        from loramgr.workspace import remote_status

        return remote_status.remote_status(self._connected, remote, names, damage)

    def remote_verify(self, remote: str | None = None, *, quick: bool = False) -> RemoteVerification:
        """Read everything at a remote again, or with `quick` compare the sizes of the files."""
        from loramgr.workspace import remote_care

        return remote_care.verify_remote(self._connected, remote, quick=quick)

    def remote_delete(self, remote: str | None, name: str, *, dry_run: bool = False) -> Removal:
        """Delete an adapter at a remote, with all its versions there."""
        from loramgr.workspace import remote_care

        return remote_care.delete_there(self._connected, remote, name, dry_run=dry_run)

    def remote_gc(self, remote: str | None = None, grace: timedelta = DAY, *, dry_run: bool = False) -> GcReport:
        """Delete at a remote what no log there refers to and is older than the grace."""
        from loramgr.workspace import remote_care

        return remote_care.collect_remote(self._connected, remote, grace, dry_run=dry_run)
