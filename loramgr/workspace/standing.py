"""What a model folder is, a base or a merge, and whether it is still what it was made as."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from loramgr.checkpoints.fingerprint import FingerprintCache, fingerprint
from loramgr.checkpoints.source import open_checkpoint
from loramgr.digests import TensorDigest, digest_file, parse_tensor_lines, tensors_digest
from loramgr.records import MergeReport, StatusReport
from loramgr.workspace.home import Home
from loramgr.workspace.merged import MergedFolder, read_record
from loramgr.workspace.sources import absolute

__all__ = ["differing", "file_digest", "modified", "status"]


def status(home: Home, folder: Path) -> StatusReport:
    """Say what a model folder is, a base or a merge, and which tensors and files changed since it was made."""
    found = fingerprint(open_checkpoint(folder), home.jobs, home.progress, FingerprintCache(home.cache))
    record = read_record(folder) if folder.is_dir() else None
    digest = tensors_digest(found.values())
    if record is None:
        return _status_of_base(home, folder, found, digest)
    facts = {field.name: getattr(record.report, field.name) for field in fields(MergeReport)}
    return StatusReport(**{**facts, "output": str(folder.absolute())}, modified=_modified(home, folder, record, found))


def modified(home: Home, folder: Path, record: MergedFolder) -> list[str]:
    """Read a merged folder again, every byte of it, and return the tensors and files that changed since it was made."""
    return _modified(home, folder, record, fingerprint(open_checkpoint(folder), home.jobs, home.progress, None))


def _modified(home: Home, folder: Path, record: MergedFolder, found: dict[str, TensorDigest]) -> list[str]:
    is_same = tensors_digest(found.values()) == record.report.output_digest
    tensors = [] if is_same else _modified_tensors(home, record, found)
    return [*tensors, *(file["path"] for file in record.files if file_digest(folder / file["path"]) != file["after"])]


def _modified_tensors(home: Home, record: MergedFolder, found: dict[str, TensorDigest]) -> list[str]:
    """Name the tensors that are not as the merge left them, as far as the base's list of tensors is at hand."""
    changed = {change.name: change.after for change in record.tensors}
    modified = {name for name, after in changed.items() if name not in found or found[name].sha256 != after}
    if home.store.blobs.contains(record.report.base_digest):
        base = parse_tensor_lines(home.store.blobs.get(record.report.base_digest))
        modified |= {name for name in base.keys() - changed.keys() if name not in found}
        modified |= {name for name in found.keys() - changed.keys() if _sha256(base.get(name)) != found[name].sha256}
    return sorted(modified) or [f"tensors ({record.report.base_digest} is not at hand to tell which)"]


def _sha256(tensor: TensorDigest | None) -> str | None:
    return None if tensor is None else tensor.sha256


def _status_of_base(home: Home, folder: Path, found: dict[str, TensorDigest], digest: str) -> StatusReport:
    with home.catalog.reading() as reader:
        registered = [base for base in reader.bases() if base.source == str(absolute(folder))]
    modified: list[str] = []
    if registered and registered[0].digest != digest:
        modified = differing(parse_tensor_lines(home.store.blobs.get(registered[0].digest)), found)
    return StatusReport(
        output=str(folder.absolute()),
        base_digest=digest,
        adapters=[],
        numerics="exact",
        modules_merged=0,
        tensors_changed=0,
        tensors_added=[],
        tensors_total=len(found),
        bytes_read=0,
        bytes_written=0,
        device="cpu",
        kernel="torch",
        seconds=0.0,
        output_digest=digest,
        modified=modified,
    )


def file_digest(path: Path) -> str | None:
    """Return the digest of a file, None where there is none."""
    return digest_file(path) if path.is_file() else None


def differing(expected: dict[str, TensorDigest], found: dict[str, TensorDigest]) -> list[str]:
    """Return the names whose tensors differ, or that only one side has."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
