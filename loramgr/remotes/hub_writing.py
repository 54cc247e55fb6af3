"""Pushes to a hub's repository: one commit for each version, each only on top of the state that was read.

A commit that was refused, or whose answer was lost, is looked for before it is asked for again, so it is made once; and
what a commit holds is compared with what was sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramgr.digests import digest_file, short
from loramgr.errors import ConflictError, IntegrityError, RacedError
from loramgr.records import FileRecord
from loramgr.remotes.hub_client import MAIN, HubClient
from loramgr.remotes.hub_commit import Draft, Step, draft, operations, title_of
from loramgr.remotes.hub_errors import MOVED_ON, client_errors, is_passing, status_of, wait_asked, worded
from loramgr.remotes.hub_log import HubState, read_log
from loramgr.remotes.hub_snapshot import Snapshot, place, read_snapshot
from loramgr.remotes.hub_tags import check_free, git_tags
from loramgr.remotes.protocol import VersionContent, ends

__all__ = ["HubWriter", "Push"]

_ATTEMPTS = 6
_SMALL = 1 << 20  # bytes; to ask the hub for each file how it keeps it would take longer


@dataclass(frozen=True, slots=True)
class Push:
    """A push to a remote: its address, the log's name and last entry as they will be, and what gives files.

    `by_path` says that files go by Xet.
    """

    url: str
    name: str
    head: str
    blob: Callable[[str], Path]
    by_path: bool = False

    def moved_on(self, found: HubState | None) -> ConflictError:
        """Return the error for a log that is not as it was read, None for one that is gone."""
        return RacedError(
            f"the log of {self.name!r} went on at {self.url}: {self._heads(found)}",
            f"loramgr push --rebase {self.name}",
        )

    def renamed(self, found: HubState) -> ConflictError:
        """Return the error for a log that has another name there."""
        return ConflictError(
            f"{self.name!r} is called {found.name!r} at {self.url}: {self._heads(found)}", f"loramgr pull {found.name}"
        )

    def taken(self, found: HubState | None) -> ConflictError:
        """Return the error for a name, or a repository, that another log has."""
        whose = f"the name {self.name!r} is another log's at {self.url}"
        if found is not None and found.name not in (None, self.name):
            whose = f"{found.snapshot.repository} holds the adapter {found.name!r}, and each repository holds one"
        return ConflictError(f"{whose}: {self._heads(found)}", f"loramgr rename {self.name} NEW, then push it")

    def _heads(self, found: HubState | None) -> str:
        there = " and ".join(map(short, ends(found.entries.values()))) if found is not None else ""
        return f"its head there is {there or 'gone'}, here {short(self.head)}"


@dataclass(frozen=True, slots=True)
class HubWriter:
    """Writes to repositories of one hub, with that many requests at once while it reads."""

    client: HubClient
    jobs: int

    def bring(self, repository: str, file: FileRecord, source: Path, *, by_path: bool) -> None:
        """Upload a file that the hub keeps by LFS; a small one, and any other, goes with the commit.

        Raises IntegrityError when the source is not the file.
        """
        if digest_file(source) != file.digest:
            raise IntegrityError(f"{source}: its content is not {file.digest}", "loramgr verify")
        if file.bytes <= _SMALL:
            return
        made = Draft({place(file): source}, {place(file): file.digest}, ())
        with operations(made, by_path=by_path) as asked:
            self.client.upload(repository, asked[0])

    def check_tags(self, state: HubState, versions: Sequence[VersionContent], push: Push) -> None:
        """Refuse versions whose git tags are there already: set by hand, or by a client that was first."""
        repository = state.snapshot.repository
        try:
            check_free(repository, git_tags(self.client, repository) if versions else {}, versions)
        except ConflictError:
            now = read_log(self.client, read_snapshot(self.client, repository), state.entries.get, self.jobs)
            if not now.entries.keys() <= state.entries.keys():
                raise push.moved_on(now) from None
            raise

    def commit(self, state: HubState, step: Step, push: Push) -> HubState:
        """Make the commit of a step on top of a state and return the state that it is.

        Raises ConflictError, naming both heads, when the log went on since the state was read.
        """
        repository = state.snapshot.repository
        for attempt in range(1, _ATTEMPTS + 1):
            made = draft(self.client, state, step, push.blob)
            try:
                with operations(made, by_path=push.by_path) as asked:
                    commit = self.client.commit(repository, asked, title_of(step), state.snapshot.commit)
            except client_errors() as error:
                if attempt == _ATTEMPTS or not (status_of(error) in MOVED_ON or is_passing(error)):
                    with worded(repository):
                        raise
                time.sleep(max(wait_asked(error), 0.1 * 2**attempt))
                found = self._look_again(state, step, push)
            else:
                found = read_snapshot(self.client, repository, commit)
            if self._holds(found, step) and not made.differences(found):
                return self._after(state, step, found)
            state = HubState(found, state.entries)
        raise IntegrityError(f"{repository}: {', '.join(made.differences(found)[:3])}: not there as it was sent")

    def _look_again(self, state: HubState, step: Step, push: Push) -> Snapshot:
        """Return the commit of the step where it was made after all, else the head, if the log is as it was.

        Raises ConflictError where it is not.
        """
        repository = state.snapshot.repository
        head = read_snapshot(self.client, repository)
        after = state.entries.keys() | {entry.digest for entry in step.entries}
        if {*head.entries} in (after, {*state.entries}):
            return head
        if self._holds(head, step):
            for commit in self.commits(repository, title_of(step)):
                found = read_snapshot(self.client, repository, commit)
                if self._holds(found, step):
                    return found
        now = read_log(self.client, head, state.entries.get, self.jobs)
        if now.entries and now.entries.keys().isdisjoint(after):
            raise push.taken(now)
        raise push.moved_on(now)

    def commits(self, repository: str, title: str) -> list[str]:
        """Return the commits whose title ends so, the newest first."""
        pages = self.client.get_pages(repository, f"api/models/{repository}/commits/{MAIN}")
        told = [item for item in pages if isinstance(item, dict) and str(item.get("title")).endswith(title)]
        return [commit for item in told if isinstance(commit := item.get("id"), str)]

    def _holds(self, snapshot: Snapshot, step: Step) -> bool:
        there = {*snapshot.entries}
        return all(entry.digest in there for entry in step.entries)

    def _after(self, state: HubState, step: Step, found: Snapshot) -> HubState:
        entries = {**state.entries, **{entry.digest: entry for entry in step.entries}}
        return HubState(found, entries)
