"""The rule that nothing is skipped where everything has to run, seen from outside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = {
    "test_skips.py": "import pytest\n\ndef test_it():\n    pytest.skip('no server')\n",
    "test_skips_whole.py": "import pytest\n\npytest.skip('no server', allow_module_level=True)\n",
    "test_lacks_data.py": "import pytest\n\ndef test_it():\n    pytest.skip('shared data is absent')\n",
    "test_fails_as_known.py": "import pytest\n\n@pytest.mark.xfail\ndef test_it():\n    assert False\n",
}


STAYS = """
import time

def test_it(object_servers):
    object_servers.get("rclone")
    print("up", flush=True)
    time.sleep(60)
"""


def test_tests_that_are_told_to_end_clean_up(root: Path, tmp_path: Path) -> None:
    for name in ("conftest.py", "object_servers.py", "gcs_server.py"):
        shutil.copy(root / "tests" / name, tmp_path)
    (tmp_path / "test_stays.py").write_text(STAYS)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("up" in line.split() for line in process.stdout)
        assert [path.name[:15] for path in scratch.iterdir()] == ["loramgr-server-"]
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 2
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "failing"),
    [
        ({}, set()),
        ({"CI": "true"}, {"test_skips.py", "test_skips_whole.py"}),
        ({"LORAMGR_REQUIRE_SERVERS": "1"}, {"test_skips.py", "test_skips_whole.py"}),
    ],
)
def test_a_skip_passes_only_where_it_may(
    setting: dict[str, str], failing: set[str], root: Path, tmp_path: Path
) -> None:
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    for name, source in SOURCES.items():
        (tmp_path / name).write_text(source)
    environment = {name: value for name, value in os.environ.items() if name not in {"CI", "LORAMGR_REQUIRE_SERVERS"}}
    # A folder of its own: else the inner run would delete what earlier runs of the outer one have left, for minutes.
    command = [sys.executable, "-m", "pytest", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    command += [f"--basetemp={tmp_path / 'inner'}"]
    done = subprocess.run(command, env=environment | setting, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert set(re.findall(r"^(?:FAILED|ERROR) (\w+\.py)", done.stdout, re.MULTILINE)) == failing, done.stdout
    assert bool(done.returncode) == bool(failing)
