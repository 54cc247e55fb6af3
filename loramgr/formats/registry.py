"""Which format an adapter on disk has, and the one function that reads them all."""

from __future__ import annotations

from pathlib import Path

from loramgr.adapter import Adapter
from loramgr.errors import UncheckedError
from loramgr.formats.folder import adapter_folder
from loramgr.formats.peft import read_peft

__all__ = ["read_adapter"]


def read_adapter(path: Path) -> Adapter:
    """Read an adapter from its folder, or from its configuration or weights file inside it.

    Reads headers, not data, and no torch for safetensors. Raises NotFoundError, UncheckedError when a file cannot be
    read, IntegrityError for damaged files, and IncompatibleError for everything that loramgr cannot read exactly.
    """
    try:
        return read_peft(adapter_folder(path))
    except OSError as error:
        raise UncheckedError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
