"""Use cases about bases: register, look up, read again, forget."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from loramgr.catalog.reader import Reader
from loramgr.checkpoints.fingerprint import FingerprintCache, fingerprint
from loramgr.checkpoints.source import Checkpoint
from loramgr.digests import TensorDigest, tensor_lines, tensors_digest
from loramgr.errors import ConflictError
from loramgr.records import BaseRecord, BaseVerification, Removal
from loramgr.references import check_name
from loramgr.workspace.home import Home
from loramgr.workspace.sources import find_base, is_outside, open_source, slug

__all__ = ["add_base", "list_bases", "remove_base", "show_base", "verify_base"]

_PLAIN_STEMS = frozenset({"model", "pytorch_model"})


def add_base(home: Home, source: str, name: str | None) -> BaseRecord:
    """Fingerprint a base and register it; the same base under the same name again changes nothing.

    Raises ConflictError when the name belongs to another base.
    """
    checkpoint, shown, revision = open_source(source)
    name = check_name(name if name is not None else slug(_natural_name(shown)))
    tensors = fingerprint(checkpoint, home.jobs, home.progress, FingerprintCache(home.cache))
    lines = tensor_lines(tensors.values())
    content = _content(checkpoint, tensors, shown, revision)
    with home.provisional() as files, home.writing() as writer:
        existing = _live(writer, name)
        if existing is not None and existing.digest != content["digest"]:
            raise _taken(name, existing)
        if existing is None or (existing.source, existing.revision) != (shown, revision):
            files.put_blob(lines)
            home.record(writer, "base", "add", name, content)
        return writer.base(name)


def list_bases(home: Home) -> list[BaseRecord]:
    """Return all registered bases, by name."""
    with home.catalog.reading() as reader:
        return reader.bases()


def show_base(home: Home, text: str) -> BaseRecord:
    """Return one base, found by name, digest, prefix, path or hub address."""
    if is_outside(text):
        found = find_base(home, text)
        text = found.name or found.digest
    with home.catalog.reading() as reader:
        return reader.base(text)


def verify_base(home: Home, text: str) -> BaseVerification:
    """Read every tensor of a base again and compare it with what was registered."""
    record = show_base(home, text)
    base = find_base(home, record.name)
    found = fingerprint(base.checkpoint, home.jobs, home.progress, None)
    names = sorted(base.tensors.keys() | found.keys())
    mismatched = [name for name in names if base.tensors.get(name) != found.get(name)]
    return BaseVerification(not mismatched, len(names), mismatched)


def remove_base(home: Home, text: str, *, force: bool, dry_run: bool) -> Removal:
    """Forget a base; its files are not touched.

    Raises ConflictError while versions belong to it and no other name has the same digest, unless forced.
    """
    name = show_base(home, text).name
    with home.writing() as writer:
        record = writer.base(name)
        users = writer.versions_of_base(record.digest)
        alone = len(writer.bases_with_digest(record.digest)) == 1
        if users and alone and not force:
            user = f"{users[0].name}@v{users[0].version}"
            raise ConflictError(
                f"{len(users)} versions belong to the base {name}, {user} among them",
                f"loramgr base remove {name} --force",
            )
        if not dry_run:
            home.record(writer, "base", "remove", name, {})
    return Removal([name])


def _natural_name(source: str) -> str:
    path = Path(source)
    if path.suffix and path.is_file():
        return path.parent.name if path.stem in _PLAIN_STEMS else path.stem
    return path.name


def _live(reader: Reader, name: str) -> BaseRecord | None:
    return next((base for base in reader.bases() if base.name == name), None)


def _taken(name: str, existing: BaseRecord) -> ConflictError:
    return ConflictError(
        f"the name {name} belongs to another base, {existing.digest} from {existing.source}",
        f"choose another with --name, or loramgr base remove {name}",
    )


def _content(
    checkpoint: Checkpoint, tensors: dict[str, TensorDigest], source: str, revision: str | None
) -> dict[str, object]:
    specs = [view.spec for view in checkpoint.tensors.values()]
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += spec.elements
    architectures = (checkpoint.config or {}).get("architectures")
    return {
        "digest": tensors_digest(tensors.values()),
        "source": source,
        "revision": revision,
        "tensors": len(specs),
        "parameters": sum(sizes.values()),
        "bytes": sum(spec.nbytes for spec in specs),
        "dtype": sizes.most_common(1)[0][0],
        "architecture": str(architectures[0]) if isinstance(architectures, list) and architectures else None,
    }
