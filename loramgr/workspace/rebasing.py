"""Makes log entries anew after those of another branch, so that both sides of a fork are in one log.

A `rebase` entry comes first and says which entries it replaces. The others say what those said, at the time and by the
author that they had; only version numbers that were given away meanwhile become others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loramgr.log import Entry, replaced_by
from loramgr.remotes.protocol import RemoteLog
from loramgr.workspace.arriving import Arrival, take_in
from loramgr.workspace.branches import Branch
from loramgr.workspace.home import Home
from loramgr.workspace.remote_logs import compare

__all__ = ["Rebased", "rebase_here", "rebased"]

_NOWHERE = 0  # a number that no version has


@dataclass(frozen=True, slots=True)
class Rebased:
    """A log after a rebase, first entry to last; `notes` say which versions have another number or were there."""

    entries: list[Entry]
    notes: list[str]


def rebased(there: Sequence[Entry], own: Sequence[Entry], remote: str) -> Rebased:
    """Return the log that `there` is, with the entries of `own`, a branch or a log of its own, made anew at its end.

    A version that is there already is not published twice, and entries that those there replace are not made again.
    `remote` is what the other side is called in the notes.
    """
    settled = replaced_by(there)
    left = [entry for entry in own if entry.digest not in settled]
    if not left:
        return Rebased([*there], [])
    branch = Branch([*there])
    replaces = [*dict.fromkeys([*(entry.digest for entry in own), *sorted(replaced_by(own))])]
    branch.append(replace(left[-1], kind="rebase"), {"replaces": replaces})
    numbers = _numbers_there(branch, own)
    gone = {entry.content["number"] for entry in own if entry.kind == "publish" and entry.digest in settled}
    remaking = _Remaking(branch, remote, numbers, {number: numbers.get(number, _NOWHERE) for number in gone})
    for entry in left:
        remaking.take(entry)
    return Rebased(branch.entries, remaking.notes)


def _numbers_there(branch: Branch, own: Sequence[Entry]) -> dict[int, int]:
    """Return the numbers in the branch of those versions of ours that it has."""
    numbers = {branch.versions[number]: number for number in sorted(branch.live)}
    published = [entry.content for entry in own if entry.kind == "publish"]
    return {each["number"]: numbers[each["version"]] for each in published if each["version"] in numbers}


def rebase_here(
    home: Home, here: list[Entry], log: RemoteLog, label: str, *, dry_run: bool
) -> tuple[list[Entry], list[str]]:
    """Make the entries that a remote lacks anew after those that it has, and return the new log, and notes on it.

    Every branch there comes to be in it. The log here is replaced by it in one transaction, but for a dry run.
    """
    entries, notes = here, list[str]()
    while (found := compare(entries, log)).state in ("diverged", "forked", "behind"):
        if found.ahead:
            made = rebased(found.there, found.ahead, label)
            entries, notes = made.entries, [*notes, *made.notes]
        else:
            entries = found.there
    if not dry_run:
        take_in(home, [Arrival(entries, here)], label)
    return entries, notes


class _Remaking:
    """Takes entries one by one and appends what they say to a branch; `notes` are for a person."""

    def __init__(self, branch: Branch, remote: str, there: dict[int, int], numbers: dict[int, int]) -> None:
        self.notes: list[str] = []
        self._branch = branch
        self._remote = remote
        self._there = there
        self._numbers = numbers
        self._refs: dict[tuple[str, str], str] = {}

    def take(self, entry: Entry) -> None:
        """Append what an entry says; nothing where it is said already, or speaks of what is not there."""
        ways: dict[str, Callable[[Entry], None]] = {
            "publish": self._publish,
            "tag": self._tag,
            "untag": self._untag,
            "label": self._say,
            "metric": self._say,
            "rename": self._rename,
            "remove": self._remove,
            "restore": self._restore,
        }
        if entry.kind in ways:  # a rebase says nothing else, and its list is in the new one
            ways[entry.kind](entry)

    def _publish(self, entry: Entry) -> None:
        content, number = entry.content, entry.content["number"]
        ref = f"{entry.name}@v{number}"
        there = self._there.get(number)
        if there is not None:
            self._renumber(entry, there)
            self.notes += [] if there == number else [f"{ref} is v{there} at {self._remote}: the same files"]
            for extra in _said_by(entry):
                self.take(extra)
            return
        given = max(number, self._branch.next_number)
        self._renumber(entry, given)
        if given != number:
            self.notes.append(f"{ref} is v{given} now: its number was given away at {self._remote}")
        parents = [self._parent(parent) for parent in content["parents"]]
        self._branch.append(entry, {**content, "number": given, "parents": parents})

    def _renumber(self, entry: Entry, given: int) -> None:
        number = entry.content["number"]
        self._numbers[number] = given
        self._refs[f"{entry.name}@v{number}", entry.content["version"]] = f"{self._branch.name}@v{given}"

    def _parent(self, parent: dict[str, Any]) -> dict[str, Any]:
        ref = self._refs.get((parent["ref"], parent["digest"]), parent["ref"])
        return {**parent, "ref": ref}

    def _number(self, number: int) -> int | None:
        """Return the number that a version has now, None for one that is not there any more."""
        given = self._numbers.get(number, number)
        return given if given in self._branch.live else None

    def _tag(self, entry: Entry) -> None:
        number = self._number(entry.content["number"])
        if number is not None and self._branch.tags.get(entry.content["tag"]) != number:
            self._branch.append(entry, {**entry.content, "number": number})

    def _untag(self, entry: Entry) -> None:
        if entry.content["tag"] in self._branch.tags:
            self._branch.append(entry, entry.content)

    def _say(self, entry: Entry) -> None:
        number = self._number(entry.content["number"])
        if number is not None:
            self._branch.append(entry, {**entry.content, "number": number})

    def _rename(self, entry: Entry) -> None:
        name = self._branch.name
        if name != entry.name:
            self._branch.append(entry, {"from": name}, entry.name)

    def _remove(self, entry: Entry) -> None:
        numbers = sorted({given for each in entry.content["numbers"] if (given := self._number(each)) is not None})
        if numbers:
            whole = {*numbers} == self._branch.live
            self._branch.append(entry, {**entry.content, "numbers": numbers, "whole": whole})

    def _restore(self, entry: Entry) -> None:
        branch = self._branch
        given = {self._numbers.get(number, number) for number in entry.content["numbers"]}
        numbers = sorted(given.intersection(branch.versions).difference(branch.live))
        if numbers:
            branch.append(entry, {**entry.content, "numbers": numbers, "whole": not branch.live})


def _said_by(entry: Entry) -> Iterator[Entry]:
    """Yield what a publication says beside the version itself, as entries of their own."""
    content = entry.content
    number = content["number"]
    for tag in content["tags"]:
        yield replace(entry, kind="tag", content={"tag": tag, "number": number})
    for kind, key in (("label", "labels"), ("metric", "metrics")):
        if content[key]:
            yield replace(entry, kind=kind, content={"number": number, key: content[key]})
