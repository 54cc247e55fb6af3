import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.containment import resolve_inside
from loramgr.errors import IncompatibleError, IntegrityError


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "a/../b", "/x", "c:/x", "a\\b", "a\0b"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(IntegrityError, match="leaves the folder"):
        resolve_inside(tmp_path, name)


@pytest.mark.parametrize("name", ["x", "a/b", "..x", "a..b", "snowman ☃"])
def test_names_that_stay(tmp_path: Path, name: str) -> None:
    assert resolve_inside(tmp_path, name) == tmp_path / name


@given(st.text(max_size=12))
def test_whatever_is_accepted_lies_below_the_folder(name: str) -> None:
    folder = Path("/no/such/folder")
    try:
        path = resolve_inside(folder, name)
    except IntegrityError:
        return
    assert folder in Path(os.path.normpath(path)).parents


def test_links(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    outside.write_text("x")
    (folder / "file").write_text("x")
    (folder / "inside").symlink_to("file")
    (folder / "leads-out").symlink_to(outside)
    (folder / "up").symlink_to("..")
    (folder / "circle").symlink_to("circle")
    assert resolve_inside(folder, "inside") == folder / "inside"
    for name in ("leads-out", "up", "up/secret"):
        with pytest.raises(IncompatibleError, match="outside of the folder"):
            resolve_inside(folder, name)
    (tmp_path / "linked").symlink_to(folder)
    assert resolve_inside(tmp_path / "linked", "file").read_text() == "x"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IncompatibleError, match="not a regular file"):
        resolve_inside(tmp_path, "pipe")


def test_snapshots_of_the_hub_cache_link_to_their_blobs(tmp_path: Path) -> None:
    for repository in ("models--a--one", "models--a--two"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        (tmp_path / repository / "blobs" / "b").write_text(repository)
        (tmp_path / repository / "snapshots" / "c0ffee" / "sub").mkdir(parents=True)
    (tmp_path / "blobs" / "aa").mkdir(parents=True)
    (tmp_path / "blobs" / "aa" / "shared").write_text("shared")
    (tmp_path / "models--a--one" / "blobs" / "s").symlink_to("../../blobs/aa/shared")
    snapshot = tmp_path / "models--a--one" / "snapshots" / "c0ffee"
    (snapshot / "own").symlink_to("../../blobs/b")
    (snapshot / "shared").symlink_to("../../blobs/s")
    (snapshot / "sub" / "own").symlink_to("../../../blobs/b")
    (snapshot / "other").symlink_to("../../../models--a--two/blobs/b")
    assert resolve_inside(snapshot, "own").read_text() == "models--a--one"
    assert resolve_inside(snapshot, "shared").read_text() == "shared"
    assert resolve_inside(snapshot, "sub/own").read_text() == "models--a--one"
    assert resolve_inside(snapshot / "sub", "own").read_text() == "models--a--one"
    with pytest.raises(IncompatibleError, match="outside of the folder"):
        resolve_inside(snapshot, "other")
