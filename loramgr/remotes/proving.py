"""Proves what a remote says: entries, chains of them, and manifests; whatever is wrong is an IntegrityError.

`where` begins the message and names what was read, as in `s3://bucket/adapters: log entry sha256:…`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from loramgr.containment import is_contained, is_printable
from loramgr.digests import canonical_json, digest_bytes, is_digest, short
from loramgr.errors import IntegrityError, LoramgrError
from loramgr.log import Entry
from loramgr.references import check_name, check_tag

__all__ = ["ENTRY_LIMIT", "MANIFEST_LIMIT", "check_entry", "check_files", "check_log", "parse_manifest", "prove_entry"]

ENTRY_LIMIT = 4 << 20
MANIFEST_LIMIT = 16 << 20
DEPTH = 64
LARGEST = 1 << 53  # what RFC 8785 writes as an integer is below
VALUES = 100_000  # lists and objects in one entry or manifest: each takes far more memory than its two brackets
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")


def prove_entry(where: str, digest: str, data: bytes) -> Entry:
    """Read an entry of an adapter's log that a remote gave for a digest, and check everything it says by itself."""
    _check_bytes(where, digest, data, ENTRY_LIMIT)
    with _worded(where):
        entry = Entry.decode(data)
        if entry.encode() != data:
            raise IntegrityError("not in canonical form")
        _check_entry(entry)
    return entry


def check_entry(where: str, entry: Entry) -> None:
    """Refuse an entry, made here, that `prove_entry` would refuse elsewhere."""
    if len(entry.encode()) > ENTRY_LIMIT:
        raise IntegrityError(f"{where}: larger than {ENTRY_LIMIT} bytes")
    with _worded(where):
        _check_entry(entry)


def parse_manifest(where: str, digest: str, data: bytes) -> dict[str, Any]:
    """Read a version's manifest that a remote gave for a digest; its files stay inside their folder."""
    _check_bytes(where, digest, data, MANIFEST_LIMIT)
    with _worded(where):
        manifest = json.loads(data)
        _check_type(manifest, dict, "a manifest")
        if canonical_json(manifest) != data:
            raise IntegrityError("not in canonical form")
        check_files(manifest["files"])
    return dict(manifest)


@contextmanager
def _worded(where: str) -> Iterator[None]:
    """Say where it is that something is wrong."""
    try:
        yield
    except LoramgrError as error:  # its hint, but for a newer loramgr, is for what stands here
        hint = error.hint if error.hint == "upgrade loramgr" else None
        raise IntegrityError(f"{where}: {error.message}", hint) from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise IntegrityError(f"{where}: lacks a value or has a wrong one: {error}") from error


def check_log(where: str, entries: Sequence[Entry]) -> None:
    """Refuse a log in which an entry does not follow from those before it; branches share what they have in common."""
    before: dict[str, tuple[Entry, int]] = {}  # each entry by its digest, and the highest version number up to it
    for entry in entries:
        if entry.log != "adapter":
            raise _broken(where, entry, f"belongs to a log of kind {entry.log!r}, not to an adapter's")
        number = 0
        if entry.predecessor is None:
            if entry.kind != "publish":
                raise _broken(where, entry, f"begins its log with a {entry.kind}")
        else:
            previous, number = before[entry.predecessor]
            _check_name_follows(where, previous, entry)
        if entry.kind == "publish":
            if entry.content["number"] <= number:
                raise _broken(where, entry, f"uses the version number {entry.content['number']} again")
            number = entry.content["number"]
        before[entry.digest] = (entry, number)


def _check_name_follows(where: str, previous: Entry, entry: Entry) -> None:
    renamed = entry.kind == "rename" and entry.content.get("from") == previous.name
    if entry.name != previous.name and not renamed:
        raise _broken(where, entry, f"is about {entry.name!r}, the one before it about {previous.name!r}")


def check_files(files: Any) -> None:
    """Refuse a list of files {path, digest, bytes} that a folder cannot hold; IntegrityError says why."""
    _check_type(files, list, "files")
    taken: set[str] = set()
    alike: dict[str, str] = {}
    for file in files:
        _check_type(file, dict, "a file")
        path, digest, size = file["path"], file["digest"], file["bytes"]
        if len(file) > 3:
            raise IntegrityError(f"says of a file what files do not have: {sorted(file)}")
        _check_path(path)
        _check_digest(digest, f"the digest of {path}")
        _check_count(size, 0, f"the size of {path}")
        if path in taken:
            raise IntegrityError(f"names the file {path!r} twice")
        other = alike.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
        if other != path:
            raise IntegrityError(f"names the files {other!r} and {path!r}, which some file systems take for one")
        taken.add(path)
    for path in taken:
        if not taken.isdisjoint(str(parent) for parent in PurePosixPath(path).parents):
            raise IntegrityError(f"names the file {path!r}, in a folder that is a file")


