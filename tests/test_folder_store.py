"""Folders as key stores: links, crashes, leftovers, file systems without locks or links."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError, NotFoundError, UncheckedError
from loramgr.remotes.opening_store import open_keystore
from loramgr.remotes.protocol import KeyStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "remote").mkdir()
    return tmp_path / "remote"


@pytest.fixture
def store(folder: Path) -> KeyStore:
    return open_keystore(f"file:{folder}")


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    store = open_keystore(f"file:{tmp_path / 'mount' / 'remote'}")
    calls = (
        lambda: store.put_if_absent("a", b""),
        lambda: store.put_if_match("a", b"", None),
        lambda: store.head("a"),
        lambda: list(store.get("a")),
        lambda: list(store.list("")),
        store.capabilities,
    )
    for call in calls:
        with pytest.raises(NotFoundError, match="no such folder") as caught:
            call()
        assert caught.value.hint == f"mkdir -p {tmp_path / 'mount' / 'remote'}"
    assert not (tmp_path / "mount").exists()


def test_links_in_the_folder_are_not_followed(store: KeyStore, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (folder / "logs").symlink_to(outside)
    (folder / "file").symlink_to(outside / "secret")
    (folder / "dangling").symlink_to(outside / "new")
    assert list(store.list("")) == []
    for key in ("logs/secret", "logs/new", "file", "dangling"):
        calls = (
            lambda key=key: store.head(key),
            lambda key=key: list(store.get(key)),
            lambda key=key: store.put_if_absent(key, b"x"),
            lambda key=key: store.put_if_match(key, b"x", None),
            *([lambda key=key: store.delete(key)] if "/" in key else []),
        )
        for call in calls:
            with pytest.raises(IntegrityError, match="link"):
                call()
    store.delete("dangling")  # a link itself may go, what it leads to stays
    store.delete("file")
    assert not (folder / "file").is_symlink()
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_what_is_no_file_can_be_deleted_unless_it_holds_something(store: KeyStore, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "x").write_bytes(b"x")
    os.mkfifo(folder / "pipe")
    store.delete("empty")
    store.delete("pipe")
    with pytest.raises(IntegrityError, match="is a folder") as caught:
        store.delete("full")
    assert caught.value.hint == f"rm -r {folder / 'full'}"
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == ["full"]


def test_the_folder_for_temporary_files_may_not_be_a_link(store: KeyStore, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (folder / ".temporary").symlink_to(tmp_path / "outside")
    with pytest.raises(IntegrityError, match="link"):
        store.put_if_absent("a", b"x")
    assert list((tmp_path / "outside").iterdir()) == []


def test_the_folder_itself_may_be_reached_by_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert open_keystore(f"file:{tmp_path / 'link'}").put_if_absent("a", b"x")
    assert (folder / "a").read_bytes() == b"x"


def test_what_is_no_file_is_no_key(store: KeyStore, folder: Path) -> None:
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    assert store.head("folder") is None
    assert store.head("folder/absent") is None
    with pytest.raises(IntegrityError, match="not a regular file"):
        store.head("pipe")
    with pytest.raises(IntegrityError, match="not a regular file"):
        list(store.get("pipe"))
    (folder / "file").write_bytes(b"")
    assert store.head("file/below") is None
    assert [one.key for one in store.list("")] == ["file"]


def test_hidden_files_are_not_listed_and_old_leftovers_are_swept(store: KeyStore, folder: Path) -> None:
    (folder / ".temporary").mkdir()
    for name, days in (("old", 2), ("new", 0)):
        path = folder / ".temporary" / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - days * 86400,) * 2)
    assert list(store.list("")) == []
    store.put_if_absent("a", b"x")
    assert [path.name for path in (folder / ".temporary").iterdir()] == ["new"]
    assert [one.key for one in store.list("")] == ["a"]


KILLED = """
import os, sys
from pathlib import Path
from loramgr import durable
from loramgr.remotes import folder_store
from loramgr.remotes.opening_store import open_keystore
step, count = sys.argv[2], [0]
def dying(name, real):
    def call(*arguments, **options):
        if name == step:
            os.kill(os.getpid(), 9)
        return real(*arguments, **options)
    return call
os.fsync = dying("fsync", os.fsync)
os.link = dying("link", os.link)
folder_store.sync_folder = dying("sync_folder", folder_store.sync_folder)
Path.replace = dying("replace", Path.replace)
store = open_keystore(sys.argv[1])
if sys.argv[3] == "swap":
    store.put_if_match("head", b"2" * 9, store.head("head").token)
else:
    store.put_if_absent("new/key", b"n" * 9)
"""


@pytest.mark.parametrize("operation", ["put", "swap"])
@pytest.mark.parametrize("step", ["fsync", "link", "sync_folder", "replace"])
def test_a_killed_writer_leaves_a_whole_key_or_none(store: KeyStore, operation: str, step: str) -> None:
    store.put_if_match("head", b"1" * 9, None)
    done = subprocess.run([sys.executable, "-c", KILLED, store.url, step, operation], check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    assert b"".join(store.get("head")) in (b"1" * 9, b"2" * 9)
    assert store.head("new/key") is None or b"".join(store.get("new/key")) == b"n" * 9
    assert {one.key for one in store.list("")} <= {"head", "new/key"}
    # and nobody is locked out
    assert store.put_if_match("head", b"3", store.head("head").token)
    store.put_if_absent("new/key", b"n" * 9)
    assert b"".join(store.get("new/key")) == b"n" * 9


def test_without_locks_the_store_says_that_it_cannot_swap(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert not store.capabilities().compare_and_swap
    with pytest.raises(IncompatibleError, match="no locks"):
        store.put_if_match("head", b"1", None)
    assert store.put_if_absent("a", b"x")
    assert [one.key for one in store.list("")] == ["a"]


def test_without_hard_links_keys_are_put_all_the_same(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    assert store.put_if_absent("a/b", b"x")
    assert not store.put_if_absent("a/b", b"y")
    assert b"".join(store.get("a/b")) == b"x"


def test_what_the_file_system_refuses_names_the_remote(
    store: KeyStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoramgrError, match=rf"file:{folder}: No space left") as caught:
        store.put_if_absent("a", b"x")
    assert (caught.value.exit_code, str(caught.value.hint).split()[0]) == (1, "free")
    monkeypatch.undo()
    assert store.head("a") is None
    assert list((folder / ".temporary").iterdir()) == []


def test_a_source_that_cannot_be_read_is_named(store: KeyStore, tmp_path: Path) -> None:
    with pytest.raises(UncheckedError, match="absent cannot be read"):
        store.put_if_absent("a", tmp_path / "absent")


def test_large_keys_have_no_token_and_are_not_read_for_one(store: KeyStore) -> None:
    store.put_if_absent("large", bytes(1 << 20))
    found = store.head("large")
    assert found is not None
    assert found.token == ""
