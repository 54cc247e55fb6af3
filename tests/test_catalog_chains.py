"""Entries in any order become the same logs, and a fork is settled by the same rule everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.catalog.chains import follow
from loramgr.errors import IntegrityError
from loramgr.log import Entry


def entry(name: str, time: int, predecessor: Entry | None = None, kind: str = "tag", **content: str) -> Entry:
    before = predecessor.digest if predecessor else None
    return Entry("adapter", kind, name, before, f"2026-01-01T00:00:{time:02}Z", "tester", content)


def names(entries: list[Entry]) -> list[list[str]]:
    return sorted([each.time[-3:-1] for each in log] for log in follow(entries).logs)


@given(st.permutations(range(6)))
def test_order_of_reading_does_not_matter(order: list[int]) -> None:
    first = entry("a", 0)
    second = entry("a", 1, first)
    entries = [first, second, entry("a", 2, second), entry("b", 3), entry("a", 4, first), entry("b", 5)]
    chains = follow(entries[position] for position in order)
    assert chains == follow(entries)
    assert [[each.time for each in log] for log in chains.logs] in (
        [[e.time for e in entries[:3]], [entries[5].time]],
        [[entries[5].time], [e.time for e in entries[:3]]],
    )
    assert chains.forks == sorted([entries[3].digest, entries[4].digest])


def test_fork_goes_to_the_entry_with_successors_then_to_the_later_one() -> None:
    first = entry("a", 0)
    followed, later = entry("a", 1, first), entry("a", 2, first)
    last = entry("a", 3, followed)
    assert names([first, followed, later]) == [["00", "02"]]
    assert names([first, followed, later, last]) == [["00", "01", "03"]]


def test_fork_of_one_instant_goes_to_the_greater_digest() -> None:
    first = entry("a", 0)
    twins = [entry("a", 1, first, to=text) for text in "xyz"]
    chains = follow([first, *twins])
    assert chains.logs[0][1].digest == max(twin.digest for twin in twins)
    assert len(chains.forks) == 2


def test_name_that_passed_from_one_log_to_another_is_no_fork() -> None:
    first = entry("a", 0)
    renamed = entry("b", 1, first, kind="rename")
    chains = follow([first, renamed, entry("a", 2)])
    assert len(chains.logs) == 2
    assert chains.forks == []


def test_rename_onto_a_name_that_another_log_has_is_left_aside() -> None:
    first, other = entry("a", 0), entry("b", 2)
    renamed = entry("b", 1, first, kind="rename")
    after = entry("b", 3, other)
    chains = follow([first, renamed, other, after])
    assert sorted(log[-1].name for log in chains.logs) == ["a", "b"]
    assert chains.forks == [renamed.digest]


def test_going_back_may_contest_another_name() -> None:
    first = entry("a", 0)
    renamed = entry("b", 1, first, kind="rename")
    heir, owner = entry("a", 2), entry("b", 3)
    chains = follow([first, renamed, heir, owner])
    assert sorted(log[-1].time for log in chains.logs) == [heir.time, owner.time]
    assert chains.forks == sorted([first.digest, renamed.digest])


def test_one_name_of_a_base_and_an_adapter_is_no_fork() -> None:
    adapter = entry("a", 0)
    assert follow([adapter, replace(adapter, log="base", kind="add")]).forks == []


def test_missing_predecessor_is_named() -> None:
    first = entry("a", 0)
    second = entry("a", 1, first)
    with pytest.raises(IntegrityError, match=first.digest):
        follow([second])