def _check_path(path: Any) -> None:
    _check_type(path, str, "a path")
    if not is_contained(path) or str(PurePosixPath(path)) != path:
        raise IntegrityError(f"names the file {path!r}, outside of its folder")
    if not is_printable(path):
        raise IntegrityError(f"names the file {path!r}, with control characters")


def _check_bytes(where: str, digest: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise IntegrityError(f"{where}: larger than {limit} bytes")
    if (found := digest_bytes(data)) != digest:
        raise IntegrityError(f"{where}: damaged, the bytes there are {short(found)}")
    depth = 0
    values = data.count(b"[") + data.count(b"{")
    if values > VALUES:
        raise IntegrityError(f"{where}: holds more than {VALUES} lists and objects")
    if values > DEPTH:
        for bracket in _BRACKET.finditer(_TEXT.sub(b"", data)):
            depth += 1 if bracket[0] in b"[{" else -1
            if depth > DEPTH:
                raise IntegrityError(f"{where}: nested more than {DEPTH} deep")


def _check_entry(entry: Entry) -> None:
    if entry.log != "adapter":
        raise IntegrityError(f"belongs to a log of kind {entry.log!r}, not to an adapter's")
    check_name(entry.name)
    if entry.predecessor is not None:
        _check_digest(entry.predecessor, "the predecessor")
    if not _TIME.fullmatch(entry.time):
        raise IntegrityError(f"has the impossible time {entry.time!r}")
    _check_type(entry.author, str, "the author")
    _check_type(entry.content, dict, "the content")
    if "original" in entry.content:
        _check_digest(entry.content["original"], "the original")
    _CHECKS[entry.kind](entry.content)


def _check_publish(content: dict[str, Any]) -> None:
    _check_count(content["number"], 1, "the version number")
    _check_digest(content["version"], "the version")
    _check_type(content["message"], str, "the message")
    for tag in content["tags"]:
        check_tag(tag)
    for parent in content["parents"]:
        _check_type(parent["ref"], str, "a parent")
        _check_digest(parent["digest"], "a parent")
    _check_values(content["labels"], str)
    _check_values(content["metrics"], int | float)
    _check_summary(content["summary"])


def _check_summary(summary: dict[str, Any]) -> None:
    check_files(summary["files"])
    _check_digest(summary["weights_digest"], "the weights")
    if summary["base"] is not None:
        _check_digest(summary["base"], "the base")
    for key in ("method", "format", "dtype"):
        _check_type(summary[key], str, key)
    for key in ("parameters", "bytes"):
        _check_count(summary[key], 0, key)
    _check_values(summary["ranks"], int)
    _check_values({key: summary[key] for key in ("rank", "alpha", "scaling")}, int | float | None)
    for key in ("modules", "target_modules"):
        _check_type(summary[key], list, key)
        for name in summary[key]:
            _check_type(name, str, key)


def _check_tag_entry(content: dict[str, Any]) -> None:
    check_tag(content["tag"])
    _check_count(content["number"], 1, "the version number")


def _check_untag(content: dict[str, Any]) -> None:
    check_tag(content["tag"])


def _check_label(content: dict[str, Any]) -> None:
    _check_count(content["number"], 1, "the version number")
    _check_values(content["labels"], str | None)


def _check_metric(content: dict[str, Any]) -> None:
    _check_count(content["number"], 1, "the version number")
    _check_values(content["metrics"], int | float | None)


def _check_rename(content: dict[str, Any]) -> None:
    check_name(content["from"])


def _check_rebase(content: dict[str, Any]) -> None:
    _check_type(content["replaces"], list, "what it replaces")
    for replaced in content["replaces"]:
        _check_digest(replaced, "a replaced entry")


def _check_numbers(content: dict[str, Any]) -> None:
    _check_type(content["whole"], bool, "whole")
    _check_type(content["numbers"], list, "the numbers")
    for number in content["numbers"]:
        _check_count(number, 1, "a version number")


_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "publish": _check_publish,
    "tag": _check_tag_entry,
    "untag": _check_untag,
    "label": _check_label,
    "metric": _check_metric,
    "rename": _check_rename,
    "remove": _check_numbers,
    "restore": _check_numbers,
    "rebase": _check_rebase,
}


def _check_values(values: Any, kind: Any) -> None:
    _check_type(values, dict, "labels or metrics")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, kind):
            raise IntegrityError(f"gives {key!r} the value {value!r}")


def _check_digest(value: Any, what: str) -> None:
    if not (isinstance(value, str) and is_digest(value)):
        raise IntegrityError(f"has {value!r} for {what}, which is no digest")


def _check_count(value: Any, least: int, what: str) -> None:
    if type(value) is not int or not least <= value < LARGEST:
        raise IntegrityError(f"has {value!r} for {what}")


def _check_type(value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise IntegrityError(f"has {what} of the type {type(value).__name__}")


def _broken(where: str, entry: Entry, why: str) -> IntegrityError:
    return IntegrityError(f"{where}: log entry {entry.digest} {why}")
