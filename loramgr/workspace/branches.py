"""What the entries of a log come to, told without the catalog: versions, which of them live, tags, labels, metrics."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from loramgr.forks import original, said_by
from loramgr.log import Entry

__all__ = ["Branch"]


@dataclass
class Branch:
    """A log that can grow, first entry to last.

    `versions` are all that were ever published, by number, each with its digest; `live` are the numbers of those that
    are not removed, `tags` name one of them each. `values` are labels and metrics by kind and number. `said` are the
    originals that the log accounts for (see `loramgr.forks`), `numbers` has the version of each that published one.
    """

    entries: list[Entry]
    versions: dict[int, str] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    tags: dict[str, int] = field(default_factory=dict)
    values: defaultdict[tuple[str, int], dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    said: set[str] = field(default_factory=set)
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in self.entries:
            self._see(entry)

    @property
    def name(self) -> str:
        """What the adapter is called."""
        return self.entries[-1].name

    @property
    def next_number(self) -> int:
        """The number of the next version."""
        return max(self.versions, default=0) + 1

    def append(self, like: Entry, content: dict[str, Any], name: str | None = None) -> None:
        """Append an entry that is like another one; `name` is the adapter's where it changes, None where it stays."""
        last = self.entries[-1]
        entry = replace(like, predecessor=last.digest, content=content, name=last.name if name is None else name)
        self.entries.append(entry.settled())
        self._see(self.entries[-1])

    def changes(self, kind: str, number: int, values: dict[str, Any]) -> dict[str, Any]:
        """Return those of the labels or metrics that a version does not have yet, and those to drop that it has."""
        now = self.values[kind, number]
        return {key: value for key, value in values.items() if now.get(key) != value}

    def _see(self, entry: Entry) -> None:
        content = entry.content
        self.said.update(said_by(entry))
        if entry.kind == "publish":
            self._see_version(entry)
        elif entry.kind == "restore":
            self.live.update(content["numbers"])
        elif entry.kind == "tag":
            self.tags[content["tag"]] = content["number"]
        elif entry.kind == "untag":
            self.tags.pop(content["tag"], None)
        elif entry.kind in ("label", "metric"):
            self._set(entry.kind, content["number"], content[f"{entry.kind}s"])
        elif entry.kind == "remove":
            self.live = set() if content["whole"] else self.live.difference(content["numbers"])
            self.tags = {tag: number for tag, number in self.tags.items() if number in self.live}

    def _see_version(self, entry: Entry) -> None:
        content, number = entry.content, entry.content["number"]
        self.versions[number] = content["version"]
        self.numbers[original(entry)] = number
        self.live.add(number)
        self.tags |= dict.fromkeys(content["tags"], number)
        self._set("label", number, content["labels"])
        self._set("metric", number, content["metrics"])

    def _set(self, kind: str, number: int, values: dict[str, Any]) -> None:
        now = {**self.values[kind, number], **values}
        self.values[kind, number] = {key: value for key, value in now.items() if value is not None}
