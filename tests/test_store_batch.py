"""Files put into a store together: durable before they have names, and gone when nobody settles them."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from loramgr.digests import digest_bytes
from loramgr.durable import BatchSync
from loramgr.errors import IntegrityError, NotFoundError
from loramgr.store.batch import StoreBatch, batch
from loramgr.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def names(store: Store) -> list[str]:
    return [digest for collection in store.collections for digest in collection.digests()]


def test_staged_files_are_known_to_the_batch_alone_until_they_are_settled(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    with batch(store) as staged:
        stored = staged.blobs.put_file(tmp_path / "file")
        manifest = staged.manifests.put_bytes(b"{}")
        assert (stored.digest, stored.bytes, stored.created) == (digest_bytes(b"weights"), 7, True)
        assert staged.blobs.get(stored.digest) == b"weights"
        assert staged.manifests.contains(manifest)
        assert names(store) == []
        settled = staged.settle_files()
        assert [digest for _, digest in settled] == [stored.digest, manifest]
        assert store.blobs.get(stored.digest) == b"weights"
        assert store.blobs.path(stored.digest).stat().st_mode & 0o777 == 0o444
    assert list((store.root / "scratch").iterdir()) == []


def test_what_is_not_settled_is_gone(store: Store) -> None:
    with batch(store) as staged:
        staged.blobs.put_bytes(b"a")
    assert names(store) == []
    assert list((store.root / "scratch").iterdir()) == []


def test_what_is_there_already_is_not_new_and_what_is_damaged_is_replaced(store: Store) -> None:
    sound, damaged = store.blobs.put_bytes(b"sound"), store.blobs.put_bytes(b"damaged")
    path = store.blobs.path(damaged)
    path.chmod(0o644)
    path.write_bytes(b"rotten")
    with batch(store) as staged:
        for content in (b"sound", b"damaged", b"new", b"new"):
            staged.blobs.put_bytes(content)
        assert [digest for _, digest in staged.settle_files()] == [digest_bytes(b"new")]
    assert (store.blobs.get(sound), store.blobs.get(damaged)) == (b"sound", b"damaged")


def test_content_that_is_not_what_was_expected_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    with batch(store) as staged:
        with pytest.raises(IntegrityError, match="expected was"):
            staged.blobs.put_file(tmp_path / "file", expected=digest_bytes(b"this"))
        with pytest.raises(NotFoundError):
            staged.blobs.put_file(tmp_path / "absent")
        assert staged.settle_files() == []


def test_observers_see_every_byte(store: Store, tmp_path: Path) -> None:
    content, seen = os.urandom(3 << 20), bytearray()
    (tmp_path / "file").write_bytes(content)
    with batch(store) as staged:
        staged.blobs.put_file(tmp_path / "file", observe=seen.extend)
    assert seen == content


def test_threads_may_stage_the_same_content_at_once(store: Store) -> None:
    barrier = threading.Barrier(8)

    def put() -> None:
        barrier.wait()
        staged.blobs.put_bytes(b"the same")

    with batch(store) as staged:
        threads = [threading.Thread(target=put) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(staged.settle_files()) == 1
    assert list((store.root / "scratch").iterdir()) == []


@pytest.mark.parametrize("count", [3, 40])
def test_no_file_has_a_name_before_it_is_durable_nor_an_entry_before_the_one_it_follows(
    store: Store, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    events: list[tuple[str, int]] = []
    sync, link = BatchSync.sync, os.link
    monkeypatch.setattr(BatchSync, "sync", lambda self, paths: (sync(self, paths), events.append(("sync", len(paths)))))
    monkeypatch.setattr(os, "link", lambda *paths: (link(*paths), events.append(("link", 1))))
    with batch(store) as staged:
        staged.blobs.put_bytes(b"blob")
        staged.manifests.put_bytes(b"manifest")
        staged.settle_files()
        assert [event for event, _ in events] == ["sync", "link", "link", "sync"]
        assert events[0] == ("sync", 2)
        events.clear()
        logs = [[staged.entries.put_bytes(f"{log} {at}".encode()) for at in range(count)] for log in range(2)]
        staged.settle_entries(logs)
        assert [event for event, _ in events] == ["sync", *["link", "link", "sync"] * count]
        assert events[0] == ("sync", 2 * count)


def test_many_files_are_synced_with_few_calls(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))

    def count(files: int) -> int:
        synced.clear()
        with batch(store) as staged:
            for at in range(files):
                staged.blobs.put_bytes(f"{files} {at}".encode())
            staged.settle_files()
        return len(synced)

    few = count(4)
    assert few <= 8
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert release is not None
    if (int(release[1]), int(release[2])) >= (5, 8):
        assert count(200) == 0
    monkeypatch.setattr("loramgr.durable._reports_all_errors", lambda: False)
    assert 300 <= count(300) <= 600


def test_a_batch_is_a_store(store: Store) -> None:
    with batch(store) as staged:
        assert isinstance(staged, StoreBatch)
        assert (staged.root, staged.uuid) == (store.root, store.uuid)
