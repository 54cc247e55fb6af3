"""What the use cases return: frozen records whose fields are the JSON keys of the command line.

Sizes are bytes, times ISO 8601 UTC, digests `sha256:` + 64 hex. More fields may be added, none is renamed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from loramgr.errors import LoramgrError
from loramgr.exchanges import RemoteRecord, RemoteStatus, RemoteVerification, RemoteVersionRecord, TransferReport
from loramgr.figures import DiffReport, DiffSummary, FileReport, ModuleDifference, ModuleError, ModuleRecord

__all__ = [
    "AddedVersion",
    "Addition",
    "ArchiveReport",
    "BaseRecord",
    "BaseReference",
    "BaseVerification",
    "DerivedVersion",
    "DiffReport",
    "DiffSummary",
    "ExportReport",
    "FileRecord",
    "FileReport",
    "GcReport",
    "HistoryEntry",
    "InspectReport",
    "LiveReport",
    "MergeCheck",
    "MergeReport",
    "MergedAdapter",
    "ModuleDifference",
    "ModuleError",
    "ModuleRecord",
    "RebuildReport",
    "RecomposeReport",
    "RemoteRecord",
    "RemoteStatus",
    "RemoteVerification",
    "RemoteVersionRecord",
    "Removal",
    "SchemaReport",
    "StatusReport",
    "StoreVerification",
    "TensorChange",
    "TransferReport",
    "UnmergeReport",
    "Usage",
    "VersionRecord",
    "to_json",
]


@dataclass(frozen=True)
class FileRecord:
    """One file of a version: its path inside the adapter's folder, digest, and size in bytes."""

    path: str
    digest: str
    bytes: int


@dataclass(frozen=True)
class BaseReference:
    """The base a version belongs to; `name` is None when no base of that digest is registered here."""

    name: str | None
    digest: str


@dataclass(frozen=True)
class BaseRecord:
    """A registered base model.

    `source` is the folder, file or `hf://` address it was read from; `revision` the commit, None for local files;
    `dtype` the one most parameters have; `architecture` the first of its configuration, None without one.
    """

    name: str
    digest: str
    source: str
    revision: str | None
    tensors: int
    parameters: int
    bytes: int
    dtype: str
    architecture: str | None
    created_at: str


@dataclass(frozen=True)
class VersionRecord:
    """One immutable state of an adapter.

    `rank` is the largest of `ranks` (module → rank) and None for methods without one; `alpha` and `scaling` are those
    of the configuration, before patterns, and None where it has none; `parents` are references as `name@vN`.
    """

    name: str
    version: int
    digest: str
    weights_digest: str
    base: BaseReference | None
    method: str
    format: str
    rank: int | None
    ranks: dict[str, int]
    alpha: float | None
    scaling: float | None
    target_modules: list[str]
    parameters: int
    bytes: int
    dtype: str
    files: list[FileRecord]
    parents: list[str]
    tags: list[str]
    labels: dict[str, str]
    metrics: dict[str, float]
    message: str
    created_at: str


@dataclass(frozen=True)
class AddedVersion(VersionRecord):
    """A version after `add`; `created` is False when the same files were a version already."""

    created: bool
    warnings: list[str]


@dataclass(frozen=True)
class DerivedVersion(AddedVersion):
    """A version that was computed; `method` is by what: extract, resize, or one of compose's methods.

    `relative_error` is the Frobenius norm of the difference over that of what was wanted, over all modules with
    factors together; None where nobody computed it. `errors` has each of them.
    """

    relative_error: float | None
    errors: list[ModuleError]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RecomposeReport:
    """A composed version made again from its recipe, beside the one that is stored.

    `same` says that the weights are, bit for bit; else `relative_distance` is the Frobenius norm of the difference of
    all deltas over that of the stored ones. `made_with` and `recomposed_with` are the versions of loramgr and torch.
    """

    ref: str
    method: str
    same: bool
    weights_digest: str
    recomposed_digest: str
    relative_distance: float
    made_with: dict[str, str]
    recomposed_with: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Addition:
    """What came of adding several adapters: the versions in their order, and the error of each path that failed.

    `skipped` are the files that are no adapters, each with what it is instead.
    """

    added: list[AddedVersion]
    failed: dict[str, LoramgrError]
    skipped: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise an error of the first failure's kind that tells all of them, when there are any."""
        if not self.failed:
            return
        first = next(iter(self.failed.values()))
        told = "".join(
            f"\n{error.message}" if path in error.message else f"\n{path}: {error.message}"
            for path, error in self.failed.items()
        )
        total = len(self.added) + len(self.failed)
        raise type(first)(f"{len(self.failed)} of {total} adapters were not added:{told}", first.hint)


