"""Tells which ends of forked logs count: an end that says no more than another one does not.

Every entry that a command wrote is an *original*. A rebase copies originals to the end of another branch; a copy names
its original, and a `rebase` entry names the originals that said nothing new there. So a branch by itself shows which
originals it says, and that set decides, whoever put the branch together, and in whatever order:

* A branch that says all that another one says, and more, stands for it: the other is set aside. For a log of its own it
  has to have the versions too: whoever only names what another log published does not stand for it.
* Of branches that say the same, one stands for all: the shorter, else the earlier, else the one with the lesser digest.

Clients that put the same fork together at once are thereby done: whatever each of them saw, what says all is the log.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from loramgr.log import Entry

__all__ = ["covers", "ends", "original", "said_by", "set_aside"]

_COMPARED = 100  # branches of one log that are compared with all others of it; beyond these each counts


def original(entry: Entry) -> str:
    """Return the digest of the entry that first said what this one says: its own, but for a copy."""
    first = entry.content.get("original") if isinstance(entry.content, dict) else None
    return first if isinstance(first, str) else entry.digest


def said_by(entry: Entry) -> list[str]:
    """Return the originals that an entry accounts for; what is not well-formed is for whoever proves entries."""
    if entry.kind != "rebase":
        return [original(entry)]
    replaces = entry.content.get("replaces") if isinstance(entry.content, dict) else None
    return [digest for digest in replaces if isinstance(digest, str)] if isinstance(replaces, list) else []


def covers(branch: Iterable[Entry], other: Iterable[Entry]) -> bool:
    """Say whether a branch accounts for all that another one says, whatever the numbers and the order there are.

    What rebases of the other one named is not asked for: it says nothing new where it was named.
    """
    known = list(branch)
    said = {each for entry in known for each in (entry.digest, *said_by(entry))}
    versions = {_version(entry) for entry in known} | {None}
    return all(entry.kind == "rebase" or (original(entry) in said and _version(entry) in versions) for entry in other)


def ends(entries: Iterable[Entry]) -> list[str]:
    """Return the digests of the entries where the branches end that count, the one that says most first.

    The entries are of any number of logs, in any order; all clients order the ends of one log alike.
    """
    forest = _Forest(entries)
    aside = forest.aside()
    return sorted((leaf for leaf in forest.leaves if leaf not in aside), key=forest.rank)


def set_aside(entries: Iterable[Entry]) -> set[str]:
    """Return the digests of the entries that do not count, because every branch they are on is set aside.

    Since a digest names what was there before, none can set itself aside, directly or by way of others.
    """
    known = list(entries)
    if not any(entry.kind == "rebase" or original(entry) != entry.digest for entry in known):
        return set()
    return _Forest(known).aside()


def _version(entry: Entry) -> str | None:
    """Return the digest of the version that an entry publishes, None where it publishes none."""
    version = entry.content.get("version") if entry.kind == "publish" and isinstance(entry.content, dict) else None
    return version if isinstance(version, str) else None


class _Forest:
    """Entries as the trees that they are: each one stands under its predecessor, and branches end in leaves."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._known = {entry.digest: entry for entry in entries}
        self._followers: defaultdict[str | None, list[str]] = defaultdict(list)
        self._sayers: defaultdict[str, list[str]] = defaultdict(list)
        self._publishers: defaultdict[str | None, list[str]] = defaultdict(list)
        for digest, entry in self._known.items():
            self._followers[entry.predecessor if entry.predecessor in self._known else None].append(digest)
            self._publishers[_version(entry)].append(digest)
            for said in said_by(entry):
                self._sayers[said].append(digest)
        self._begin: dict[str, int] = {}
        self._end: dict[str, int] = {}
        self._root: dict[str, str] = {}
        self._depth: dict[str, int] = {}
        self._said: dict[str, int] = {}
        for root in self._followers[None]:
            self._walk(root)
        self.leaves = [digest for digest in self._known if digest not in self._followers]

    def _walk(self, root: str) -> None:
        """Give the entries of a tree numbers, those under an entry next to it, and count what each branch says."""
        saying: Counter[str] = Counter()
        path: list[tuple[str, Iterator[str]]] = []

        def enter(digest: str) -> None:
            self._begin[digest] = len(self._begin)
            self._root[digest], self._depth[digest] = root, len(path)
            saying.update(said_by(self._known[digest]))
            self._said[digest] = len(saying)
            path.append((digest, iter(self._followers.get(digest, ()))))

        enter(root)
        while path:
            digest, following = path[-1]
            below = next(following, None)
            if below is not None:
                enter(below)
                continue
            path.pop()
            self._end[digest] = len(self._begin)
            for said in said_by(self._known[digest]):
                saying[said] -= 1
                if not saying[said]:
                    del saying[said]

    def rank(self, leaf: str) -> tuple[int, int, str, str]:
        """Return what puts the branch that says most first."""
        return -self._said[leaf], self._depth[leaf], self._known[leaf].time, leaf

    def aside(self) -> set[str]:
        """Return the entries that are on no branch that counts."""
        left = {leaf for family in self._families() for leaf in self._outdone(family)}
        waiting = {digest: len(following) for digest, following in self._followers.items() if digest is not None}
        ready, aside = [*left], set[str]()
        while ready:
            digest = ready.pop()
            aside.add(digest)
            before = self._known[digest].predecessor
            if before in waiting:
                waiting[before] -= 1
                if not waiting[before]:
                    ready.append(before)
        return aside

    def _families(self) -> list[list[str]]:
        """Return the leaves of each tree, together with those of trees that say, or replace, some of the same."""
        parent = {root: root for root in self._followers[None]}

        def top(root: str) -> str:
            while parent[root] != root:
                parent[root] = root = parent[parent[root]]
            return root

        for said, sayers in self._sayers.items():
            for digest in [*sayers[1:], *([said] if said in self._known else [])]:
                parent[top(self._root[digest])] = top(self._root[sayers[0]])
        families: defaultdict[str, list[str]] = defaultdict(list)
        for leaf in self.leaves:
            families[top(self._root[leaf])].append(leaf)
        return [family for family in families.values() if len(family) > 1]

    def _outdone(self, leaves: Sequence[str]) -> Iterator[str]:
        """Yield the leaves of which another one says all that they say."""
        standing: list[tuple[str, set[str]]] = []
        for leaf in sorted(leaves, key=self.rank):
            if any(self._covers(other, leaf, proved) for other, proved in standing):
                yield leaf
            elif len(standing) < _COMPARED:
                standing.append((leaf, set()))

    def _covers(self, leaf: str, other: str, proved: set[str]) -> bool:
        """Tell whether a branch says all that another one says; `proved` are entries of which that is known."""
        digest: str | None = other
        seen: list[str] = []
        while digest in self._known and digest not in proved and not self._is_above(digest, leaf):
            entry = self._known[digest]
            said = self._says(leaf, digest) or all(self._says(leaf, said) for said in said_by(entry))
            if not (said and self._has_version(leaf, entry)):
                return False
            seen.append(digest)
            digest = entry.predecessor
        proved.update(seen)
        return True

    def _has_version(self, leaf: str, entry: Entry) -> bool:
        """Tell whether a branch has the version that an entry of another log publishes; of its own log it need not."""
        version = _version(entry)
        at_home = self._root[leaf] == self._root[entry.digest]
        return at_home or version is None or any(self._is_above(digest, leaf) for digest in self._publishers[version])

    def _is_above(self, digest: str, leaf: str) -> bool:
        return self._begin[digest] <= self._begin[leaf] < self._end[digest]

    def _says(self, leaf: str, said: str) -> bool:
        return any(self._is_above(digest, leaf) for digest in self._sayers.get(said, ()))
