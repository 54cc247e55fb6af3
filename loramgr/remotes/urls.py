"""The URLs of remotes: which kind of store, where in it, and with which options; never with credentials.

`file:PATH`, `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`, `hf:ORG` and `hf:ORG/NAME`; a path
alone is a folder. Options follow a `?` as `name=value&name=value`, percent-encoded; docs/object-stores.md lists them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from loramgr.errors import IncompatibleError, UsageError

__all__ = ["CLOUD_KINDS", "KINDS", "RemoteUrl", "parse_url"]

CLOUD_KINDS = ("s3", "gs", "az")
KINDS = ("file", *CLOUD_KINDS, "hf")
_PLANNED = ("oci", "sftp")
_FORMS = "file:PATH, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, hf:ORG or hf:ORG/NAME"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)
_PLACE = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]{0,127}")
_PART = re.compile(r"[A-Za-z0-9 ._+=,()~-]+")
_WORD = re.compile(r"[A-Za-z0-9 ._+=,@-]{1,128}")
_SECRET = re.compile(r"key|token|secret|passw|pwd|credential|^sig|sas|auth|user|^x-amz|^x-goog", re.IGNORECASE)
_OPTIONS = {
    "s3": frozenset({"endpoint", "region", "profile", "timeout", "anonymous"}),
    "gs": frozenset({"endpoint", "timeout", "anonymous"}),
    "az": frozenset({"endpoint", "account", "timeout", "anonymous"}),
    "hf": frozenset({"private", "tags"}),
}
_RIGHT_WAY = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile: s3://BUCKET/PREFIX?profile=NAME",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of the key",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """A parsed URL: its kind, the place (an absolute folder, a bucket, a container, an organization) and the rest.

    `prefix` is what stands below the place, without slashes around it; for `hf` the name of the one repository. It is
    empty where there is none.
    """

    kind: str
    place: str
    prefix: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if self.kind == "file":
            return f"file:{self.place}"
        colon = ":" if self.kind == "hf" else "://"
        query = f"?{urlencode(self.options, safe=':/')}" if self.options else ""
        return f"{self.kind}{colon}{self.place}" + (f"/{self.prefix}" if self.prefix else "") + query

    def option(self, name: str) -> str | None:
        """Return the value of an option, None where it is not given."""
        return dict(self.options).get(name)


def parse_url(text: str) -> RemoteUrl:
    """Read the URL of a remote, or the path of a folder, which is made absolute.

    Raises UsageError for what is none and for one with credentials, whose message does not repeat them, and
    IncompatibleError for a kind of store that loramgr does not speak to.
    """
    if not text or not text.isprintable():
        raise UsageError("the URL of a remote is empty or has control characters in it", _FORMS)
    match = _SCHEME.fullmatch(text)
    if match is None:
        return _folder(text)
    kind, rest = match[1].lower(), match[2]
    if kind == "file":
        return _folder(_path_of_file_url(rest))
    if kind in _PLANNED:
        raise IncompatibleError(f"loramgr has no remotes of the kind {kind}:", f"use {_FORMS}")
    if kind not in KINDS:
        raise UsageError(f"{kind}: is not a kind of remote", f"use {_FORMS}; a folder of that name is ./{kind}:…")
    address, _, query = rest.partition("?")
    if "@" in address or ":" in address:
        raise _with_credentials(kind)
    place, prefix = _split(kind, address.removeprefix("//"))
    return RemoteUrl(kind, place, prefix, _options(kind, query))


def _folder(path: str) -> RemoteUrl:
    return RemoteUrl("file", str(Path(path).expanduser().absolute()))


def _path_of_file_url(rest: str) -> str:
    path = rest
    if rest.startswith("//"):
        host, slash, below = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise UsageError("file:// is followed by a host, but folders are on this machine", "file:/PATH")
        path = slash + below
    if not path:
        raise UsageError("file: is followed by no path", "file:/PATH")
    return path


def _split(kind: str, address: str) -> tuple[str, str]:
    place, _, prefix = address.strip("/").partition("/")
    parts = prefix.split("/") if prefix else []
    plain = _PLACE.fullmatch(place) and all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)
    if not plain or (kind == "hf" and len(parts) > 1):
        raise UsageError(f"{kind}:{address} is not the URL of a remote", f"write {_FORMS}")
    return place, prefix


def _options(kind: str, query: str) -> tuple[tuple[str, str], ...]:
    known = _OPTIONS.get(kind, frozenset())
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise UsageError(f"what follows the ? in this {kind}: URL is not name=value", _known(known)) from None
    unknown = [name for name, _ in given if name not in known]
    if any(_SECRET.search(name) or not _WORD.fullmatch(name) for name in unknown):
        raise _with_credentials(kind)
    for name, value in given:
        if name in unknown:
            raise UsageError(f"{name} is not an option of {kind}: remotes", _known(known))
        _CHECKS.get(name, _check_word)(kind, name, value)
    if len(dict(given)) != len(given):
        raise UsageError(f"an option is given twice in this {kind}: URL", _known(known))
    return tuple(sorted(given))


def _known(options: frozenset[str]) -> str:
    return f"options are {', '.join(sorted(options))}" if options else "this kind has no options"


def _check_word(kind: str, name: str, value: str) -> None:
    if not _WORD.fullmatch(value):
        raise UsageError(f"the value of {name} in this {kind}: URL is empty or has other characters than plain ones")


def _check_endpoint(kind: str, name: str, value: str) -> None:
    try:
        parts = urlsplit(value)
        host = parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:  # a port that is no number
        host = None
    if "@" in value or (host and parts.query):
        raise _with_credentials(kind)
    if not host or parts.fragment:
        raise UsageError(f"the {name} of this {kind}: URL is not https://HOST or http://HOST:PORT")


def _check_seconds(kind: str, name: str, value: str) -> None:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 3600:
        raise UsageError(f"the {name} of this {kind}: URL is not a number of seconds up to 3600", f"{name}=60")


def _check_truth(kind: str, name: str, value: str) -> None:
    if value != "true":
        raise UsageError(f"the {name} of this {kind}: URL is not true", f"write {name}=true, or leave it out")


_CHECKS = {
    "endpoint": _check_endpoint,
    "timeout": _check_seconds,
    "anonymous": _check_truth,
    "private": _check_truth,
    "tags": _check_truth,
}


def _with_credentials(kind: str) -> UsageError:
    return UsageError(f"the URL of a remote has no credentials in it, but this {kind}: URL has", _RIGHT_WAY[kind])
