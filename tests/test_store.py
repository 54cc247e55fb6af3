"""The store's folder: made whole, opened without a write, refused when it is not ours to read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError
from loramgr.store.store import Store


def snapshot(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_ino) for path in [root, *root.rglob("*")])


def test_created_store_opens_with_the_same_uuid(tmp_path: Path) -> None:
    root = tmp_path / "a home" / "store"
    store = Store.create(root)
    assert Store.open(root).uuid == store.uuid
    assert Store.create(root).uuid == store.uuid
    assert json.loads((root / "workspace.json").read_text()) == {"layout": 1, "uuid": store.uuid}
    assert list(root.parent.iterdir()) == [root]


def test_two_stores_have_two_uuids(tmp_path: Path) -> None:
    assert Store.create(tmp_path / "a").uuid != Store.create(tmp_path / "b").uuid


def test_reading_writes_nothing(tmp_path: Path) -> None:
    digest = Store.create(tmp_path / "store").blobs.put_bytes(b"content")
    before = snapshot(tmp_path)
    blobs = Store.open(tmp_path / "store").blobs
    assert blobs.get(digest) == b"content"
    assert list(blobs.digests()) == [digest]
    assert snapshot(tmp_path) == before


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Store.open(tmp_path / "absent")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"layout": 1}', '{"layout": "1", "uuid": "x"}'])
def test_damaged_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "workspace.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"workspace\.json"):
        Store.open(tmp_path)


def test_lost_description_is_not_a_new_store(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    (tmp_path / "store" / "workspace.json").unlink()
    with pytest.raises(IntegrityError):
        Store.open(tmp_path / "store")
    with pytest.raises(OSError, match="not empty"):
        Store.create(tmp_path / "store")
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


def test_newer_layout(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    (tmp_path / "store" / "workspace.json").write_text('{"layout": 2, "uuid": "x"}')
    with pytest.raises(IncompatibleError, match="newer loramgr"):
        Store.open(tmp_path / "store")
