"""A log made anew after another one says what both said, and a rebuild agrees with the catalog about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from logbook import Logbook, summary

from loramgr.catalog.chains import follow
from loramgr.digests import digest_bytes
from loramgr.errors import ConflictError
from loramgr.forks import set_aside
from loramgr.log import Entry
from loramgr.workspace.branches import Branch
from loramgr.workspace.rebasing import rebased

Steps = list[tuple[str, int]]
KINDS = ("publish", "tag", "untag", "label", "metric", "rename", "remove", "restore")
steps = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 5)), max_size=7)


def extended(entries: list[Entry], side: str, what: Steps) -> list[Entry]:
    """Return a log that goes on as commands would have it go on; steps that make no sense there are left out."""
    branch = Branch([*entries])
    for at, (kind, pick) in enumerate(what):
        content = _content(branch, side, kind, pick)
        if content is None:
            continue
        time = f"2026-01-02T00:00:{len(branch.entries):02}Z"
        name = f"{side}{pick}" if kind == "rename" else branch.name if branch.entries else "x"
        before = branch.entries[-1].digest if branch.entries else None
        entry = Entry("adapter", kind, name, before, time, f"{side}{at}", content)
        branch = Branch([*branch.entries, entry.settled()])
    return branch.entries


def _content(branch: Branch, side: str, kind: str, pick: int) -> dict[str, object] | None:
    live, gone = sorted(branch.live), sorted(branch.versions.keys() - branch.live)
    if kind == "publish":
        digest = digest_bytes(f"{pick % 3 if pick < 3 else side}{branch.next_number}".encode())
        said = {"parents": [], "message": side, "recipe": None, "labels": {"by": side}, "metrics": {}, "tags": [side]}
        if live:
            said["parents"] = [{"ref": f"{branch.name}@v{live[-1]}", "digest": branch.versions[live[-1]]}]
        return {"number": branch.next_number, "version": digest, "summary": summary(), **said}
    if kind == "restore":
        return {"numbers": gone[:1], "whole": not live} if gone else None
    if not live:
        return None
    number = live[pick % len(live)]
    if kind == "untag":
        return {"tag": sorted(branch.tags)[0]} if branch.tags else None
    return {
        "tag": {"tag": f"t{pick}", "number": number},
        "label": {"number": number, "labels": {f"k{pick}": side}},
        "metric": {"number": number, "metrics": {f"m{pick}": pick}},
        "rename": {"from": branch.name},
        "remove": {"numbers": [number], "whole": live == [number]},
    }[kind]


def started(common: Steps) -> list[Entry]:
    return extended([], "c", [("publish", 0), *common])


@given(steps, steps, steps)
def test_a_rebase_keeps_every_version_of_both_sides(common: Steps, theirs: Steps, ours: Steps) -> None:
    base = started(common)
    there, here = extended(base, "t", theirs), extended(base, "o", ours)
    done = Branch(rebased(there, [here], "origin").entries)
    assert done.entries[: len(there)] == there
    own, other = Branch(here), Branch(there)
    published = {entry.content["version"] for entry in here[len(base) :] if entry.kind == "publish"}
    assert {done.versions[number] for number in done.live} >= {own.versions[n] for n in own.live} & published
    assert set(other.versions.values()) | set(own.versions.values()) == set(done.versions.values())
    live_there = [other.versions[number] for number in other.live]
    again = [entry for entry in done.entries[len(there) :] if entry.kind == "publish"]
    assert not {entry.content["version"] for entry in again} & set(live_there)


@given(steps, steps, steps, st.data())
def test_a_rebuild_takes_the_rebased_log_whatever_is_left_of_the_old_one(
    common: Steps, theirs: Steps, ours: Steps, data: st.DataObject
) -> None:
    base = started(common)
    there, here = extended(base, "t", theirs), extended(base, "o", ours)
    assume(len(there) > len(base))  # where the other side did not go on, nobody rebases
    after = rebased(there, [here], "origin").entries
    kept = data.draw(st.integers(len(base), len(here)))  # gc takes the entries that do not count from the end
    every = data.draw(st.permutations([*after, *here[len(base) : kept]]))
    chains = follow(every)
    assert [[entry.digest for entry in log] for log in chains.logs] == [[entry.digest for entry in after]]
    assert chains.forks == []


@given(steps, steps, steps, steps)
def test_a_second_rebase_replaces_what_the_first_one_replaced(
    common: Steps, theirs: Steps, ours: Steps, more: Steps
) -> None:
    base = started(common)
    there, here = extended(base, "t", theirs), extended(base, "o", ours)
    first = rebased(there, [here], "origin").entries
    further = extended(there, "u", more)
    second = rebased(further, [first], "origin").entries
    chains = follow([*second, *here, *first])
    assert [entry.digest for entry in chains.logs[0]] == [entry.digest for entry in second]
    assert (len(chains.logs), chains.forks) == (1, [])


def test_entries_that_were_replaced_and_went_on_are_a_fork() -> None:
    base = started([])
    there, here = extended(base, "t", [("publish", 4)]), extended(base, "o", [("publish", 4)])
    after = rebased(there, [here], "origin").entries
    longer = extended(here, "o", [("tag", 1)])
    assert set_aside([*after, *here]) == {here[1].digest}
    assert set_aside([*after, *longer]) == set()
    assert len(follow([*after, *longer]).forks) == 1


def test_a_taken_number_is_the_next_one_and_parents_follow() -> None:
    base = started([])
    there = extended(base, "t", [("publish", 4)])
    here = extended(base, "o", [("publish", 4), ("publish", 5), ("tag", 2)])
    done = rebased(there, [here], "origin")
    assert done.notes == [
        "x@v2 is v3 now: its number was given away at origin",
        "x@v3 is v4 now: its number was given away at origin",
    ]
    publications = [entry.content for entry in done.entries if entry.kind == "publish"]
    assert [content["number"] for content in publications] == [1, 2, 3, 4]
    assert [parent["ref"] for content in publications for parent in content["parents"]] == ["x@v1", "x@v1", "x@v3"]
    assert Branch(done.entries).tags == {"c": 1, "t": 2, "o": 4, "t2": 4}
    assert [entry.author for entry in done.entries[-2:]] == ["o1", "o2"]


def test_a_version_that_is_there_is_not_published_twice() -> None:
    base = started([])
    there = extended(base, "t", [("publish", 4), ("publish", 1)])
    same = next(entry for entry in reversed(there) if entry.kind == "publish").content
    here = extended(base, "o", [("publish", 4)])
    here = [*here[:1], replace(here[1], content={**here[1].content, "version": same["version"]}).settled()]
    done = rebased(there, [here], "origin")
    assert done.notes == ["x@v2 is v3 at origin: the same files"]
    assert [entry.kind for entry in done.entries[len(there) :]] == ["tag", "label", "rebase"]


def test_a_log_is_swapped_for_another_in_one_transaction(tmp_path: Path) -> None:
    book = Logbook(tmp_path)
    first = book.publish("x", tags=["prod"])
    own = book.publish("x", labels={"by": "us"})
    theirs = replace(own, author="them", content={**own.content, "version": digest_bytes(b"theirs")})
    after = rebased([first, theirs.settled()], [[first, own.settled()]], "origin").entries
    with book.catalog.writing() as writer:
        new = writer.swap([first.digest], [after])
        assert [entry.digest for entry in new[0]] == [entry.digest for entry in after[1:]]
        assert writer.appended == [entry.digest for entry in after[1:]]
    for entry in after:
        book.store.entries.put_bytes(entry.encode())
    with book.catalog.reading() as reader:
        assert [(version.version, version.tags) for version in reader.log("x")] == [(3, []), (2, []), (1, ["prod"])]
        assert reader.compare([*book.entries()]) == []


@pytest.mark.parametrize("kind", ["rebase", "tag"])
def test_a_log_that_says_what_another_one_here_says_is_refused(tmp_path: Path, kind: str) -> None:
    book = Logbook(tmp_path)
    own = book.publish("mine")
    other = Logbook(tmp_path / "other")
    other.publish("theirs")
    said = {"replaces": [own.digest]} if kind == "rebase" else {"tag": "t", "number": 1, "original": own.digest}
    other.add(kind, "theirs", **said)
    with pytest.raises(ConflictError, match="says anew what 'mine' says here"), book.catalog.writing() as writer:
        writer.join([_ordered(other)])


def test_a_name_that_another_log_has_stays_its_own(tmp_path: Path) -> None:
    book, other = Logbook(tmp_path), Logbook(tmp_path / "other")
    book.publish("x")
    other.publish("x", message="another one")
    with pytest.raises(ConflictError, match="taken"), book.catalog.writing() as writer:
        writer.join([_ordered(other)])


def _ordered(book: Logbook) -> list[Entry]:
    return follow(book.entries()).logs[0]
