"""What `list` is asked for; without SQLAlchemy, so that asking costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SORT_KEYS", "VersionQuery"]

SORT_KEYS = ("name", "created", "rank", "bytes", "parameters")


@dataclass(frozen=True, slots=True)
class VersionQuery:
    """Filters that all must hold, None or empty where there is none.

    `name` is a glob; `base` a base's name, digest or prefix; `labels` are pairs of key and text; `target` is the last
    dotted parts of an updated module; `metrics` are comparisons as `acc>0.9`. Per adapter the newest version that
    matches counts, with `all_versions` every one, with `latest_only` the newest one if it matches. `sort` is one of
    `SORT_KEYS` or `metric:KEY`, descending after a `-`; versions without that value come last. `limit` is a number of
    versions.
    """

    name: str | None = None
    base: str | None = None
    tag: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    metrics: tuple[str, ...] = ()
    method: str | None = None
    rank: int | None = None
    target: str | None = None
    sort: str = "name"
    limit: int | None = None
    all_versions: bool = False
    latest_only: bool = False
