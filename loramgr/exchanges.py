"""What the use cases return of remotes, and of what goes there and comes back; `loramgr.records` offers it too."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RemoteRecord", "RemoteStatus", "RemoteVerification", "RemoteVersionRecord", "TransferReport"]


@dataclass(frozen=True)
class RemoteRecord:
    """A registered remote; `url` has no secrets in it."""

    name: str
    url: str
    created_at: str


@dataclass(frozen=True)
class TransferReport:
    """What a push or a pull moved; with a dry run what it would move.

    `transferred` and `skipped` are numbers of files: those that went over, and those that the other side had; `bytes`
    is the size of the former, `entries` the number of log entries that went over. `versions` are those that came to
    be there, as `name@vN`: their files, or for an adapter whose files were there, what is said of them.
    """

    remote: str
    transferred: int
    skipped: int
    bytes: int
    versions: list[str]
    entries: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RemoteStatus:
    """How an adapter here compares with the one at a remote.

    `state` is same, ahead (this home has entries that the remote lacks), behind, diverged (both), forked (the remote
    has several heads), here or there (only in one place); `ahead` and `behind` are numbers of log entries, `heads` the
    digests of the last entries there.
    """

    name: str
    state: str
    ahead: int
    behind: int
    heads: list[str]
    remote: str


@dataclass(frozen=True)
class RemoteVersionRecord:
    """An adapter at a remote, by its newest version: digest, bytes of its files, how many versions there are.

    `message` is what was said when that version was published, `tags` are those of all versions as `tag@vN`;
    `here` says whether this home has the files of that version.
    """

    name: str
    version: int
    digest: str
    base: str | None
    method: str
    bytes: int
    versions: int
    tags: list[str]
    message: str
    created_at: str
    here: bool


@dataclass(frozen=True)
class RemoteVerification:
    """The result of reading a remote, as `StoreVerification`; `checked` counts log entries, manifests and files."""

    checked: int
    corrupt: list[str]
    missing: list[str]
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
