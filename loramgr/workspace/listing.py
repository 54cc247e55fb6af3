"""Use cases that only ask the catalog: nothing of bases, formats or tensors is imported for them."""

from __future__ import annotations

from dataclasses import replace

from loramgr.catalog.query import VersionQuery
from loramgr.records import VersionRecord
from loramgr.references import is_path
from loramgr.workspace.home import Home

__all__ = ["list_versions", "log_of"]


def list_versions(home: Home, query: VersionQuery) -> list[VersionRecord]:
    """Return the versions that a query selects; its base may be anything that names one."""
    if query.base is not None and (is_path(query.base) or query.base.startswith("hf://")):
        from loramgr.workspace.sources import find_base

        query = replace(query, base=find_base(home, query.base).digest)
    with home.catalog.reading() as reader:
        return reader.versions(query)


def log_of(home: Home, name: str) -> list[VersionRecord]:
    """Return the versions of an adapter, newest first; NotFoundError when there is none of that name."""
    with home.catalog.reading() as reader:
        return reader.log(name)
