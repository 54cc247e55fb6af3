"""Opens a remote by its URL."""

from __future__ import annotations

from loramgr.remotes.protocol import Remote
from loramgr.remotes.urls import parse_url

__all__ = ["open_remote"]


def open_remote(url: str, jobs: int = 8) -> Remote:
    """Return the remote of a URL, which makes that many requests at once; nothing is asked of it yet.

    Errors are those of `parse_url`, and IncompatibleError where the kind needs a package that is not installed.
    """
    parsed = parse_url(url)
    if parsed.kind == "hf":
        from loramgr.remotes.hub_remote import HubRemote

        return HubRemote(parsed, jobs)
    from loramgr.remotes.log_remote import LogRemote
    from loramgr.remotes.opening_store import open_keystore

    return LogRemote(open_keystore(parsed), jobs)
