"""Finds a base by the hash of its one file, which kohya's files record of theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from loramgr.adapter import FileHash
from loramgr.checkpoints.source import Checkpoint
from loramgr.digests import digest_file
from loramgr.errors import LoramgrError
from loramgr.records import BaseRecord
from loramgr.workspace.sources import open_source

__all__ = ["base_with_file", "is_of_file"]

_PIECE_START, _PIECE = 1 << 20, 1 << 16  # what sd-scripts' older hash covers


def base_with_file(bases: Iterable[BaseRecord], hashed: FileHash) -> BaseRecord | None:
    """Return the first base whose one weights file has the hash; None where none has, or none is at hand."""
    return next((base for base in bases if _is_at_hand(base) and is_of_file(_opened(base), hashed)), None)


def is_of_file(checkpoint: Checkpoint | None, hashed: FileHash) -> bool:
    """Say whether the checkpoint is one weights file with the hash; the whole is read only where the piece fits."""
    if checkpoint is None or len(checkpoint.files) != 1:
        return False
    path = checkpoint.root / checkpoint.files[0].name
    if hashed.piece is not None and _piece(path) != hashed.piece:
        return False
    return digest_file(path) == f"sha256:{hashed.sha256}"


def _is_at_hand(base: BaseRecord) -> bool:
    return base.revision is None and Path(base.source).exists()


def _opened(base: BaseRecord) -> Checkpoint | None:
    try:
        return open_source(base.source)[0]
    except (LoramgrError, OSError):  # a base that has gone or is damaged is not the one that is looked for
        return None


def _piece(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(_PIECE_START)
        return hashlib.sha256(file.read(_PIECE)).hexdigest()[:8]
