"""Which hosts get credentials: the provider's own, those that the environment or a profile names, and this machine.

The URL of a remote is passed on and copied, so an `endpoint` in it may be anybody's. A bearer token or a session token
that is sent there is given away; a signature is not, but over plain HTTP everybody on the way may change what is sent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from loramgr.errors import UsageError
from loramgr.remotes.urls import RemoteUrl

__all__ = ["ENDPOINTS", "check_endpoint", "named_endpoint"]

ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_PORTS = {"http": 80, "https": 443}
_BEARS = {
    "s3": "credentials with a session token",
    "gs": "a token",
    "az": "a token or a signature",
}


def named_endpoint(kind: str) -> str:
    """Return the endpoint that the environment names for a kind of store, empty where it names none."""
    return next((found for name in ENDPOINTS[kind] if (found := os.environ.get(name))), "")


def check_endpoint(url: RemoteUrl, own: Sequence[str], *, signed_only: bool = False) -> None:
    """Refuse to give credentials to a host that only the URL names.

    `own` are the endpoints that the person's own settings name; `signed_only` says that what is sent there reveals no
    secret, so that TLS is enough. Raises UsageError with the variable that says that the host may have them.
    """
    endpoint = url.option("endpoint")
    if endpoint is None or url.option("anonymous") or _is_here(endpoint):
        return
    if _plain(endpoint) in map(_plain, filter(None, own)):
        return
    if signed_only and urlsplit(endpoint).scheme == "https":
        return
    given = "what is signed and written would go without TLS" if signed_only else f"{_BEARS[url.kind]} would go"
    raise UsageError(
        f"{url}: {given} to a host that only this URL names",
        f"if it may have that, set {ENDPOINTS[url.kind][0]}={endpoint}; what is public needs only anonymous=true",
    )


def _is_here(endpoint: str) -> bool:
    """Say whether an endpoint is on this machine."""
    host = urlsplit(endpoint).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _plain(endpoint: str) -> tuple[str, str, int | None, str]:
    """Return what tells one endpoint from another, however each is written."""
    try:
        parts = urlsplit(endpoint)
        return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme), parts.path.rstrip("/")
    except ValueError:
        return "", endpoint, None, ""
