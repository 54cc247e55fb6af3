"""Opening the key store that a URL names."""

from __future__ import annotations

from pathlib import Path

from loramgr.errors import UsageError
from loramgr.remotes.protocol import KeyStore
from loramgr.remotes.urls import CLOUD_KINDS, RemoteUrl, parse_url

__all__ = ["open_keystore"]


def open_keystore(url: str | RemoteUrl) -> KeyStore:
    """Return the store of a URL; nothing is read or sent yet.

    Raises UsageError for a URL that names none, IncompatibleError where the package for it is missing, and
    UncheckedError for credentials in the environment that cannot be used.
    """
    parsed = parse_url(url) if isinstance(url, str) else url
    if parsed.kind == "file":
        from loramgr.remotes.folder_store import FolderStore

        return FolderStore(Path(parsed.place), str(parsed))
    if parsed.kind in CLOUD_KINDS:
        from loramgr.remotes.cloud_store import CloudStore

        return CloudStore(parsed)
    raise UsageError(f"{parsed} is not a store of keys")
