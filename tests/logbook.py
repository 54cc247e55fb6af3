"""A store and its catalog, written as the use cases write them: an entry, then the catalog's commit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from loramgr.catalog.catalog import Catalog
from loramgr.digests import digest_bytes
from loramgr.log import Entry, LogKind
from loramgr.store.store import Store


def summary(**changes: Any) -> dict[str, Any]:
    """Return what a publish entry says of an ordinary adapter, with changes."""
    return {
        "weights_digest": digest_bytes(b"weights"),
        "base": None,
        "method": "lora",
        "format": "peft",
        "rank": 8,
        "ranks": {"q_proj": 8},
        "alpha": 16.0,
        "scaling": 2.0,
        "target_modules": ["q_proj"],
        "modules": ["model.layers.0.self_attn.q_proj"],
        "parameters": 1000,
        "bytes": 4000,
        "dtype": "F32",
        "files": [{"path": "adapter_config.json", "digest": digest_bytes(b"config"), "bytes": 6}],
    } | changes


class Logbook:
    """Appends entries to a workspace's logs, one second after another."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store.create(home / "store")
        self.catalog = Catalog.open(home / "catalog.sqlite3", self.store.uuid)
        self._seconds = count()

    def entry(self, kind: str, name: str, log: LogKind = "adapter", **content: Any) -> Entry:
        """Return the entry that comes next in the log of that name (of `content["from"]` for a rename)."""
        with self.catalog.reading() as reader:
            state = reader.log_state(log, content.get("from", name))
        if kind == "publish":
            number = state.next_number if state else 1
            content = {"number": number, "version": digest_bytes(f"{name} {number}".encode())} | content
        second = next(self._seconds)
        time = f"2026-01-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z"
        return Entry(log, kind, name, state.head if state else None, time, "tester", content)

    def append(self, entry: Entry) -> Entry:
        """Append an entry as a use case does."""
        with self.catalog.writing() as writer:
            writer.append(entry)
            self.store.entries.put_bytes(entry.encode())
        return entry

    def add(self, kind: str, name: str, log: LogKind = "adapter", **content: Any) -> Entry:
        """Make the next entry and append it."""
        return self.append(self.entry(kind, name, log, **content))

    def publish(self, name: str, **changes: Any) -> Entry:
        """Publish a version; `changes` are to the entry's content or to its summary."""
        content: dict[str, Any] = {"parents": [], "message": "", "tags": [], "recipe": None}
        content |= {"labels": {}, "metrics": {}}
        said = {key: changes.pop(key) for key in list(changes) if key in content or key == "version"}
        return self.add("publish", name, **content | said, summary=summary(**changes))

    def add_base(self, name: str, content: bytes = b"base") -> str:
        """Register a base and return its digest."""
        digest = digest_bytes(content)
        numbers = {"tensors": 3, "parameters": 30, "bytes": 120}
        described = {"source": "/models/base", "revision": None, "dtype": "F32", "architecture": "BertModel"}
        self.add("add", name, "base", digest=digest, **numbers, **described)
        return digest

    def entries(self) -> Iterator[Entry]:
        """Yield every entry of the store, in the order of their digests."""
        for digest in self.store.entries.digests():
            yield Entry.decode(self.store.entries.get(digest))