@dataclass(frozen=True)
class InspectReport(VersionRecord):
    """A version with what its tensors say; `reason` tells why it is not `mergeable`, and is None when it is.

    `share_of_base` is parameters over the base's, None without a registered base; `plot` the picture, if one was made;
    `training` is what the file's metadata says of the training (kohya's `ss_*`), empty where it says nothing;
    `dialect` is the spelling of a format that has several, else None, and `evidence` what the format was recognised by.
    """

    modules: list[ModuleRecord]
    warnings: list[str]
    mergeable: bool
    reason: str | None
    share_of_base: float | None
    plot: str | None = None
    training: dict[str, str] = field(default_factory=dict)
    dialect: str | None = None
    evidence: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter in a merge: the version's reference and digest, and the weight it was added with."""

    ref: str
    digest: str
    weight: float


@dataclass(frozen=True)
class TensorChange:
    """A tensor that a merge changed; `before` is None for one it added, `after` None for one it took away."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class MergeReport:
    """What a merged model folder is, and what making it took."""

    output: str
    base_digest: str
    adapters: list[MergedAdapter]
    numerics: str
    modules_merged: int
    tensors_changed: int
    tensors_added: list[str]
    tensors_total: int
    bytes_read: int
    bytes_written: int
    device: str
    kernel: str
    seconds: float
    output_digest: str
    dtype: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LiveReport:
    """What a merge, switch or unmerge of a model in memory did.

    `adapters` are merged now, none for the base; `tensors` is the number of those that changed, `kernels` which code
    changed them ("triton", "torch"); `residual_bytes` of memory are kept for the way back to the base.
    """

    adapters: list[MergedAdapter]
    tensors: int
    kernels: list[str]
    residual_bytes: int
    seconds: float


@dataclass(frozen=True)
class StatusReport(MergeReport):
    """A model folder as it is now; `modified` names the tensors and files that changed since it was made."""

    modified: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MergeCheck:
    """The result of replaying a recorded merge and comparing it bit for bit."""

    ok: bool
    tensors: int
    mismatched: list[str]


@dataclass(frozen=True)
class UnmergeReport:
    """A base restored from a merged folder; `source` says from what, and `exact` is proved by the digest."""

    output: str
    base_digest: str
    exact: bool
    source: str


@dataclass(frozen=True)
class BaseVerification:
    """The result of reading a base again, tensor by tensor."""

    ok: bool
    tensors: int
    mismatched: list[str]


@dataclass(frozen=True)
class StoreVerification:
    """The result of reading the store and the catalog again; things are named as `kind digest: what is wrong`.

    `checked` is the number of files looked at; `unchecked` what could not be read, so that nothing is known about it;
    `repaired` what a repair did, before the rest was read once more.
    """

    checked: int
    corrupt: list[str]
    missing: list[str]
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GcReport:
    """What gc took out of the store and into its trash, as `kind digest`, and their size in bytes.

    `purged` is what had been in the trash for longer than the grace and is deleted for good, of `purged_bytes`.
    """

    removed: list[str]
    bytes: int
    purged: list[str]
    purged_bytes: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ExportReport:
    """An adapter written for another tool; `notes` say what the reader should know."""

    output: str
    files: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Removal:
    """What a removal took out of the catalog, as `name@vN` references or base names."""

    removed: list[str]


@dataclass(frozen=True)
class SchemaReport:
    """The revision of the catalog's schema and the newest one this loramgr knows; None before the first use."""

    revision: str | None
    head: str


@dataclass(frozen=True)
class RebuildReport:
    """What a rebuild of the catalog read: numbers of entries and logs that count, and the forks it left aside.

    `forks` are the digests of the entries where the branches left aside begin; they stay in the store.
    """

    entries: int
    logs: int
    forks: list[str]


@dataclass(frozen=True)
class HistoryEntry:
    """A log entry: what happened to a name, when, and who did it; `content` is told in `loramgr.log.Entry`."""

    digest: str
    log: str
    kind: str
    name: str
    time: str
    author: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """The bytes that an adapter or base takes, or a group of blobs whose name stands in parentheses."""

    name: str
    bytes: int


@dataclass(frozen=True)
class ArchiveReport:
    """What a home archive holds, or what of it was new where it was imported: versions, and bytes of their files."""

    versions: int
    bytes: int
    notes: list[str] = field(default_factory=list)


def to_json(record: Any) -> Any:
    """Return a record, or a list of them, as plain JSON values."""
    return [asdict(item) for item in record] if isinstance(record, list) else asdict(record)
