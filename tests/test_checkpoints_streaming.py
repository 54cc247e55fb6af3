"""Shards are written by many threads within a bound of memory, durable, and not again where they are there."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loramgr.checkpoints import regions
from loramgr.checkpoints.journal import JOURNAL, Journal
from loramgr.checkpoints.output import OutputTensor, Shard, carry_over
from loramgr.checkpoints.regions import Region
from loramgr.checkpoints.residuals import ResidualFile, read_residuals
from loramgr.checkpoints.staging import staged
from loramgr.checkpoints.streaming import Budget, Writing, write_shards
from loramgr.digests import TensorDigest
from loramgr.errors import IntegrityError
from loramgr.tensorfile import FileTensor, TensorSpec, read_header

Produce = Callable[[Region], object]


def bytes_of(name: str, count: int) -> bytes:
    return (hashlib.sha256(name.encode()).digest() * (count // 32 + 1))[:count]


def tensor(name: str, count: int, produce: Produce | None = None, memory: int = 0) -> OutputTensor:
    return OutputTensor(
        TensorSpec(name, "U8", (count,)), produce or (lambda region: region.write(bytes_of(name, count))), memory
    )


def writing(jobs: int = 3, memory: int = 1 << 20, journal: Journal | None = None) -> Writing:
    return Writing(jobs, memory, lambda _: None, journal)


def expected(name: str, count: int) -> TensorDigest:
    return TensorDigest(name, "U8", (count,), hashlib.sha256(bytes_of(name, count)).hexdigest())


def test_what_is_written_is_what_was_made(tmp_path: Path) -> None:
    sizes = {"a": 100, "empty": 0, "b": 4097, "c": 1}
    shards = [Shard("one", tuple(tensor(n, s) for n, s in sizes.items()), {"k": "v"}), Shard("two", (), None)]
    told: list[int] = []
    written = write_shards(tmp_path, shards, Writing(3, 1 << 20, told.append))
    assert written == {name: expected(name, size) for name, size in sizes.items()}
    header = read_header(tmp_path / "one")
    assert {name: bytes(view.read_bytes()) for name, view in header.tensors.items()} == {
        name: bytes_of(name, size) for name, size in sizes.items()
    }
    assert header.metadata == {"k": "v"}
    assert sum(told) == sum(sizes.values())
    assert read_header(tmp_path / "two").tensors == {}


def test_threads_hold_no_more_than_the_budget_together(tmp_path: Path) -> None:
    held, most, lock = [0], [0], threading.Lock()

    def produce(name: str, size: int) -> Produce:
        def fill(region: Region) -> None:
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            region.write(bytes_of(name, 8))
            with lock:
                held[0] -= size

        return fill

    sizes = [40, 30, 500, 20, 60, 10, 90]
    tensors = tuple(tensor(f"t{at}", 8, produce(f"t{at}", size), size) for at, size in enumerate(sizes * 4))
    write_shards(tmp_path, [Shard("one", tensors, None)], writing(jobs=4, memory=100))
    assert 100 < most[0] == 500  # the one that is larger than the budget was alone


def test_a_budget_lets_the_next_one_in_after_a_failure() -> None:
    budget = Budget(10)
    with pytest.raises(KeyError), budget.holding(10):
        raise KeyError
    with budget.holding(10):
        pass


def test_a_failure_is_passed_on_when_nobody_works_any_more(tmp_path: Path) -> None:
    running = [0]

    def slow(region: Region) -> None:
        running[0] += 1
        time.sleep(0.05)
        region.write(bytes_of("slow", 8))
        running[0] -= 1

    def fail(_: Region) -> None:
        raise IntegrityError("the base is another one")

    tensors = (tensor("slow", 8, slow), tensor("bad", 8, fail), *(tensor(f"t{at}", 8, slow) for at in range(50)))
    with pytest.raises(IntegrityError, match="another one"):
        write_shards(tmp_path, [Shard("one", tensors, None)], writing(jobs=2))
    assert running == [0]


def test_a_tensor_that_was_not_filled_is_an_error(tmp_path: Path) -> None:
    short = tensor("short", 8, lambda region: region.write(b"1234"))
    with pytest.raises(IntegrityError, match="4 bytes were written, not 8"):
        write_shards(tmp_path, [Shard("one", (short,), None)], writing())


@pytest.mark.parametrize("code", [None, errno.EXDEV, errno.ENOSYS])
def test_a_copy_is_hashed_where_it_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    if code is not None:

        def refuse(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(regions, "_STEP", 1000)
    (tmp_path / "source").write_bytes(b"before" + bytes_of("x", 5000) + b"after")
    view = FileTensor(TensorSpec("x", "U8", (5000,)), tmp_path / "source", 6)
    copied = tensor("x", 5000, lambda region: region.copy(view))
    assert write_shards(tmp_path, [Shard("one", (copied,), None)], writing()) == {"x": expected("x", 5000)}
    os.truncate(tmp_path / "source", 3000)
    with pytest.raises(IntegrityError, match="ends inside tensor 'x'"):
        write_shards(tmp_path, [Shard("one", (copied,), None)], writing())


def test_a_disk_that_fails_is_no_reason_to_copy_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "copy_file_range", fail)
    (tmp_path / "source").write_bytes(bytes_of("x", 50))
    view = FileTensor(TensorSpec("x", "U8", (50,)), tmp_path / "source", 0)
    with pytest.raises(OSError, match="Input/output"):
        write_shards(tmp_path, [Shard("one", (tensor("x", 50, lambda region: region.copy(view)),), None)], writing())


def test_finished_shards_of_the_same_plan_are_not_made_again(tmp_path: Path) -> None:
    made: list[str] = []

    def produce(name: str) -> Produce:
        def fill(region: Region) -> None:
            made.append(name)
            region.write(bytes_of(name, 64))

        return fill

    def shards() -> list[Shard]:
        return [Shard(f"shard{at}", (tensor(f"t{at}", 64, produce(f"t{at}")),), None) for at in range(4)]

    whole = write_shards(tmp_path, shards(), writing(journal=Journal(tmp_path, "plan")))
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "over").write_text("of a killed run")
    (tmp_path / "shard1").write_bytes((tmp_path / "shard1").read_bytes()[:-1] + b"?")
    (tmp_path / "shard2").unlink()
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('["shard9", {}, [["t9')
    made.clear()
    assert write_shards(tmp_path, shards(), writing(journal=Journal(tmp_path, "plan"))) == whole
    assert sorted(made) == ["t1", "t2"]
    assert not (tmp_path / "left").exists()
    made.clear()
    write_shards(tmp_path, shards(), writing(journal=Journal(tmp_path, "another plan")))
    assert sorted(made) == ["t0", "t1", "t2", "t3"]


def test_a_shard_is_made_again_without_writing_to_a_file_with_another_name(tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.write_bytes(b"in use")
    (tmp_path / "stage").mkdir()
    os.link(live, tmp_path / "stage" / "one")
    write_shards(tmp_path / "stage", [Shard("one", (tensor("a", 8),), None)], writing())
    assert live.read_bytes() == b"in use"


def test_parts_of_residuals_come_back_by_tensor(tmp_path: Path) -> None:
    file = ResidualFile(tmp_path, "model-1.safetensors")
    assert file.finish() == []
    for name in ("a", "b:c"):
        file.add(
            name, {"codes": (TensorSpec("", "U8", (5,)), bytes_of(name, 5)), "none": (TensorSpec("", "U8", (0,)), b"")}
        )
    assert file.finish() == ["loramgr-residual/model-1.safetensors"]
    found = read_residuals(tmp_path)
    assert {
        name: {part: bytes(view.read_bytes()) for part, view in parts.items()} for name, parts in found.items()
    } == {name: {"codes": bytes_of(name, 5), "none": b""} for name in ("a", "b:c")}
    assert [path.name for path in (tmp_path / "loramgr-residual").iterdir()] == ["model-1.safetensors"]


@pytest.mark.parametrize("link", [True, False])
def test_everything_else_is_carried_over(tmp_path: Path, link: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "empty").mkdir(mode=0o700)
    (source / "loramgr-residual").mkdir()
    (source / "loramgr-residual" / "file").write_text("gone")
    for name in ("ours", "mine", "deep/er/file"):
        (source / name).write_text(name)
    (source / "script").write_text("#!")
    (source / "script").chmod(0o755)
    (source / "to-folder").symlink_to("deep")
    (source / "to-nowhere").symlink_to("nowhere")
    target.mkdir()
    carry_over(source, target, {"ours"}, link=link)
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == [
        *("deep", "deep/er", "deep/er/file", "empty", "mine", "script", "to-folder", "to-nowhere")
    ]
    assert (target / "to-folder").readlink() == Path("deep")
    assert (target / "script").stat().st_mode & 0o777 == 0o755
    assert (target / "empty").stat().st_mode & 0o777 == 0o700
    assert (target / "mine").samefile(source / "mine") is link


def test_a_full_disk_is_told_with_the_name_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as told, staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert told.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())
