"""Bounds on how long the hub's client waits: by itself it would wait for a silent server forever."""

from __future__ import annotations

import os
from importlib import import_module
from threading import Lock
from typing import Any

__all__ = ["bound_sessions", "bound_xet", "bounded_session"]

_WRITING = 6  # times the patience of a download: a commit takes the hub long
_XET = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "4", "HF_XET_CLIENT_RETRY_MAX_DURATION": "120s"}
_LOCK = Lock()


def bound_sessions() -> None:
    """Have every session that the client opens from now on end its waiting, also those after a failed connection.

    They are opened as before; what somebody has set stays. Those of the client's own calls are meant, too.
    """
    import huggingface_hub

    http = import_module("huggingface_hub.utils._http")
    with _LOCK:
        factory = getattr(http, "_GLOBAL_CLIENT_FACTORY", None) or http.default_client_factory
        if getattr(factory, "is_bounded", False):
            return

        def bounded() -> Any:
            return _bounded(factory())

        bounded.is_bounded = True  # type: ignore[attr-defined]
        huggingface_hub.set_client_factory(bounded)


def bounded_session() -> Any:
    """Return the session that all calls share, bounded whoever has opened it."""
    return _bounded(import_module("huggingface_hub.utils").get_session())


def bound_xet() -> None:
    """Have Xet give up within some minutes, unless the environment says how long it is to try."""
    for name, value in _XET.items():
        os.environ.setdefault(name, value)


def _bounded(session: Any) -> Any:
    from huggingface_hub import constants

    if session.timeout.read is None:
        patience = constants.HF_HUB_DOWNLOAD_TIMEOUT
        session.timeout = type(session.timeout)(_WRITING * patience, connect=patience)
    return session
