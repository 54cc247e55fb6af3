"""Where adapters are beneath a folder, and in which order."""

from __future__ import annotations

from pathlib import Path

from loramgr.formats.discovery import find_adapters, is_checkpoint


def make(root: Path, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "adapter_config.json").write_text("{}")


def found(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_adapters(root).adapters]


def test_folders_are_sorted_and_checkpoints_counted(tmp_path: Path) -> None:
    make(tmp_path, "b", "a/checkpoint-100", "a/checkpoint-9", "a/checkpoint-final", "a/best", "a", "C/x/y")
    checkpoints = ["a/checkpoint-9", "a/checkpoint-100"]
    assert found(tmp_path) == ["C/x/y", *checkpoints, "a/best", "a/checkpoint-final", "a", "b"]


def test_what_is_deeper_hidden_or_linked_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "a/b/c", "a/b/c/d", ".git/x", "a/.cache")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert found(tmp_path) == ["a/b/c"]


def test_the_folder_itself_comes_last(tmp_path: Path) -> None:
    make(tmp_path, ".", "checkpoint-2")
    assert found(tmp_path) == ["checkpoint-2", "."]
    assert is_checkpoint(tmp_path / "checkpoint-2")
    assert not is_checkpoint(tmp_path)
