"""The logs of adapters, here and at a remote, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramgr.catalog.reader import Reader
from loramgr.digests import short
from loramgr.errors import IntegrityError, RacedError
from loramgr.forks import covers, ends, set_aside
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.remotes.protocol import KnownEntry, Remote, RemoteLog
from loramgr.workspace.home import Home

__all__ = [
    "Comparison",
    "State",
    "chain_to",
    "compare",
    "favourite",
    "find_log",
    "known_entries",
    "live_there",
    "local_log",
    "says_the_same",
    "stored",
    "versions_there",
    "went_apart",
]

State = Literal["same", "ahead", "behind", "diverged", "forked", "here", "there"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a log here and one at a remote stand to each other.

    `there` is the remote's chain, first to last: up to its head, of several up to one that this home does not have;
    `ahead` are the entries here that the chain lacks, `behind` those of the chain that are not here.
    """

    state: State
    there: list[Entry]
    ahead: list[Entry]
    behind: list[Entry]


def known_entries(home: Home) -> KnownEntry:
    """Return what gives a log entry of this home's store by its digest, None for one that is absent or damaged."""

    def known(digest: str) -> Entry | None:
        if not home.store.entries.contains(digest):
            return None
        try:
            return Entry.decode(home.store.entries.get(digest))
        except IntegrityError:
            return None

    return known


def local_log(home: Home, reader: Reader, name: str) -> list[Entry]:
    """Return the entries of an adapter's log, first to last; empty when the name is free."""
    state = reader.log_state("adapter", name)
    return [] if state is None else log_of_root(home, reader, state.root)


def log_of_root(home: Home, reader: Reader, root: str) -> list[Entry]:
    """Return the entries of the log that begins with this one, first to last; empty when there is none."""
    return stored(home, reader.newest_entries(root, None)[::-1])


def stored(home: Home, digests: Sequence[str]) -> list[Entry]:
    """Return entries of this home by their digests; IntegrityError for one that is missing or damaged."""
    return [Entry.stored(digest, home.store.entries.get(digest)) for digest in digests]


def find_log(remote: Remote, name: str, here: Sequence[Entry], known: KnownEntry) -> RemoteLog | None:
    """Return the remote's log of that name; where the adapter was renamed here, the one that it was there before."""
    found = remote.log(name, known)
    for earlier in _earlier_names(here, name) if found is None else ():
        candidate = remote.log(earlier, known)
        if candidate is not None and candidate.entries[0].digest == here[0].digest:
            return candidate
    return found


def _earlier_names(here: Sequence[Entry], name: str) -> list[str]:
    return [each for each in dict.fromkeys(entry.name for entry in reversed(here)) if each != name]


def compare(here: Sequence[Entry], log: RemoteLog | None) -> Comparison:
    """Tell how a log here, first entry to last and empty for none, stands to the one at a remote, None for none."""
    if log is None:
        return Comparison("here", [], [*here], [])
    settled = {entry.digest for entry in here} | set_aside([*here, *log.entries])
    foreign = [head for head in log.heads if head not in settled]
    chains = [chain_to(log, head) for head in foreign or log.heads]
    there = favourite(chains) if foreign else max(chains, key=lambda chain: _common(here, chain))
    common = _common(here, there)
    ahead, behind = [*here[common:]], there[common:]
    if not here:
        state: State = "there"
    elif foreign and len(log.heads) > 1:
        state = "forked"
    elif ahead and behind:
        state = "diverged"
    else:
        state = "ahead" if ahead else "behind" if behind else "same"
    return Comparison(state, there, ahead, behind)


def live_there(log: RemoteLog | None) -> set[tuple[int, str]]:
    """Return number and digest of the versions that a remote has on any branch of a log."""
    if log is None:
        return set()
    chains = [chain_to(log, head) for head in log.heads]
    return {(entry.content["number"], entry.content["version"]) for chain in chains for entry in live(chain)}


def versions_there(log: RemoteLog) -> frozenset[str]:
    """Return the digests of all versions that a remote's log ever had, on any branch."""
    return frozenset(entry.content["version"] for entry in log.entries if entry.kind == "publish")


def went_apart(name: str, remote: str, found: Comparison, heads: Sequence[str]) -> RacedError:
    """Return the error for a log that went on in both places, or in two ways at the remote; it names the heads."""
    there = " and ".join(map(short, heads))
    here = f"here its head is {short(found.ahead[-1].digest)}, " if found.ahead else ""
    return RacedError(
        f"the log of adapter {name!r} went on in {'two ways' if found.state == 'forked' else 'both places'}: {here}"
        f"at {remote} {there}",
        f"loramgr push --rebase {name}",
    )


def says_the_same(here: Sequence[Entry], found: Comparison) -> bool:
    """Say whether a log here and one at a remote went apart and account for the same, each with numbers of its own.

    That is how it stays where one home pushes to two remotes that went on: neither gives up numbers that others know.
    """
    return found.state == "diverged" and covers(found.there, here) and covers(here, found.there)


def favourite(chains: Sequence[list[Entry]]) -> list[Entry]:
    """Return the branch, each given whole, that counts where all clients have to choose the same."""
    best = ends(entry for chain in chains for entry in chain)[0]
    return next(chain for chain in chains if chain[-1].digest == best)


def chain_to(log: RemoteLog, head: str) -> list[Entry]:
    """Return the entries of one of a remote log's branches, from the first to that head."""
    known = {entry.digest: entry for entry in log.entries}
    chain = [known[head]]
    while (before := chain[-1].predecessor) is not None:
        chain.append(known[before])
    return chain[::-1]


def _common(here: Sequence[Entry], there: Sequence[Entry]) -> int:
    pairs = zip(here, there, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a.digest != b.digest), min(len(here), len(there)))
