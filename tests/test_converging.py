"""Clones that go on at once come to one log by rebases, whatever each saw of others: nothing lost, nothing twice."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logbook import Logbook
from test_rebasing import KINDS, extended, started

from loramgr.catalog.chains import follow
from loramgr.forks import ends, original, said_by, set_aside
from loramgr.log import Entry
from loramgr.remotes.protocol import RemoteLog
from loramgr.workspace.branches import Branch
from loramgr.workspace.home import Home
from loramgr.workspace.rebasing import rebase_here
from loramgr.workspace.remote_logs import compare

CLONES = 3
Deeds = list[tuple[str, int, str, int]]
work = st.tuples(st.just("work"), st.integers(0, CLONES - 1), st.sampled_from(KINDS), st.integers(0, 5))
look = st.tuples(st.just("look"), st.integers(0, CLONES - 1), st.just(""), st.just(0))
push = st.tuples(st.just("push"), st.integers(0, CLONES - 1), st.just(""), st.just(0))
deeds = st.lists(st.one_of(work, work, look, push, push), max_size=24)


class Meeting:
    """A remote, whose head is swapped or which has every branch, and clones that look at it and push later."""

    def __init__(self, swaps: bool) -> None:
        self.swaps = swaps
        base = started([])
        self.entries = {entry.digest: entry for entry in base}
        self.head = base[-1].digest
        self.done: set[str] = {*self.entries}
        self.here = [base] * CLONES
        self.seen = [self.look()] * CLONES
        self._steps = 0

    def look(self) -> RemoteLog:
        heads = (self.head,) if self.swaps else tuple(sorted(ends(self.entries.values())))
        return RemoteLog("x", tuple(self.entries.values()), heads, "")

    def work(self, clone: int, kind: str, pick: int) -> None:
        self._steps += 1
        before = self.here[clone]
        self.here[clone] = extended(before, f"c{clone}n{self._steps}", [(kind, pick)])
        self.done |= {entry.digest for entry in self.here[clone][len(before) :]}

    def push(self, clone: int) -> None:
        """Rebase upon what the clone has seen, and push; lost where the head was swapped since."""
        log, here = self.seen[clone], self.here[clone]
        if compare(here, log).state in ("diverged", "forked", "behind"):
            here, _ = rebase_here(cast(Home, None), here, log, "there", dry_run=True)
        self.here[clone] = here
        found = compare(here, log)
        if self.swaps:
            if self.head not in log.heads or found.state != "ahead":
                return
            self.head = here[-1].digest
        self.entries |= {entry.digest: entry for entry in here}


def met(swaps: bool, what: Deeds) -> Meeting:
    """Let clones do what they do, and then look and push one after the other, twice."""
    meeting = Meeting(swaps)
    for deed, clone, kind, pick in what:
        if deed == "work":
            meeting.work(clone, kind, pick)
        elif deed == "look":
            meeting.seen[clone] = meeting.look()
        else:
            meeting.push(clone)
    for _ in range(2):
        for clone in range(CLONES):
            meeting.seen[clone] = meeting.look()
            meeting.push(clone)
    return meeting


@pytest.mark.parametrize("swaps", [True, False])
@given(deeds)
def test_clones_come_to_one_log(swaps: bool, what: Deeds) -> None:
    meeting = met(swaps, what)
    (final,) = {tuple(entry.digest for entry in log) for log in meeting.here}
    assert meeting.look().heads == (final[-1],)
    log = meeting.here[0]
    check_said_once(log, meeting.done)
    check_rebuild(log, [*meeting.entries.values()])


@settings(max_examples=max(5, settings.default.max_examples // 20))
@given(st.booleans(), deeds)
def test_the_catalog_takes_what_they_come_to(swaps: bool, what: Deeds) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_rows(met(swaps, what).here[0], Path(folder))


@given(deeds)
def test_clones_that_saw_the_same_write_the_same(what: Deeds) -> None:
    meeting = Meeting(swaps=False)
    for deed, clone, kind, pick in what:
        if deed == "work":
            meeting.work(clone, kind, pick)
    for clone in range(CLONES):
        meeting.entries |= {entry.digest: entry for entry in meeting.here[clone]}
    log = meeting.look()
    heads = {rebase_here(cast(Home, None), here, log, "there", dry_run=True)[0][-1].digest for here in meeting.here}
    assert len(heads) == 1


def check_said_once(log: list[Entry], done: set[str]) -> None:
    said = Counter(each for entry in log for each in said_by(entry))
    assert done <= {*said}
    assert max(said.values()) == 1
    known = {entry.digest for entry in log}
    extras = sum(original(entry) not in done and entry.kind != "rebase" for entry in log)
    rebases = sum(entry.kind == "rebase" for entry in log)
    assert len(log) <= len(done) + rebases + extras
    assert extras <= 3 * len(done)
    assert rebases <= len(done) + CLONES
    assert {said for entry in log if entry.kind == "rebase" for said in said_by(entry)}.isdisjoint(known)


def check_rebuild(log: list[Entry], every: list[Entry]) -> None:
    """Check that logs lead to the same rows whatever else the store has, and that the catalog takes the log."""
    chains = follow([*every, *log])
    assert ([entry.digest for entry in chains.logs[0]], chains.forks) == ([entry.digest for entry in log], [])
    assert not set_aside([*every, *log]) & {entry.digest for entry in log}


def check_rows(log: list[Entry], folder: Path) -> None:
    """Check that the catalog takes the log, and has the versions, tags and values that it comes to."""
    book = Logbook(folder)
    with book.catalog.writing() as writer:
        writer.join([log])
    with book.catalog.reading() as reader:
        rows = {version.version: version for version in reader.log(log[-1].name)} if Branch(log).live else {}
    branch = Branch(log)
    assert {*rows} == branch.live
    for number, row in rows.items():
        assert row.metrics == branch.values["metric", number]
        assert row.labels == branch.values["label", number]
        assert set(row.tags) == {tag for tag, named in branch.tags.items() if named == number}
