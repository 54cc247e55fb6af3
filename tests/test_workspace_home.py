"""Where a home and its catalog are."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramgr import IncompatibleError, Workspace


def test_the_catalog_lies_where_its_url_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere.sqlite3"
    monkeypatch.setenv("LORAMGR_CATALOG_URL", f"sqlite:///{elsewhere}")
    workspace = Workspace(tmp_path / "home")
    assert workspace.list() == []
    assert elsewhere.exists()
    assert not (tmp_path / "home/catalog.sqlite3").exists()
    assert workspace.db_current().revision == workspace.db_current().head


@pytest.mark.parametrize("url", ["postgresql://me:secret@host/db", "mysql://x", "sqlite://", "nonsense"])
def test_another_kind_of_catalog_is_refused_without_its_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAMGR_CATALOG_URL", url)
    with pytest.raises(IncompatibleError, match="LORAMGR_CATALOG_URL") as caught:
        Workspace(tmp_path / "home").list()
    assert "secret" not in caught.value.message


def test_store_and_catalog_of_different_homes_are_refused(tmp_path: Path) -> None:
    from loramgr import IntegrityError

    for name in ("one", "two"):
        assert Workspace(tmp_path / name).list() == []
    (tmp_path / "one/catalog.sqlite3").replace(tmp_path / "two/catalog.sqlite3")
    with pytest.raises(IntegrityError, match="belongs to another store"):
        Workspace(tmp_path / "two").list()
