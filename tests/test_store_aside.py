"""Files set aside: moved whole, found again, told by the time of taking."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loramgr.errors import IntegrityError
from loramgr.store.store import Store

MONDAY = datetime(2026, 8, 31, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def test_what_is_taken_leaves_the_collection_and_is_found_again(store: Store) -> None:
    one, two = store.blobs.put_bytes(b"one"), store.blobs.put_bytes(b"two")
    store.trash.take(store.blobs, [one], MONDAY)
    assert list(store.blobs.digests()) == [two]
    assert [place.get(one) for place in store.trash.holding(store.blobs, one)] == [b"one"]
    assert list(store.trash.holding(store.manifests, one)) == []
    assert list(store.quarantine.holding(store.blobs, one)) == []


def test_a_file_taken_twice_is_kept_twice_the_newest_first(store: Store) -> None:
    for day in range(2):
        digest = store.blobs.put_bytes(b"one")
        store.trash.take(store.blobs, [digest], MONDAY + timedelta(days=day))
    places = [place.folder.parent.name for place in store.trash.holding(store.blobs, digest)]
    assert places == ["20260901T120000.000000Z", "20260831T120000.000000Z"]


def test_a_file_moves_back_over_a_damaged_one(store: Store) -> None:
    digest = store.blobs.put_bytes(b"one")
    store.trash.take(store.blobs, [digest], MONDAY)
    store.blobs.put_bytes(b"one")
    path = store.blobs.path(digest)
    path.chmod(0o644)
    path.write_bytes(b"two")
    (place,) = store.trash.holding(store.blobs, digest)
    place.move([digest], store.blobs)
    assert store.blobs.get(digest) == b"one"
    assert list(store.trash.holding(store.blobs, digest)) == []


def test_only_what_was_taken_in_time_is_purged(store: Store) -> None:
    digests = [store.blobs.put_bytes(b"%d" % day) for day in range(3)]
    for day, digest in enumerate(digests):
        store.trash.take(store.blobs, [digest], MONDAY + timedelta(days=day))
    (store.trash.folder / "notes").mkdir()
    old = store.trash.taken_before(MONDAY + timedelta(days=1))
    assert [digest for batch in old for _, digest in store.trash.contents(batch, store.collections)] == digests[:2]
    for batch in old:
        store.trash.purge(batch)
    assert [bool(list(store.trash.holding(store.blobs, digest))) for digest in digests] == [False, False, True]
    assert (store.trash.folder / "notes").is_dir()


def test_taking_nothing_makes_nothing(store: Store) -> None:
    store.trash.take(store.blobs, [], MONDAY)
    assert not store.trash.folder.exists()
    assert store.trash.taken_before(MONDAY) == []


def test_the_age_of_what_is_not_there(store: Store) -> None:
    with pytest.raises(IntegrityError, match="missing"):
        store.blobs.modified("sha256:" + "0" * 64)
