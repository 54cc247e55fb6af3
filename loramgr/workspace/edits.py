"""Use cases that say something about versions: tags, labels, metrics, names, bases, removal."""

from __future__ import annotations

from collections.abc import Mapping

from loramgr.catalog.catalog import Writer
from loramgr.errors import ConflictError, NotFoundError, UsageError
from loramgr.formats import examine, read_adapter
from loramgr.records import Removal, VersionRecord
from loramgr.references import check_name, check_tag, parse_reference
from loramgr.workspace.adapters import manifest, publish, reference, summary
from loramgr.workspace.home import Home
from loramgr.workspace.matching import match_base, resolved_for
from loramgr.workspace.options import AddOptions

__all__ = ["bind", "label", "measure", "remove", "rename", "tag", "untag"]


def tag(home: Home, ref: str, name: str, *, move: bool) -> VersionRecord:
    """Give a version a tag; ConflictError when another version of the adapter has it, unless it is to move."""
    check_tag(name)
    with home.writing() as writer:
        version = writer.version(ref)
        if name not in version.tags:
            holder = _holder(writer, version.name, name)
            if holder is not None and not move:
                raise ConflictError(
                    f"the tag {name} is on {reference(holder)}", f"loramgr tag {reference(version)} {name} --move"
                )
            home.record(writer, "adapter", "tag", version.name, {"tag": name, "number": version.version})
        return writer.version(reference(version))


def untag(home: Home, ref: str) -> VersionRecord:
    """Take a tag, given as `name@tag`, off the version it is on."""
    name = parse_reference(ref).tag
    if name is None:
        raise UsageError(f"{ref!r} names no tag", "loramgr untag NAME@TAG")
    with home.writing() as writer:
        version = writer.version(ref)
        home.record(writer, "adapter", "untag", version.name, {"tag": name})
        return writer.version(reference(version))


def label(home: Home, ref: str, labels: Mapping[str, str | None]) -> VersionRecord:
    """Set labels of a version; None drops one, NotFoundError when there is none to drop."""
    return _edit(home, ref, "label", labels)


def measure(home: Home, ref: str, metrics: Mapping[str, float | None]) -> VersionRecord:
    """Set metrics of a version; None drops one, UsageError for a number that is not finite."""
    return _edit(home, ref, "metric", metrics)


def rename(home: Home, name: str, new: str) -> VersionRecord:
    """Give an adapter another name; ConflictError when it is taken. The log keeps both."""
    check_name(new)
    with home.writing() as writer:
        writer.log(name)  # NotFoundError for an adapter that is not there
        if name != new:
            home.record(writer, "adapter", "rename", new, {"from": name})
        return writer.version(new)


def bind(home: Home, ref: str, base: str, *, force: bool = False) -> VersionRecord:
    """Tie an adapter to a base, after checking names and shapes: a new version with the old one as parent.

    Returns the version itself when it belongs to that base already. Raises IncompatibleError when it does not fit.
    """
    with home.catalog.reading() as reader:
        version = reader.version(ref)
    with home.files_of(version) as folder:
        adapter = read_adapter(folder)
        match = match_base(home, adapter, base, force=force)
        if version.base is not None and version.base.digest == match.digest:
            return version
        files, examination = version.files, examine(adapter)
        adapter = resolved_for(home, adapter, match.digest)
    content = {
        "summary": summary(adapter, examination, files, match.digest),
        "parents": [{"ref": reference(version), "digest": version.digest}],
    }
    options = AddOptions(message=version.message, labels=version.labels, metrics=version.metrics)
    with home.provisional() as new:
        digest = new.put_manifest(manifest(adapter, files, match.digest))
        with home.writing() as writer:
            return publish(home, writer, version.name, {"version": digest, **content}, options)


def remove(home: Home, ref: str, *, force: bool, dry_run: bool) -> Removal:
    """Drop a version, or by its bare name an adapter.

    Raises ConflictError while what is dropped is tagged or a parent of what stays, unless forced.
    """
    parsed = parse_reference(ref)
    whole = parsed.name is not None and (parsed.number, parsed.tag, parsed.digest) == (None, None, None)
    with home.writing() as writer:
        versions = writer.log(str(parsed.name)) if whole and "@" not in ref else [writer.version(ref)]
        name, removed = versions[0].name, [reference(version) for version in versions]
        whole = len(versions) == len(writer.log(name))
        if not force:
            _refuse_if_needed(writer, versions, ref)
        if not dry_run:
            numbers = sorted(version.version for version in versions)
            home.record(writer, "adapter", "remove", name, {"numbers": numbers, "whole": whole})
    return Removal(removed)


def _refuse_if_needed(writer: Writer, versions: list[VersionRecord], ref: str) -> None:
    dropped = {reference(version) for version in versions}
    for version in versions:
        if version.tags:
            raise ConflictError(
                f"{reference(version)} is tagged {', '.join(version.tags)}", f"loramgr remove {ref} --force"
            )
        children = [child for child in writer.children(reference(version)) if child not in dropped]
        if children:
            raise ConflictError(
                f"{reference(version)} is the parent of {', '.join(children)}", f"loramgr remove {ref} --force"
            )


def _holder(writer: Writer, name: str, tag_name: str) -> VersionRecord | None:
    try:
        return writer.version(f"{name}@{tag_name}")
    except NotFoundError:
        return None


def _edit(
    home: Home, ref: str, kind: str, values: Mapping[str, str | None] | Mapping[str, float | None]
) -> VersionRecord:
    with home.writing() as writer:
        version = writer.version(ref)
        known: Mapping[str, object] = version.labels if kind == "label" else version.metrics
        absent = sorted(key for key, value in values.items() if value is None and key not in known)
        if absent:
            raise NotFoundError(
                f"{reference(version)} has no {kind} {', '.join(absent)}", f"loramgr log {version.name}"
            )
        new = {key: value for key, value in values.items() if known.get(key) != value}
        if new:
            home.record(writer, "adapter", kind, version.name, {"number": version.version, f"{kind}s": new})
        return writer.version(reference(version))
