"""Digests: how loramgr names bytes, tensors, checkpoints and records by their content.

Everything here is a pure function of bytes. The base digest and the weights digest are defined in
`docs/digests.md`, with test vectors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import rfc8785

from loramgr.errors import IntegrityError, UsageError

__all__ = [
    "CHUNK",
    "TensorDigest",
    "canonical_json",
    "digest_bytes",
    "digest_file",
    "is_digest",
    "parse_tensor_lines",
    "short",
    "tensor_lines",
    "tensors_digest",
]

PREFIX = "sha256:"
CHUNK = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class TensorDigest(NamedTuple):
    """One tensor as the base digest sees it: `dtype` as safetensors spells it, `sha256` bare hex of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def is_digest(text: str) -> bool:
    """Say whether the text is a whole digest, `sha256:` and 64 hex digits."""
    return _DIGEST.fullmatch(text) is not None


def short(digest: str) -> str:
    """Return the first 12 hex digits of a digest, for people."""
    return digest.removeprefix(PREFIX)[:12]


def digest_bytes(data: bytes) -> str:
    """Return the digest of the bytes."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, read once in chunks."""
    with path.open("rb") as file:
        return PREFIX + hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the RFC 8785 form of a JSON value.

    Raises UsageError for what has no such form: NaN, infinities, integers beyond 2^53, lone surrogates.
    """
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise UsageError(f"value has no canonical JSON form: {error}") from error


# of texts and integers this makes what RFC 8785 prescribes, eight times as fast as the general encoder
_LINE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def tensor_lines(tensors: Iterable[TensorDigest]) -> bytes:
    """Return the text whose sha256 is the base digest: one JSON line per tensor, by the UTF-8 bytes of its name."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name.encode())
    lines = (_LINE.encode([t.name, t.dtype, list(t.shape), t.sha256]) for t in ordered)
    return "".join(f"{line}\n" for line in lines).encode()


def tensors_digest(tensors: Iterable[TensorDigest]) -> str:
    """Return the base digest (of a checkpoint) or weights digest (of an adapter) of the tensors."""
    return digest_bytes(tensor_lines(tensors))


def parse_tensor_lines(data: bytes) -> dict[str, TensorDigest]:
    """Read `tensor_lines` back, by tensor name; IntegrityError when it is not such a text."""
    tensors: dict[str, TensorDigest] = {}
    try:
        for line in data.decode().removesuffix("\n").split("\n") if data else ():  # names may hold other line breaks
            name, dtype, shape, sha256 = json.loads(line)
            tensors[name] = TensorDigest(name, dtype, tuple(shape), sha256)
    except ValueError as error:
        raise IntegrityError(f"the list of tensor digests is damaged: {error}", "loramgr verify") from error
    return tensors
