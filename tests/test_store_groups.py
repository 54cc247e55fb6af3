"""Entries that arrive together count together, whatever moment a kill chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramgr.digests import digest_bytes
from loramgr.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def test_a_group_is_incomplete_until_its_last_entry_is_there(store: Store) -> None:
    digests = [digest_bytes(data) for data in (b"one", b"two", b"three")]
    with store.groups.announced(digests, store.entries):
        for data in (b"one", b"two"):
            store.entries.put_bytes(data)
            assert Store.open(store.root).groups.incomplete(store.entries) == {*digests}
        store.entries.put_bytes(b"three")
        assert store.groups.incomplete(store.entries) == set()
    assert list((store.root / "groups").iterdir()) == []


def test_a_single_entry_needs_no_group(store: Store) -> None:
    with store.groups.announced([digest_bytes(b"one")], store.entries):
        assert not (store.root / "groups").exists()
    with store.groups.announced([], store.entries):
        assert store.groups.incomplete(store.entries) == set()


def test_a_group_goes_when_the_block_fails(store: Store) -> None:
    digests = [digest_bytes(b"one"), digest_bytes(b"two")]
    with pytest.raises(KeyError), store.groups.announced(digests, store.entries):
        raise KeyError
    assert store.groups.incomplete(store.entries) == set()


def test_what_a_kill_left_stays_as_long_as_its_entries(store: Store) -> None:
    digests = [digest_bytes(b"one"), digest_bytes(b"two")]
    folder = store.root / "groups"
    folder.mkdir()
    (folder / "left").write_text("\n".join(digests) + "\nno digest\n")
    store.entries.put_bytes(b"one")
    assert store.groups.incomplete(store.entries) == {*digests}
    store.groups.drop_settled({digests[0]})
    assert store.groups.incomplete(store.entries) == {*digests}
    store.groups.drop_settled(set())
    assert store.groups.incomplete(store.entries) == set()


def test_a_failure_that_leaves_an_entry_leaves_its_group(store: Store) -> None:
    digests = [digest_bytes(b"one"), digest_bytes(b"two")]
    put = {"one": b"one"}
    with pytest.raises(KeyError), store.groups.announced(digests, store.entries):
        [store.entries.put_bytes(put[name]) for name in ("one", "two")]
    assert store.groups.incomplete(store.entries) == {*digests}


def test_taking_out_what_has_no_folder(store: Store) -> None:
    digest = digest_bytes(b"one")
    (store.entries.folder / digest.removeprefix("sha256:")[:2]).rmdir()
    store.entries.discard(digest)
    assert not store.entries.contains(digest)
