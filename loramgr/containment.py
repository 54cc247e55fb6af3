"""Names that come from files, kept inside the folder they belong to."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

from loramgr.errors import IncompatibleError, IntegrityError

__all__ = ["is_contained", "is_printable", "resolve_inside"]

_CACHE_PREFIXES = ("models--", "datasets--", "spaces--")


def resolve_inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, the path itself and not what a link points to, once it is known to stay in the folder.

    `name` is relative, with `/` between its parts; the file need not exist. The folder itself may be reached by
    links. Raises IntegrityError for a name that is absolute, empty or has `..`, a backslash or NUL in it, and
    IncompatibleError for a link whose target lies outside (the Hugging Face cache, whose snapshots link to its own
    blobs, excepted) and for what is neither a file nor a folder.
    """
    if not is_contained(name):
        raise IntegrityError(f"the name {name!r} leaves the folder {folder}")
    path = folder / name
    root = folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise IncompatibleError(f"{path}: the link goes round in a circle") from error
    if not any(target.is_relative_to(allowed) for allowed in (root, *_cache_blobs(root))):
        raise IncompatibleError(
            f"{path}: the link leads to {target}, outside of the folder", "put a copy of the file in its place"
        )
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise IncompatibleError(f"{path}: not a regular file", "put the file itself in its place")
    return path


def is_contained(name: str) -> bool:
    """Say whether a relative name with `/` between its parts stays in its folder, links aside."""
    parts = PurePosixPath(name)
    plain = bool(parts.parts) and not ("\0" in name or "\\" in name)
    return plain and not (parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts)


def is_printable(name: str) -> bool:
    """Say whether a name has no control characters, which a terminal would obey, and no halves of characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)


def _cache_blobs(root: Path) -> tuple[Path, ...]:
    """Return where the files of a snapshot in the Hugging Face cache lie, when root is one or lies in one.

    `models--org--name/snapshots/<commit>` links to the repository's `blobs`, and those may link on to the `blobs`
    that all repositories of the cache share.
    """
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith(_CACHE_PREFIXES):
            return (repository / "blobs", repository.parent / "blobs")
    return ()
