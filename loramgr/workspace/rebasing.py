"""Puts the branches of a forked log into one: what the others say is copied to the end of one of them.

The law that a rebase keeps:

* The result says every original of every branch once (see `loramgr.forks`): by the original itself, by a copy of it, or
  by naming it in a `rebase` entry at the end where it says nothing new, like a tag that stands there already. So its
  state is that of the branch that stays, and upon it what the others said, in their order; a rebase of a rebased log
  adds nothing, and however often branches meet, the log grows by what was done, not by how often.
* It is made of its branches alone: copies have the time and author of their originals, branches follow each other by
  the first thing they say. Clients that put the same branches together write the same entries with the same digests.
* Only version numbers change, where they were given away on the branch that stays, and what refers to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loramgr.digests import canonical_json, digest_bytes
from loramgr.forks import ends, original, said_by
from loramgr.log import Entry
from loramgr.remotes.protocol import RemoteLog
from loramgr.workspace.arriving import Arrival, take_in
from loramgr.workspace.branches import Branch
from loramgr.workspace.home import Home
from loramgr.workspace.remote_logs import chain_to, favourite, versions_there

__all__ = ["Rebased", "rebase_here", "rebased"]

_NOWHERE = 0  # a number that no version has


@dataclass(frozen=True, slots=True)
class Rebased:
    """A log after a rebase, first entry to last; `notes` say which versions have another number or were there."""

    entries: list[Entry]
    notes: list[str]


def rebased(there: Sequence[Entry], others: Sequence[Sequence[Entry]], remote: str) -> Rebased:
    """Return the log that `there` is, with what other branches, or logs of their own, say beside it at its end.

    Each is given whole. A version that is there already is not published twice. `remote` is what the other side is
    called in the notes.
    """
    known = {entry.digest for entry in there}
    left = [[entry for entry in other if entry.digest not in known] for other in others]
    remaking = _Remaking(Branch([*there]), remote)
    for branch in sorted(filter(None, left), key=lambda entries: (entries[0].time, original(entries[0]))):
        remaking.take(branch)
    remaking.settle()
    entries = remaking.branch.entries
    rivals = [other[-1] for other in others if entries[-1].digest not in ends([*entries, *other])]
    if rivals:
        remaking.outdo(rivals)
    return Rebased(entries, remaking.notes)


def rebase_here(
    home: Home, here: list[Entry], log: RemoteLog, label: str, *, dry_run: bool
) -> tuple[list[Entry], list[str]]:
    """Put what is here and every branch that a remote has into one, and return the new log, and notes on it.

    The branch there that all clients favour stays, with what was added here to its end. The log here is replaced by
    the new one in one transaction, but for a dry run.
    """
    branches = [chain_to(log, head) for head in log.heads]
    there = favourite(branches)
    stays = here if here[: len(there)] == there else there
    made = rebased(stays, [branch for branch in [*branches, here] if branch is not stays], label)
    if not dry_run:
        take_in(home, [Arrival(made.entries, here, versions_there(log))], label)
    return made.entries, made.notes


class _Remaking:
    """Takes the other branches one by one and copies what they say to the end of one; `notes` are for a person."""

    def __init__(self, branch: Branch, remote: str) -> None:
        self.notes: list[str] = []
        self.branch = branch
        self._remote = remote
        self._numbers: dict[int, int] = {}
        self._refs: dict[tuple[str, str], str] = {}
        self._idle: dict[str, Entry] = {}  # the originals that said nothing new, by digest

    def take(self, entries: Sequence[Entry]) -> None:
        """Append what the entries of a branch say that is not said yet, and speaks of what is there."""
        self._numbers = {}
        for entry in entries:
            if entry.kind == "rebase":
                self._idle |= dict.fromkeys(said_by(entry), entry)
            elif self._is_said(original(entry)) or self._is_said(entry.digest):
                self._follow_number(entry)
            elif not self._remade(entry):
                self._idle[original(entry)] = entry

    def settle(self) -> None:
        """Append an entry that names what was not worth one of its own."""
        idle = {said: entry for said, entry in self._idle.items() if said not in self.branch.said}
        if idle:
            self._append_rebase([*idle], [*idle.values()])

    def outdo(self, heads: Sequence[Entry]) -> None:
        """Append an entry by which the branch says more than others that say the same, ending in these entries."""
        self._append_rebase([head.digest for head in heads], heads)

    def _append_rebase(self, replaces: Sequence[str], entries: Sequence[Entry]) -> None:
        newest = max(entries, key=lambda entry: (entry.time, entry.digest))
        self.branch.append(replace(newest, kind="rebase"), {"replaces": sorted({*replaces})})

    def _is_said(self, said: str) -> bool:
        return said in self.branch.said or said in self._idle

    def _remade(self, entry: Entry) -> bool:
        """Append a copy of an entry, and say whether it has something new to say."""
        ways = {
            "publish": self._publish,
            "tag": self._tag,
            "untag": self._untag,
            "label": self._value,
            "metric": self._value,
            "rename": self._rename,
            "remove": self._remove,
            "restore": self._restore,
        }
        return ways[entry.kind](entry)

    def _append(self, entry: Entry, changes: dict[str, Any], name: str | None = None) -> bool:
        self.branch.append(entry, {**entry.content, **changes, "original": original(entry)}, name)
        return True

    def _publish(self, entry: Entry) -> bool:
        content, number = entry.content, entry.content["number"]
        ref = f"{entry.name}@v{number}"
        there = self._same_files(entry)
        if there is not None:
            self._renumber(entry, there)
            self.notes += [] if there == number else [f"{ref} is v{there} at {self._remote}: the same files"]
            self.take_extras(entry)
            return False
        given = max(number, self.branch.next_number)
        self._renumber(entry, given)
        if given != number:
            self.notes.append(f"{ref} is v{given} now: its number was given away at {self._remote}")
        parents = [self._parent(parent) for parent in content["parents"]]
        return self._append(entry, {"number": given, "parents": parents})

    def take_extras(self, publication: Entry) -> None:
        """Append what a publication says beside the version itself."""
        for entry in _said_beside(publication):
            if not self._is_said(original(entry)) and not self._remade(entry):
                self._idle[original(entry)] = entry

    def _same_files(self, entry: Entry) -> int | None:
        """Return the number of a version that lives in the branch and has the same digest, None for none."""
        versions, version = self.branch.versions, entry.content["version"]
        return max((number for number in self.branch.live if versions[number] == version), default=None)

    def _follow_number(self, entry: Entry) -> None:
        """Note which number a version has in the branch that was published there or was not worth it."""
        if entry.kind == "publish":
            there = self.branch.numbers.get(original(entry), self._same_files(entry))
            self._renumber(entry, _NOWHERE if there is None else there)

    def _renumber(self, entry: Entry, given: int) -> None:
        number = entry.content["number"]
        self._numbers[number] = given
        if given != _NOWHERE:
            self._refs[f"{entry.name}@v{number}", entry.content["version"]] = f"{self.branch.name}@v{given}"

    def _parent(self, parent: dict[str, Any]) -> dict[str, Any]:
        return {**parent, "ref": self._refs.get((parent["ref"], parent["digest"]), parent["ref"])}

    def _number(self, number: int) -> int | None:
        """Return the number that a version has now, None for one that is not there any more."""
        given = self._numbers.get(number, number)
        return given if given in self.branch.live else None

    def _tag(self, entry: Entry) -> bool:
        number = self._number(entry.content["number"])
        if number is None or self.branch.tags.get(entry.content["tag"]) == number:
            return False
        return self._append(entry, {"number": number})

    def _untag(self, entry: Entry) -> bool:
        return entry.content["tag"] in self.branch.tags and self._append(entry, {})

    def _value(self, entry: Entry) -> bool:
        key = f"{entry.kind}s"
        number = self._number(entry.content["number"])
        if number is None or not (changes := self.branch.changes(entry.kind, number, entry.content[key])):
            return False
        return self._append(entry, {"number": number, key: changes})

    def _rename(self, entry: Entry) -> bool:
        return self.branch.name != entry.name and self._append(entry, {"from": self.branch.name}, entry.name)

    def _remove(self, entry: Entry) -> bool:
        numbers = sorted({given for each in entry.content["numbers"] if (given := self._number(each)) is not None})
        return bool(numbers) and self._append(entry, {"numbers": numbers, "whole": {*numbers} == self.branch.live})

    def _restore(self, entry: Entry) -> bool:
        branch = self.branch
        given = {self._numbers.get(number, number) for number in entry.content["numbers"]}
        numbers = sorted(given.intersection(branch.versions).difference(branch.live))
        return bool(numbers) and self._append(entry, {"numbers": numbers, "whole": not branch.live})


def _said_beside(publication: Entry) -> Iterator[Entry]:
    """Yield what a publication says beside the version itself, as entries of their own.

    As originals they get digests that are made of the publication's and of what they say, alike for all clients.
    """
    content = publication.content
    said: list[tuple[str, dict[str, Any]]] = [("tag", {"tag": tag}) for tag in content["tags"]]
    said += [(kind, {key: content[key]}) for kind, key in (("label", "labels"), ("metric", "metrics")) if content[key]]
    for kind, values in said:
        named = digest_bytes(canonical_json([original(publication), kind, values]))
        number = {"number": content["number"]}
        yield replace(publication, kind=kind, content={**number, **values, "original": named})
