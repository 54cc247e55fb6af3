"""Where a base is: found by name, digest, path or hub address, and opened with what is known about its tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from loramgr.checkpoints.families import TieGroup, tied_groups
from loramgr.checkpoints.fingerprint import FingerprintCache, fingerprint
from loramgr.checkpoints.source import Checkpoint, open_checkpoint
from loramgr.digests import TensorDigest, parse_tensor_lines, tensors_digest
from loramgr.errors import LoramgrError, NotFoundError, UncheckedError
from loramgr.records import BaseRecord
from loramgr.references import is_path
from loramgr.workspace.home import Home

__all__ = ["OpenBase", "absolute", "base_of_digest", "find_base", "is_outside", "open_source", "slug"]

HUB = "hf://"


@dataclass(frozen=True)
class OpenBase:
    """A base whose files are at hand.

    `name` is None when it is not registered; `source` is the path or hub address, `revision` the commit, None for
    local files; `tensors` are the digests that its bytes must have. `moved` says where files are that do not lie in
    the checkpoint's folder, None for one that the base does not have although there is one.
    """

    name: str | None
    digest: str
    source: str
    revision: str | None
    checkpoint: Checkpoint
    tensors: dict[str, TensorDigest]
    moved: Mapping[str, Path | None] = field(default_factory=dict)

    def file(self, name: str) -> Path | None:
        """Return where the base's file of that relative path is, None when it has none."""
        path = self.moved.get(name, self.checkpoint.root / name)
        return path if path is not None and path.is_file() else None

    @cached_property
    def ties(self) -> list[TieGroup]:
        """The names that are one tensor when the model is opened."""
        checkpoint = self.checkpoint
        return tied_groups(checkpoint.config, list(checkpoint.tensors), checkpoint.aliases)


def is_outside(text: str) -> bool:
    """Say whether the text is a path or a hub address, and not the name or digest of a registered base."""
    return is_path(text) or text.startswith(HUB)


def absolute(path: Path) -> Path:
    """Return the absolute path without `..`; links stay, they are the names a person gave."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def slug(text: str) -> str:
    """Return a valid name made from a folder's or repository's name; `unnamed` where nothing of it can be kept."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return name[:96] or "unnamed"


def open_source(source: str, revision: str | None = None) -> tuple[Checkpoint, str, str | None]:
    """Open a path or `hf://org/name[@revision]`; return the checkpoint, the source's full name and the commit."""
    if source.startswith(HUB):
        from loramgr.checkpoints.hub import fetch

        address = source.partition("@")[0] if revision else source
        folder, commit = fetch(f"{address}@{revision}" if revision else source)
        return open_checkpoint(folder), source.partition("@")[0], commit
    path = absolute(Path(source))
    return open_checkpoint(path), str(path), None


def find_base(home: Home, text: str) -> OpenBase:
    """Find a base by name, digest or prefix, path, or hub address, and open it.

    A path or address is fingerprinted (what was read before and is untouched is not read again) and is known by its
    digest; it need not be registered.
    """
    if not is_outside(text):
        with home.catalog.reading() as reader:
            record = reader.base(text)
        return _open_registered(home, record)
    checkpoint, source, revision = open_source(text)
    tensors = fingerprint(checkpoint, home.jobs, home.progress, FingerprintCache(home.cache))
    digest = tensors_digest(tensors.values())
    with home.catalog.reading() as reader:
        registered = reader.bases_with_digest(digest)
    return OpenBase(registered[0].name if registered else None, digest, source, revision, checkpoint, tensors)


def base_of_digest(home: Home, digest: str, recorded_source: str | None = None) -> OpenBase:
    """Open a base by its digest: the first registered one whose files are there, else the source a merge recorded.

    NotFoundError when none is there, naming where they were looked for; UncheckedError when one cannot be read.
    """
    failures: list[LoramgrError] = []
    with home.catalog.reading() as reader:
        records = reader.bases_with_digest(digest)
    for record in records:
        try:
            return _open_registered(home, record)
        except LoramgrError as error:
            failures.append(error)
    if recorded_source is not None and not failures:
        try:
            found = find_base(home, recorded_source)
        except LoramgrError as error:
            failures.append(error)
        else:
            if found.digest == digest:
                return found
            failures.append(NotFoundError(f"{recorded_source} is now another model, {found.digest}"))
    where = "; ".join(error.message for error in failures) or "none of that digest is registered"
    kind = UncheckedError if any(isinstance(error, UncheckedError) for error in failures) else NotFoundError
    raise kind(f"the base {digest} is not at hand: {where}", "loramgr base add PATH")


def _open_registered(home: Home, record: BaseRecord) -> OpenBase:
    """Open a registered base; its bytes are compared with the recorded digests by whoever reads them."""
    try:
        checkpoint, source, _ = open_source(record.source, record.revision)
    except NotFoundError as error:
        raise NotFoundError(
            f"the base {record.name} was at {record.source}: {error.message}",
            f"loramgr base add PATH --name {record.name}",
        ) from error
    tensors = parse_tensor_lines(home.store.blobs.get(record.digest))
    return OpenBase(record.name, record.digest, source, record.revision, checkpoint, tensors)
