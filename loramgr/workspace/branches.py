"""What the entries of a log come to, told without the catalog: versions, which of them live, tags."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from loramgr.log import Entry

__all__ = ["Branch"]


@dataclass
class Branch:
    """A log that can grow, first entry to last.

    `versions` are all that were ever published, by number, each with its digest; `live` are the numbers of those that
    are not removed, `tags` name one of them each.
    """

    entries: list[Entry]
    versions: dict[int, str] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    tags: dict[str, int] = field(default_factory=dict)

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

    def _see(self, entry: Entry) -> None:
        content = entry.content
        if entry.kind == "publish":
            self.versions[content["number"]] = content["version"]
            self.live.add(content["number"])
            self.tags |= dict.fromkeys(content["tags"], content["number"])
        elif entry.kind == "restore":
            self.live.update(content["numbers"])
        elif entry.kind == "tag":
            self.tags[content["tag"]] = content["number"]
        elif entry.kind == "untag":
            self.tags.pop(content["tag"], None)
        elif entry.kind == "remove":
            self.live = set() if content["whole"] else self.live.difference(content["numbers"])
            self.tags = {tag: number for tag, number in self.tags.items() if number in self.live}
