"""Blobs: content goes in whole or not at all, and is never believed because of its name."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramgr.digests import CHUNK, digest_bytes
from loramgr.errors import IntegrityError, NotFoundError, UncheckedError, UsageError
from loramgr.store.blobs import BlobStore
from loramgr.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


@pytest.fixture
def blobs(store: Store) -> BlobStore:
    return store.blobs


def scratch(blobs: BlobStore) -> list[Path]:
    return list(blobs.scratch.iterdir())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(data=st.binary(max_size=200))
def test_what_was_put_comes_back(blobs: BlobStore, data: bytes) -> None:
    digest = blobs.put_bytes(data)
    assert digest == digest_bytes(data)
    assert blobs.get(digest) == data
    assert blobs.size(digest) == len(data)
    blobs.check(digest)


def test_file_is_named_by_its_content_and_read_only(blobs: BlobStore, tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK + 5)
    (tmp_path / "source").write_bytes(data)
    stored = blobs.put_file(tmp_path / "source", expected=digest_bytes(data))
    path = blobs.path(stored.digest)
    assert stored == (digest_bytes(data), len(data), True)
    assert path.relative_to(blobs.folder).as_posix() == f"{stored.digest[7:9]}/{stored.digest[9:]}"
    assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert path.stat().st_nlink == 1
    assert scratch(blobs) == []


def test_another_content_than_declared_leaves_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"other")
    with pytest.raises(IntegrityError, match="source") as error:
        blobs.put_file(tmp_path / "source", expected=digest_bytes(b"declared"))
    assert digest_bytes(b"other") in error.value.message
    assert list(blobs.digests()) == []
    assert scratch(blobs) == []


def test_absent_source(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        blobs.put_file(tmp_path / "absent")


@pytest.mark.parametrize("damage", [b"", b"contenT", b"content and more"])
def test_damaged_file_is_noticed_and_healed_by_the_next_put(blobs: BlobStore, tmp_path: Path, damage: bytes) -> None:
    digest = blobs.put_bytes(b"content")
    path = blobs.path(digest)
    path.chmod(0o644)
    path.write_bytes(damage)
    for read in (blobs.get, blobs.check):
        with pytest.raises(IntegrityError, match=digest) as error:
            read(digest)
        assert error.value.hint == "loramgr verify"
    (tmp_path / "source").write_bytes(b"content")
    assert not blobs.put_file(tmp_path / "source").created
    assert blobs.get(digest) == b"content"
    assert scratch(blobs) == []


def test_sound_file_is_kept(blobs: BlobStore, tmp_path: Path) -> None:
    inode = blobs.path(blobs.put_bytes(b"content")).stat().st_ino
    (tmp_path / "source").write_bytes(b"content")
    digest, _, created = blobs.put_file(tmp_path / "source")
    blobs.put_bytes(b"content")
    assert not created
    assert blobs.path(digest).stat().st_ino == inode
    assert scratch(blobs) == []


def test_missing_file_is_an_integrity_error_that_names_its_kind(store: Store) -> None:
    digest = digest_bytes(b"absent")
    for collection, kind in ((store.blobs, "blob"), (store.manifests, "manifest"), (store.entries, "log entry")):
        assert not collection.contains(digest)
        for read in (collection.get, collection.check, collection.path, collection.size):
            with pytest.raises(IntegrityError, match=f"{kind} {digest} is missing"):
                read(digest)


def test_unreadable_file_is_unchecked(blobs: BlobStore) -> None:
    digest = blobs.put_bytes(b"content")
    path = blobs.path(digest)
    path.unlink()
    path.mkdir()
    with pytest.raises(UncheckedError, match=digest):
        blobs.check(digest)


@pytest.mark.parametrize("digest", ["", "sha256:../../x", "sha256:" + "a" * 63, "a" * 64, "sha256:" + "A" * 64])
def test_malformed_digest_never_becomes_a_path(blobs: BlobStore, digest: str) -> None:
    with pytest.raises(UsageError):
        blobs.path(digest)


def test_discarded_file_is_gone(blobs: BlobStore) -> None:
    kept, digest = blobs.put_bytes(b"kept"), blobs.put_bytes(b"content")
    blobs.discard(digest)
    blobs.discard(digest)
    assert list(blobs.digests()) == [kept]


def test_digests_are_sorted_and_pass_over_foreign_files(blobs: BlobStore) -> None:
    digests = sorted(blobs.put_bytes(bytes([number])) for number in range(20))
    (blobs.folder / "00" / "notes.txt").write_text("not ours")
    (blobs.folder / "lost+found").mkdir()
    assert list(blobs.digests()) == digests


def test_a_fan_folder_that_a_copy_dropped_is_made_again(blobs: BlobStore) -> None:
    digest = digest_bytes(b"content")
    (blobs.folder / digest[7:9]).rmdir()
    assert list(blobs.digests()) == []
    assert blobs.get(blobs.put_bytes(b"content")) == b"content"


def test_two_syncs_for_a_new_blob(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), sync(descriptor))[1])
    blobs.put_bytes(b"content")
    assert len(synced) == 2


def test_without_hard_links(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)
    digest = blobs.put_bytes(b"content")
    assert blobs.get(digest) == b"content"
    assert scratch(blobs) == []


FULL = """
import resource, sys
from pathlib import Path
from loramgr.store.store import Store
blobs = Store.open(Path(sys.argv[1])).blobs
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    blobs.put_bytes(b"x" * 2000)
except OSError as error:
    sys.exit(7 if list(blobs.digests()) == [] and list(blobs.scratch.iterdir()) == [] else 8)
"""


def test_no_space_leaves_nothing(store: Store) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, store.root], check=False)
    assert done.returncode == 7


PUT = """
import sys
from pathlib import Path
from loramgr.store.store import Store
blobs = Store.create(Path(sys.argv[1])).blobs
for number in range(100):
    blobs.put_bytes(b"%d" % number)
"""


def test_two_processes_make_the_store_and_put_the_same_files_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUT, str(tmp_path / "new" / "store")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    blobs = Store.open(tmp_path / "new" / "store").blobs
    assert list(blobs.digests()) == sorted(digest_bytes(b"%d" % number) for number in range(100))
    for digest in blobs.digests():
        blobs.check(digest)
    assert scratch(blobs) == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["store"]
