"""What a version is and how it is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter
from loramgr.catalog.catalog import Writer
from loramgr.catalog.reader import LogState
from loramgr.digests import canonical_json
from loramgr.errors import ConflictError, IncompatibleError, NotFoundError
from loramgr.formats.examination import Examination
from loramgr.formats.files import adapter_files
from loramgr.records import FileRecord, VersionRecord
from loramgr.workspace.home import Home
from loramgr.workspace.options import AddOptions
from loramgr.workspace.sources import absolute, slug

__all__ = [
    "MANIFEST_SCHEMA",
    "annotate",
    "check_finite",
    "doubts",
    "find_same",
    "manifest",
    "natural_name",
    "parents_of",
    "publish",
    "record_version",
    "reference",
    "summary",
]

MANIFEST_SCHEMA = 1
_MANY = 5


def reference(version: VersionRecord) -> str:
    """Return how a version is written: `name@vN`."""
    return f"{version.name}@v{version.version}"


def manifest(adapter: Adapter, files: Sequence[FileRecord], base: str | None) -> bytes:
    """Return the manifest that a version digest names: what a version is, and nothing that happened to it."""
    return canonical_json(
        {
            "schema": MANIFEST_SCHEMA,
            "method": adapter.method,
            "files": [asdict(file) for file in sorted(files, key=lambda file: file.path)],
            "config": adapter.config,
            "base": base,
        }
    )


def summary(
    adapter: Adapter, examination: Examination, files: Sequence[FileRecord], base: str | None
) -> dict[str, Any]:
    """Return what the catalog says of a version, as its publish entry records it."""
    return {
        "weights_digest": examination.weights_digest,
        "base": base,
        "method": adapter.method,
        "format": adapter.format,
        "rank": max(adapter.ranks.values(), default=None),
        "ranks": adapter.ranks,
        "alpha": adapter.alpha,
        "scaling": adapter.scaling,
        "target_modules": sorted(adapter.target_modules),
        "modules": sorted({name.rpartition(".")[0] for name in adapter.updates}),
        "parameters": adapter.parameters,
        "bytes": sum(file.bytes for file in files),
        "dtype": adapter.dtype,
        "files": [asdict(file) for file in sorted(files, key=lambda file: file.path)],
    }


def publish(home: Home, writer: Writer, name: str, content: Mapping[str, Any], options: AddOptions) -> VersionRecord:
    """Give a version the next number of its name; `content` has its digest, summary and parents.

    The caller's transaction sees to it that the number is nobody else's. Raises ConflictError when a tag is taken and
    IntegrityError when a file has gone from the store meanwhile.
    """
    return writer.version(record_version(home, writer, name, content, options))


def record_version(home: Home, writer: Writer, name: str, content: Mapping[str, Any], options: AddOptions) -> str:
    """Record that a version was published, as `publish` does, and return its reference."""
    state = writer.log_state("adapter", name)
    number = 1 if state is None else state.next_number
    for tag in options.tags:
        _check_tag_is_free(writer, name, tag, state)
    for file in content["summary"]["files"]:
        home.store.blobs.size(file["digest"])
    said = {
        "number": number,
        "message": options.message,
        "tags": sorted(set(options.tags)),
        "labels": dict(options.labels),
        "metrics": dict(options.metrics),
        "recipe": None if options.recipe is None else dict(options.recipe),
    }
    home.record(writer, "adapter", "publish", name, {**content, **said})
    return f"{name}@v{number}"


def check_finite(path: Path, examination: Examination) -> None:
    """Raise IncompatibleError, naming the tensors, for an adapter with NaN or infinite values."""
    if examination.non_finite:
        tensors = ", ".join(examination.non_finite[:_MANY])
        raise IncompatibleError(
            f"{path}: NaN or infinite values in {tensors}", "train it again, or --force to keep it as it is"
        )


def natural_name(path: Path) -> str:
    """Return the name an adapter gets when none is given: its folder's, or that of the run it is a checkpoint of.

    A file that stands alone gives its own.
    """
    files = adapter_files(path)
    if files.is_single:
        return slug(files.weights.stem)
    folder = absolute(files.folder)
    return slug(folder.parent.name if folder.name.startswith("checkpoint-") else folder.name)


def find_same(writer: Writer, name: str, files: Sequence[FileRecord], base: str | None) -> VersionRecord | None:
    """Return the version that has these files already; one of another base than the one asked for is another."""
    found = writer.find_version_by_files(name, files)
    if found is None or base is None or (found.base is not None and found.base.digest == base):
        return found
    return None


def parents_of(writer: Writer, name: str, asked: Sequence[str]) -> list[dict[str, str]]:
    """Return the parents of a name's next version: those asked for, else its newest version, if there is one."""
    if asked:
        versions = [writer.version(ref) for ref in asked]
        return [{"ref": reference(version), "digest": version.digest} for version in versions]
    newest = writer.newest(name)
    return [] if newest is None else [{"ref": f"{name}@v{newest[0]}", "digest": newest[1]}]


def annotate(home: Home, writer: Writer, version: VersionRecord, options: AddOptions) -> VersionRecord:
    """Say of a version that is there already what a new one would have been published with."""
    for tag in options.tags:
        if tag not in version.tags:
            _check_tag_is_free(writer, version.name, tag, writer.log_state("adapter", version.name))
            home.record(writer, "adapter", "tag", version.name, {"tag": tag, "number": version.version})
    for kind, values, known in (
        ("label", options.labels, version.labels),
        ("metric", options.metrics, version.metrics),
    ):
        new = {key: value for key, value in values.items() if known.get(key) != value}
        if new:
            home.record(writer, "adapter", kind, version.name, {"number": version.version, f"{kind}s": new})
    return writer.version(reference(version))


def _check_tag_is_free(writer: Writer, name: str, tag: str, state: LogState | None) -> None:
    if state is None or state.removed:
        return
    with suppress(NotFoundError):
        holder = writer.version(f"{name}@{tag}")
        raise ConflictError(
            f"the tag {tag} is on {reference(holder)}", f"add it without the tag, then loramgr tag {name} {tag} --move"
        )


def doubts(examination: Examination) -> list[str]:
    """Return a sentence for a person when the adapter does nothing."""
    zero = examination.zero_updates
    if not zero:
        return []
    more = f" and {len(zero) - _MANY} more" if len(zero) > _MANY else ""
    return [f"the update is zero, it changes nothing: {', '.join(zero[:_MANY])}{more}"]
