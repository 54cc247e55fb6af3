"""Use case: how many bytes the files of versions take, and whose they are."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Literal

from loramgr.catalog.usage import BlobUse
from loramgr.errors import IntegrityError
from loramgr.records import Usage
from loramgr.workspace.home import Home

__all__ = ["By", "usage"]

By = Literal["adapter", "base"]
SHARED, BASES, REMOVED, TRASH = "(shared)", "(bases)", "(removed)", "(trash)"
NO_BASE = "(no base)"


def usage(home: Home, by: By) -> list[Usage]:
    """Return the bytes of the files that versions consist of, by adapter or by base, the largest first.

    Every blob counts once, so the rows add up: one that only one name's versions refer to under that name, one that
    several refer to in the row `(shared)`. After them, where there are any: `(no base)`, versions without a base;
    `(bases)`, the lists of the bases' tensors; `(removed)`, what only removed versions refer to and is still here;
    `(trash)`, what gc has set aside. Manifests, logs, the catalog and what is only at a remote do not count.
    """
    with home.catalog.reading() as reader:
        uses = list(reader.blob_uses())
        bases = {base.digest for base in reader.bases()}
    sizes = {use.digest: use.bytes for use in uses}
    holders: dict[str, set[str]] = defaultdict(set)
    for use in uses:
        if not use.removed:
            holders[use.digest].add(_holder(use, by))
    totals: Counter[str] = Counter()
    promised = bool(home.store.promised.all())
    for digest, names in holders.items():
        if not promised or home.store.blobs.contains(digest):
            totals[next(iter(names)) if len(names) == 1 else SHARED] += sizes[digest]
    totals[BASES] = sum(_size(home, digest) for digest in bases)
    totals[REMOVED] = sum(_size(home, digest) for digest in sizes.keys() - holders.keys())
    totals[TRASH] = _folder_size(home.store.root / "trash")
    rows = [Usage(name, count) for name, count in totals.items() if count]
    return sorted(rows, key=lambda row: (row.name.startswith("("), -row.bytes, row.name))


def _holder(use: BlobUse, by: By) -> str:
    return use.adapter if by == "adapter" else use.base or NO_BASE


def _size(home: Home, digest: str) -> int:
    """Return a blob's size, 0 for one that is not here: a base's list may be, a removed version's file may."""
    try:
        return home.store.blobs.size(digest)
    except IntegrityError:
        return 0


def _folder_size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # restored or purged meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
