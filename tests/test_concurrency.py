"""Many processes on one home: no version lost, no number twice, nobody turned away before the time.

`LORAMGR_SOAK=1` has 16 processes add 50 versions each; otherwise they are fewer.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

import pytest
from crash_stage import SOAK, Stage
from peft_files import write_adapter

WRITERS, VERSIONS, NAMES, READERS = (16, 50, 10, 4) if SOAK else (4, 4, 3, 2)


@pytest.mark.timeout(1800)
def test_versions_added_at_once_are_all_there(stages: list[Stage], tmp_path: Path) -> None:
    server, home, done = stages[0].server, tmp_path / "home", tmp_path / "done"
    server.call("crash_workers:make_home", str(home))
    (tmp_path / "adapters").mkdir()
    arguments = (VERSIONS, NAMES, str(tmp_path / "adapters"))
    readers = [server.start_call("crash_workers:read", str(home), str(done), at) for at in range(READERS)]
    writers = [server.start_call("crash_workers:add", str(home), at, *arguments) for at in range(WRITERS)]
    codes = [server.wait(pid) for pid in writers]
    done.touch()
    assert [server.wait(pid) for pid in readers] == [0] * READERS, [server.errors(pid) for pid in readers]
    assert codes == [0] * WRITERS, [server.errors(pid) for pid in writers]
    assert all(json.loads(server.output(pid))[0] > 0 for pid in readers)
    added = [tuple(version) for pid in writers for version in json.loads(server.output(pid))]
    assert len({digest for _, _, digest in added}) == len(added) == WRITERS * VERSIONS
    numbers = defaultdict(list)
    for name, number, _ in added:
        numbers[name].append(number)
    assert {name: sorted(found) for name, found in numbers.items()} == {
        name: list(range(1, len(found) + 1)) for name, found in numbers.items()
    }
    for kept in (home / "catalog.sqlite3", None):  # as it is, and made again from the logs
        if kept is None:
            (home / "catalog.sqlite3").unlink()
            assert server.run("--home", home, "db", "rebuild") == 0
        pid = server.start("--home", home, "--json", "list", "--all-versions")
        assert server.wait(pid) == 0
        listed = {(each["name"], each["version"], each["digest"]) for each in json.loads(server.output(pid))}
        assert listed == set(added)
        assert server.run("--home", home, "verify") == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("held", "patience", "code"), [(1.5, 0.3, 7), (0.5, 20.0, 0)])
def test_a_writer_waits_for_another_one(
    stages: list[Stage], tmp_path: Path, held: float, patience: float, code: int
) -> None:
    server, home, ready = stages[0].server, str(tmp_path / "home"), tmp_path / "ready"
    server.call("crash_workers:make_home", home)
    holder = server.start_call("crash_workers:hold", home, str(ready), held)
    while not ready.exists():
        time.sleep(0.01)
    folder = write_adapter(tmp_path / "adapter")
    found, waited = server.call("crash_workers:add_with_patience", home, str(folder), patience)
    assert server.wait(holder) == 0
    assert (found, waited > min(held, patience) / 2) == (code, True)
    assert server.run("--home", home, "verify") == 0


if SOAK:

    @pytest.mark.timeout(300)
    def test_a_command_gives_up_after_a_minute(stages: list[Stage], tmp_path: Path) -> None:
        server, home, ready = stages[0].server, str(tmp_path / "home"), tmp_path / "ready"
        server.call("crash_workers:make_home", home)
        holder = server.start_call("crash_workers:hold", home, str(ready), 90)
        while not ready.exists():
            time.sleep(0.01)
        started = time.monotonic()
        pid = server.start("--home", home, "--json", "add", write_adapter(tmp_path / "adapter"))
        assert server.wait(pid) == 7, server.errors(pid)
        assert 55 < time.monotonic() - started < 80
        assert "another process holds the catalog" in server.errors(pid)
        assert server.wait(holder) == 0
