"""Remotes on a Hugging Face hub: `hf:org` has a repository for each adapter, `hf:org/name` is one adapter's.

docs/hub.md says what such a repository looks like. The hub is not believed: commits are asked for on top of the one
that was read, and whatever is read is hashed or proved.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Lock

from loramgr.digests import digest_bytes
from loramgr.errors import ConflictError, IntegrityError, LoramgrError, NotFoundError, UsageError
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.references import check_name
from loramgr.remotes.hub_client import HubClient, check_repository
from loramgr.remotes.hub_commit import steps
from loramgr.remotes.hub_log import HubState, read_log
from loramgr.remotes.hub_snapshot import Snapshot, is_own, manifest_path, read_snapshot
from loramgr.remotes.hub_tags import git_tags, mirror_tags, unmarked, version_tag
from loramgr.remotes.hub_writing import HubWriter, Push
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import Collected, DamagedLogs, KnownEntry, RemoteLog, VersionContent
from loramgr.remotes.proving import MANIFEST_LIMIT, parse_manifest
from loramgr.remotes.urls import RemoteUrl

__all__ = ["HubRemote"]

_PAGE = 200  # repositories in one answer, each with the names of its files
_LARGE = 16 << 20  # bytes; a hub keeps by LFS what is larger


class HubRemote:
    """Adapters on a hub; see `Remote`. Several threads may use it at once.

    The token is the one that `huggingface_hub` finds. Options of the URL: `private=true` makes new repositories
    private, `tags=true` gives the adapter's tags to git too.
    """

    def __init__(self, url: RemoteUrl, jobs: int = 8) -> None:
        self._url = url
        self._jobs = jobs
        self._client = HubClient()
        self._writer = HubWriter(self._client, jobs)
        self._lock = Lock()
        self._states: dict[str, HubState] = {}
        self._preparing: dict[str, Lock] = {}
        self._prepared: dict[str, bool] = {}
        self._refs: dict[str, dict[str, str]] = {}
        self._snapshots: dict[tuple[str, str], Snapshot] = {}

    @property
    def url(self) -> str:
        """The address as a person gave it; it has no secrets."""
        return str(self._url)

    def names(self) -> list[str]:
        """Return the names of the adapters there, sorted."""
        if self._url.prefix:
            state = self._read(self._repository(""), _nothing)
            return [state.name] if state is not None and state.name is not None else []
        place = {"author": self._url.place, "full": "true", "limit": _PAGE}
        found = self._client.get_pages(self.url, "api/models", **place)
        names = (item.get("id") for item in found if isinstance(item, dict) and is_own(item))
        own = (name.removeprefix(f"{self._url.place}/") for name in names if isinstance(name, str))
        return sorted(name for name in own if _is_name(name))

    def log(self, name: str, known: KnownEntry) -> RemoteLog | None:
        """Return the log of that name, None where there is none; entries that are known are not fetched."""
        state = self._read(self._repository(name), known)
        log = None if state is None else state.log(name)
        with self._lock:
            self._states.pop(name, None)
            if state is not None and log is not None:
                self._states[name] = state
        return log

    def logs(self, known: KnownEntry) -> Iterator[RemoteLog]:
        """Yield all logs; DamagedLogs after the last, where some are damaged."""

        def read(name: str) -> RemoteLog | LoramgrError | None:
            try:
                return self.log(name, known)
            except (IntegrityError, ConflictError) as error:
                return error

        names, damaged = self.names(), dict[str, LoramgrError]()
        for name, log in zip(names, each(self._jobs, read, names), strict=True):
            if isinstance(log, LoramgrError):
                damaged[name] = log
            elif log is not None:
                yield log
        if damaged:
            raise DamagedLogs(damaged)

    def astray(self) -> list[str]:
        """Return nothing: a commit has its whole log."""
        return []

    def lost(self, name: str, known: KnownEntry) -> RemoteLog | None:
        """Return nothing: a branch of git is the head of a log."""
        return None

    def restore_head(self, log: RemoteLog, head: str) -> RemoteLog:
        """Change nothing, as `lost` says."""
        return log

    def revive(self) -> list[str]:
        """Change nothing: a hub says itself what it is."""
        return []

    def missing(self, name: str, sizes: Mapping[str, int]) -> set[str]:
        """Return which blobs a push of that adapter has to bring; the others are there in full length.

        A file that is not kept by LFS comes with the commit of each version that has it, unless it lies there already.
        """
        state = self._states.get(name) or self._read(self._repository(name), _nothing)
        if state is None:
            return {*sizes}
        lfs = {(file.digest, file.size) for file in state.snapshot.files.values() if file.digest}
        for entry in state.entries.values():
            if entry.kind == "publish" and entry.content["version"] in {*state.snapshot.manifests}:
                lfs |= {(file["digest"], file["bytes"]) for file in entry.content["summary"]["files"]}
        return {digest for digest, size in sizes.items() if (digest, size) not in lfs}

    def missing_manifests(self, name: str, sizes: Mapping[str, int | None]) -> set[str]:
        """Return which manifests the newest commit lacks; the hub itself sees to their bytes."""
        return {*sizes}.difference(self._state(name).snapshot.manifests) if sizes else set()

    def put_manifest(self, name: str, version: VersionContent) -> None:
        """Raise IntegrityError: what was taken out of a repository by hand is not guessed back into its history."""
        raise self._beyond_repair(name, f"the manifest of v{version.number}")

    def _beyond_repair(self, name: str, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self._repository(name)}: {what} is damaged or missing there",
            f"where a home has it: loramgr remote delete {shlex.quote(self.url)} {name} --yes && "
            f"loramgr push {name} --to {shlex.quote(self.url)}",
        )

    def put_blob(self, name: str, file: FileRecord, source: Path, *, anew: bool = False) -> None:
        """Bring a blob, streamed; a small one is only hashed here, and comes with the commit of its version."""
        if anew:
            raise self._beyond_repair(name, file.path)
        repository = self._repository(name)
        self._writer.bring(repository, file, source, by_path=self._prepare(repository))

    def append(
        self,
        expected: RemoteLog | None,
        entries: Sequence[Entry],
        versions: Sequence[VersionContent],
        blob: Callable[[str], Path],
    ) -> RemoteLog:
        """Append entries by one commit for each version, or one without any, and tag the versions.

        What of them is there already, as after a push whose answer was lost, is not written again.
        """
        push = Push(self.url, entries[-1].name, entries[-1].digest, blob)
        known = {entry.digest: entry for entry in (*(expected.entries if expected else ()), *entries)}
        state = self._begin(push, known) if expected is None else self._expected(push, expected, known)
        repository = state.snapshot.repository
        push = replace(push, by_path=self._prepare(repository))
        lacking = [entry for entry in entries if entry.digest not in state.entries]
        new = [version for version in versions if version.digest not in {*state.snapshot.manifests}]
        self._writer.check_tags(state, new, push)
        for step in steps(lacking, versions):
            state = self._writer.commit(state, step, push)
            if step.version is not None:
                self._client.tag(repository, version_tag(step.version.number), state.snapshot.commit)
        with self._lock:
            self._states[push.name] = state
            self._refs.pop(repository, None)
        log = state.log(push.name)
        if log is None:
            raise push.renamed(state)
        return log

    def check(self, expected: RemoteLog | None, entries: Sequence[Entry]) -> None:
        """Refuse a new log whose repository holds another one, or files that loramgr did not put there."""
        if expected is not None:
            return
        push = Push(self.url, entries[-1].name, entries[-1].digest, Path)
        known = {entry.digest: entry for entry in entries}
        found = self._read(self._repository(push.name), known.get)
        if found is not None:
            self._refuse_foreign(found.snapshot)
            self._refuse_other(push, known, found)

    def settle(self, log: RemoteLog, *, tags: bool, thorough: bool) -> list[str]:
        """Set git tags of versions that are missing and, where asked, bring those of the adapter's tags up to date."""
        state = self._state(log.name)
        repository = state.snapshot.repository
        there = git_tags(self._client, repository)
        done = []
        for entry in unmarked([*state.entries.values()], state.snapshot.manifests, there):
            tag, commit = version_tag(entry.content["number"]), self._commit_of(state, entry)
            if commit is not None:
                self._client.tag(repository, tag, commit)
                there[tag] = commit
                done.append(f"the git tag {tag} of {repository} was missing, and is set")
        if tags or self._url.option("tags"):
            changed = mirror_tags(self._client, repository, [*state.entries.values()], there)
            done += [f"the git tag {tag} of {repository} is {'set' if commit else 'gone'}" for tag, commit in changed]
        with self._lock:
            self._refs.pop(repository, None)
        return done

    def read_manifest(self, name: str, number: int, digest: str) -> bytes:
        """Return the manifest of a version, hashed; NotFoundError where it is not there, IntegrityError for another."""
        snapshot = self._state(name).snapshot
        try:
            return self._proved_manifest(snapshot, number, digest)
        except IntegrityError:  # damaged on its way, or there
            return self._proved_manifest(snapshot, number, digest)

    def read_blob(self, name: str, number: int, file: FileRecord, offset: int = 0) -> Iterator[bytes]:
        """Yield a file of a version from an offset on; NotFoundError where it is not there.

        A file without a digest of the hub's is looked for until one is found whose bytes are right.
        """
        for snapshot in self._commits_of(name, number):
            found = snapshot.find(file)
            if found is None:
                continue
            if found.digest is not None or file.bytes > _LARGE:
                yield from self._client.stream(snapshot.repository, snapshot.commit, found.path, offset)
                return
            for _ in range(2):  # once more, should it have been damaged on its way
                data = self._client.read(snapshot.repository, snapshot.commit, found.path, file.bytes)
                if digest_bytes(data) == file.digest:
                    yield data[offset:]
                    return
        raise NotFoundError(f"{self.url}: {file.path} of {name}@v{number} is not there", f"push {name}@v{number} again")

    def delete(self, name: str) -> None:
        """Delete the repository of a log with all its history; NotFoundError where there is none."""
        state = self._read(self._repository(name), _nothing)
        if state is None or state.log(name) is None:
            raise NotFoundError(
                f"{self.url}: no adapter {name!r} there", f"loramgr remote list-adapters {shlex.quote(self.url)}"
            )
        self._client.delete(state.snapshot.repository)
        with self._lock:
            self._states.pop(name, None)
            self._prepared.pop(state.snapshot.repository, None)

    def collect(self, grace: timedelta, *, dry_run: bool) -> Collected:
        """Delete nothing: the hub itself keeps and collects what commits refer to."""
        return Collected((), 0)

    def _proved_manifest(self, snapshot: Snapshot, number: int, digest: str) -> bytes:
        data = self._client.read(snapshot.repository, snapshot.commit, manifest_path(digest), MANIFEST_LIMIT)
        parse_manifest(f"{snapshot.repository}: the manifest of v{number}", digest, data)
        return data

    def _repository(self, name: str) -> str:
        return check_repository(f"{self._url.place}/{self._url.prefix or name}")

    def _read(self, repository: str, known: KnownEntry) -> HubState | None:
        """Read a repository as it is now, None where there is none."""
        snapshot = self._find(repository)
        return None if snapshot is None else read_log(self._client, snapshot, known, self._jobs)

    def _find(self, repository: str) -> Snapshot | None:
        try:
            return read_snapshot(self._client, repository)
        except NotFoundError:
            return None

    def _state(self, name: str) -> HubState:
        """Return the repository of a log as it was read last; NotFoundError where there is none."""
        if name not in self._states and self.log(name, _nothing) is None:
            raise NotFoundError(f"{self.url}: no adapter {name!r} there")
        return self._states[name]

    def _prepare(self, repository: str) -> bool:
        """Make the repository where there is none, and say whether files go there by Xet.

        Raises ConflictError for one with files that loramgr did not put there.
        """
        with self._lock:
            alone = self._preparing.setdefault(repository, Lock())
        with alone:
            if repository not in self._prepared:
                snapshot = self._find(repository)
                if snapshot is None:
                    self._client.create(repository, private=True if self._url.option("private") else None)
                    snapshot = read_snapshot(self._client, repository)
                self._refuse_foreign(snapshot)
                self._prepared[repository] = self._client.has_xet(snapshot.repository)
            return self._prepared[repository]

    def _begin(self, push: Push, known: Mapping[str, Entry]) -> HubState:
        """Return the state on which a new log begins; ConflictError where there is another one."""
        repository = self._repository(push.name)
        self._prepare(repository)
        found = self._read(repository, known.get)
        if found is None:
            raise push.moved_on(None)
        self._refuse_other(push, known, found)
        return found

    def _refuse_other(self, push: Push, known: Mapping[str, Entry], found: HubState) -> None:
        """Refuse a repository with log entries that a new log does not have."""
        if found.entries.keys() <= known.keys():
            return
        if known.keys().isdisjoint(found.entries):
            raise push.taken(found)
        raise push.moved_on(found) if found.name == push.name else push.renamed(found)

    def _refuse_foreign(self, snapshot: Snapshot) -> None:
        if not snapshot.entries and snapshot.foreign:
            raise ConflictError(
                f"{snapshot.repository} holds {snapshot.foreign[0]}, which loramgr did not push: it would be replaced",
                f"loramgr pull hf://{snapshot.repository}, and push it to another repository",
            )

    def _expected(self, push: Push, expected: RemoteLog, known: Mapping[str, Entry]) -> HubState:
        """Return the state that was read, in the repository that the log will have; ConflictError for another one."""
        state = self._states.get(expected.name)
        if state is None or state.snapshot.commit != expected.state:
            state = self._read(self._repository(expected.name), known.get)
        if state is None or not {entry.digest for entry in expected.entries} <= state.entries.keys() <= known.keys():
            raise push.moved_on(state)
        target = self._repository(push.name)
        if state.snapshot.repository == target or push.name == expected.name:
            return state
        holder = self._read(target, known.get)
        if holder is not None and holder.snapshot.repository == target:
            raise push.taken(holder)
        self._client.move(state.snapshot.repository, target)
        return HubState(read_snapshot(self._client, target), state.entries)

    def _commits_of(self, name: str, number: int) -> Iterator[Snapshot]:
        """Yield the commits that may have the files of a version, the most likely ones first."""
        head = self._state(name).snapshot
        repository = head.repository
        yield head
        seen = {head.commit}
        with self._lock:
            tags = self._refs.get(repository)
        if tags is None:
            tags = self._refs[repository] = git_tags(self._client, repository)
        tagged = tags.get(version_tag(number))
        if tagged is not None:
            seen.add(tagged)
            yield self._snapshot(repository, tagged)
        for commit in self._writer.commits(repository, f" v{number}"):
            if commit not in seen:
                yield self._snapshot(repository, commit)

    def _commit_of(self, state: HubState, entry: Entry) -> str | None:
        """Return the commit that brought a version, by its title and what is in it; None where it is not found."""
        repository, number = state.snapshot.repository, entry.content["number"]
        files = [FileRecord(**file) for file in entry.content["summary"]["files"]]
        for commit in self._writer.commits(repository, f" v{number}"):
            found = self._snapshot(repository, commit)
            if entry.content["version"] in found.manifests and all(found.find(file) for file in files):
                return commit
        return None

    def _snapshot(self, repository: str, commit: str) -> Snapshot:
        with self._lock:
            found = self._snapshots.get((repository, commit))
        if found is None:
            found = read_snapshot(self._client, repository, commit)
            with self._lock:
                self._snapshots[repository, commit] = found
        return found


def _nothing(_: str) -> Entry | None:
    return None


def _is_name(text: str) -> bool:
    try:
        return check_name(text) == text
    except UsageError:
        return False
