"""Temporary folders: gone with their block, told from those that a killed process left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loramgr.temporary import is_abandoned, sweep, temporary_folder

WORK = """
import sys
from pathlib import Path
from loramgr.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1]), ".work-") as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folder_goes_with_the_block(tmp_path: Path) -> None:
    folders = []

    def work() -> None:
        with temporary_folder(tmp_path, ".x-") as folder:
            folders.append(folder)
            (folder / "file").write_text("content")
            assert not is_abandoned(folder)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert [folder.name[:3] for folder in folders] == [".x-"]
    assert list(tmp_path.iterdir()) == []
    assert not is_abandoned(folders[0])


def test_a_folder_that_was_renamed_stays(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        folder.rename(tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_what_a_living_process_works_in_is_not_swept_and_what_a_killed_one_left_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert not is_abandoned(folder)
        sweep(folder)
        assert folder.is_dir()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert is_abandoned(folder)
    sweep(folder)
    assert list(tmp_path.iterdir()) == []
