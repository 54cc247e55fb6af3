"""Use case: make a version of a repository on a Hugging Face hub that loramgr did not write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loramgr.checkpoints.hub import HubAddress, parse_address
from loramgr.errors import ConflictError, IncompatibleError, IntegrityError, NotFoundError
from loramgr.formats.folder import CONFIGURATION, REMAINDER, WEIGHTS, is_tokenizer_file
from loramgr.records import FileRecord, TransferReport
from loramgr.references import check_name
from loramgr.remotes.hub_client import MAIN, HubClient, check_repository
from loramgr.remotes.hub_log import read_log, top_of
from loramgr.remotes.hub_snapshot import CARD, HubFile, Snapshot, blob_id, read_snapshot
from loramgr.workspace.adding import add_adapter
from loramgr.workspace.derived import scratch_folder
from loramgr.workspace.fetching import Wanted, fetch, partial_folder
from loramgr.workspace.home import Home
from loramgr.workspace.listing import log_of
from loramgr.workspace.options import AddOptions, PullOptions
from loramgr.workspace.sources import slug
from loramgr.workspace.transfers import Moved, bar

__all__ = ["pull_foreign"]

_SMALL = 64 << 20  # bytes of a file that the hub does not keep by LFS; hubs themselves stop at 10 MB
_ATTEMPTS = 2


def pull_foreign(home: Home, address: str, options: PullOptions) -> TransferReport:
    """Make a version of the PEFT adapter in a repository, given as `hf://org/name[@revision]`.

    It gets the repository's name and is tied to its base where that is registered; repository and commit are its
    labels `source` and `commit`. Of a repository that loramgr pushed comes the version itself, with its number and log.
    Raises NotFoundError for what is not there, IncompatibleError where there is no adapter, IntegrityError for a file
    that is not what the hub says, and ConflictError when an adapter that came from elsewhere has the name.
    """
    parsed = parse_address(address)
    repository = check_repository(parsed.repository)
    client = HubClient()
    snapshot = read_snapshot(client, repository, parsed.revision or MAIN)
    if snapshot.entries:
        return _pull_version(home, client, parsed, snapshot, options)
    return _Foreign(home, client, snapshot).pull(dry_run=options.dry_run)


def _pull_version(
    home: Home, client: HubClient, address: HubAddress, snapshot: Snapshot, options: PullOptions
) -> TransferReport:
    """Pull what loramgr pushed: the latest version, or where a revision is named the one at its top."""
    from loramgr.workspace.pulling import pull
    from loramgr.workspace.remote_logs import known_entries

    state = read_log(client, snapshot, known_entries(home), home.jobs)
    top = top_of(state.entries, {*snapshot.manifests})
    if state.name is None or (address.revision is not None and top is None):
        raise NotFoundError(f"{address}: no version lies there", f"loramgr pull hf://{snapshot.repository}")
    of_version = f"@v{top.published.content['number']}" if top and address.revision is not None else ""
    remote = PullOptions(f"hf:{snapshot.repository}", options.all_versions, options.rebase, options.dry_run)
    return pull(home, [state.name + of_version], remote)


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A repository at one commit, and the home that its adapter comes to."""

    home: Home
    client: HubClient
    snapshot: Snapshot

    @property
    def url(self) -> str:
        """The address of the repository."""
        return f"hf://{self.snapshot.repository}"

    def read_blob(self, name: str, number: int, file: FileRecord, offset: int = 0) -> Iterator[bytes]:
        """Yield a file of the repository from an offset on, not hashed; name and number are those of no version."""
        yield from self.client.stream(self.snapshot.repository, self.snapshot.commit, file.path, offset)

    def pull(self, *, dry_run: bool) -> TransferReport:
        """Bring the files and add them."""
        name = slug(self.snapshot.repository.rpartition("/")[2])
        self._check_name(name)
        files = self._wanted()
        size = sum(file.size for file in files)
        if dry_run:
            return Moved(len(files), 0, size, 1, (name,)).report(self.url)
        unhashed = [file.path for file in files if file.digest is None]
        with scratch_folder(self.home) as scratch, bar(self.home, "pull", size) as progress:
            folder = scratch / name
            for file in files:
                self._bring(file, folder / file.path, progress.update)
            told = {"source": self.url, "commit": self.snapshot.commit}
            message = f"from {self.url}@{self.snapshot.commit[:12]}"
            added = add_adapter(self.home, folder, AddOptions(name=name, message=message, labels=told))
        notes = [*added.warnings]
        if unhashed:
            notes.append(f"the hub has no sha256 of {', '.join(unhashed)}: compared with git's sha1")
        moved = Moved(len(files), 0, size, int(added.created), (f"{added.name}@v{added.version}",), tuple(notes))
        return moved.report(self.url)

    def _check_name(self, name: str) -> None:
        check_name(name)
        try:
            versions = log_of(self.home, name)
        except NotFoundError:
            return
        if not any(version.labels.get("source") == self.url for version in versions):
            raise ConflictError(
                f"the adapter {name!r} here did not come from {self.url}", f"loramgr rename {name} NEW, and pull again"
            )

    def _wanted(self) -> list[HubFile]:
        """Return the files that make the adapter, and no others."""
        there = self.snapshot.files
        if CONFIGURATION not in there:
            below = sorted(path for path in there if path.endswith(f"/{CONFIGURATION}"))
            hint = f"loramgr base add {self.url}" if "config.json" in there else None
            more = f", only {below[0]} beneath its top" if below else ""
            raise IncompatibleError(f"{self.url} holds no PEFT adapter: there is no {CONFIGURATION}{more}", hint)
        weights = next((name for name in WEIGHTS if name in there), None)
        if weights is None:
            raise IncompatibleError(f"{self.url}: {CONFIGURATION} is there, and neither {' nor '.join(WEIGHTS)}")
        kept = {CONFIGURATION, weights, CARD, REMAINDER}
        return [file for path, file in sorted(there.items()) if path in kept or is_tokenizer_file(path)]

    def _bring(self, file: HubFile, target: Path, observe: Callable[[int], object]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.digest is not None:
            wanted = Wanted(self.snapshot.repository, 0, FileRecord(file.path, file.digest, file.size))
            shutil.move(fetch(self, wanted, partial_folder(self.home.cache), observe), target)
            return
        if file.size > _SMALL:
            raise IntegrityError(f"{self.url}: {file.path} has {file.size:,} bytes and no sha256")
        for _ in range(_ATTEMPTS):
            data = self.client.read(self.snapshot.repository, self.snapshot.commit, file.path, file.size)
            if len(data) == file.size and blob_id(data) == file.oid:
                target.write_bytes(data)
                observe(len(data))
                return
        raise IntegrityError(f"{self.url}: {file.path} is not what the hub's list of files says", "pull again")
