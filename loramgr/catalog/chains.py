"""Puts log entries in order: one chain per log, the other branches of forks left aside.

Two entries after one predecessor are a fork, and so are two logs that claim one name: a kill between storing an entry
and committing the catalog leaves either. Nothing is lost: what is left aside stays in the store and is reported.
What a rebase put together is no fork: the branches that it took up do not count, as `loramgr.forks` says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from loramgr.errors import IntegrityError
from loramgr.forks import set_aside
from loramgr.log import Entry

__all__ = ["Chains", "follow"]

Successors = dict[str | None, list[Entry]]


@dataclass(frozen=True, slots=True)
class Chains:
    """The entries of each log, first to last, and the digests of the entries where branches left aside begin."""

    logs: list[list[Entry]]
    forks: list[str]


def follow(entries: Iterable[Entry]) -> Chains:
    """Order the entries into logs, by the digest of their first entry.

    At a fork the entry that has successors counts, else the later one by time, else the greater digest. Raises
    IntegrityError, naming it, when an entry's predecessor is missing.
    """
    known = {entry.digest: entry for entry in entries}
    aside = set_aside(known.values())
    successors: Successors = defaultdict(list)
    for entry in known.values():
        if entry.predecessor is not None and entry.predecessor not in known:
            raise IntegrityError(
                f"log entry {entry.digest} of {entry.log} {entry.name!r} follows {entry.predecessor}, which is missing",
                "loramgr verify",
            )
        if entry.digest not in aside:
            successors[entry.predecessor].append(entry)
    forks: list[str] = []
    roots = sorted(successors[None], key=lambda entry: entry.digest)
    logs = [_chain(root, successors, forks) for root in roots]
    _settle_names(logs, forks)
    return Chains([log for log in logs if log], sorted(forks))


def _chain(root: Entry, successors: Successors, forks: list[str]) -> list[Entry]:
    chain = [root]
    while branches := successors.get(chain[-1].digest):
        followed = max(branches, key=lambda entry: _claim(entry, entry.digest in successors))
        forks += [entry.digest for entry in branches if entry is not followed]
        chain.append(followed)
    return chain


def _claim(entry: Entry, has_successors: bool) -> tuple[bool, str, str]:
    return has_successors, entry.time, entry.digest


def _settle_names(logs: list[list[Entry]], forks: list[str]) -> None:
    """Leave each name to one log; the others go back to before they took it, which may be to nothing.

    Going back may bring a log to a name that yet another one has, so it is repeated until no name is held twice.
    """
    contested = True
    while contested:
        contested = False
        for holders in _holders(logs):
            winner = max(holders, key=lambda log: _claim(log[_claimed_at(log)], _claimed_at(log) < len(log) - 1))
            for log in holders:
                if log is not winner:
                    contested = True
                    forks.append(log[_claimed_at(log)].digest)
                    del log[_claimed_at(log) :]


def _holders(logs: list[list[Entry]]) -> list[list[list[Entry]]]:
    by_name: dict[tuple[str, str], list[list[Entry]]] = defaultdict(list)
    for log in logs:
        if log:
            by_name[log[-1].log, log[-1].name].append(log)
    return list(by_name.values())


def _claimed_at(log: list[Entry]) -> int:
    """Return where in the log the entry stands that took the name the log has now."""
    position = len(log) - 1
    while position and log[position - 1].name == log[-1].name:
        position -= 1
    return position
