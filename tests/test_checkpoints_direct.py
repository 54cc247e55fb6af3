"""Direct writes: whole pages past the page cache where memory and file are aligned alike, and nothing else."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramgr.checkpoints import direct, regions
from loramgr.checkpoints.direct import PAGE, open_direct, write_direct
from loramgr.checkpoints.regions import Region
from loramgr.errors import IntegrityError
from loramgr.tensorfile import FileTensor, TensorSpec


def aligned(data: bytes, phase: int) -> memoryview:
    memory = memoryview(mmap.mmap(-1, len(data) + 2 * PAGE))[phase : phase + len(data)]
    memory[:] = data
    return memory


def around(path: Path, size: int) -> int:
    path.write_bytes(b"\xaa" * size)
    return os.open(path, os.O_RDWR)


@given(start=st.integers(0, 3 * PAGE), size=st.integers(0, 5 * PAGE), shift=st.sampled_from([0, 0, 1, 512]))
def test_a_region_gets_its_bytes_and_its_neighbours_keep_theirs(
    tmp_path_factory: pytest.TempPathFactory, start: int, size: int, shift: int
) -> None:
    path = tmp_path_factory.mktemp("direct") / "file"
    data = os.urandom(size)
    file = around(path, start + size + 100)
    descriptor = open_direct(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "_LEAST", 1)
        region = Region(TensorSpec("x", "U8", (size,)), file, start, descriptor)
        region.write(aligned(data, (start + shift) % PAGE))
    os.close(file)
    if descriptor is not None:
        os.close(descriptor)
    assert path.read_bytes() == b"\xaa" * start + data + b"\xaa" * 100
    path.unlink()


def test_the_result_slot_is_what_direct_writes_need(tmp_path: Path) -> None:
    """So that a merge's tensors do go this way where the file system has it: all whole pages of them."""
    path, size, start = tmp_path / "file", 5 << 20, 12345
    file, descriptor = around(path, start + size), open_direct(path)
    region = Region(TensorSpec("x", "U8", (size,)), file, start, descriptor)
    memory = region.memory("result", size)
    memory[:] = os.urandom(size)
    if descriptor is not None:
        assert write_direct(descriptor, memory, start) == range(-start % PAGE, size - (start + size) % PAGE)
    region.write(memory)
    assert path.read_bytes()[start:] == memory
    os.close(file)
    if descriptor is not None:
        os.close(descriptor)


@pytest.mark.parametrize(("size", "phase", "offset"), [(4 << 20, 1, 0), (4 << 20, 0, 8), (1 << 20, 8, 8), (0, 0, 0)])
def test_what_is_small_or_not_aligned_alike_is_left(tmp_path: Path, size: int, phase: int, offset: int) -> None:
    descriptor = around(tmp_path / "file", 10)
    assert not write_direct(descriptor, aligned(bytes(size), phase), offset)
    assert not write_direct(descriptor, memoryview(bytes(4 << 20)), 0)  # nobody's to write to: where it lies is unknown
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"\xaa" * 10


@given(start=st.integers(0, 2 * PAGE), before=st.integers(0, 100), size=st.integers(40 * PAGE, 50 * PAGE))
@settings(max_examples=30)
def test_a_tensor_is_copied_past_the_cache_as_it_lies(
    tmp_path_factory: pytest.TempPathFactory, start: int, before: int, size: int
) -> None:
    folder = tmp_path_factory.mktemp("direct")
    data = os.urandom(before + size)
    (folder / "source").write_bytes(data)
    file, descriptor = around(folder / "file", start + size + 100), open_direct(folder / "file")
    spec = TensorSpec("x", "U8", (size,))
    region = Region(spec, file, start, descriptor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "_LEAST", 1)
        patch.setattr(regions, "_PIECE", 8 * PAGE)
        patch.setattr(os, "major", lambda device: 1)  # where the tests run may be no disk
        region.copy(FileTensor(spec, folder / "source", before))
        (folder / "source").write_bytes(data[:-1])
        with pytest.raises(IntegrityError, match="ends inside tensor 'x'"):
            Region(spec, file, start, descriptor).copy(FileTensor(spec, folder / "source", before))
    os.close(file)
    if descriptor is not None:
        os.close(descriptor)
    assert (folder / "file").read_bytes() == b"\xaa" * start + data[before:] + b"\xaa" * 100
    assert region.digest.sha256 == hashlib.sha256(data[before:]).hexdigest()
    shutil.rmtree(folder)


@pytest.mark.parametrize(("code", "short"), [(errno.EINVAL, 0), (None, 100)])
def test_a_file_system_that_refuses_half_way_gets_the_rest_in_the_usual_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, short: int
) -> None:
    """Some look at the alignment only when it is written, and some write less than they were asked to."""
    data, path = os.urandom(8 * PAGE), tmp_path / "file"
    file = around(path, len(data))
    descriptor = os.open(path, os.O_WRONLY)
    real, calls = os.pwrite, [0]

    def pwrite(target: int, view: memoryview, at: int) -> int:
        if target != descriptor:
            return real(target, view, at)
        calls[0] += 1
        if calls[0] == 1:
            return real(target, view[: 2 * PAGE + short], at)
        raise OSError(code, "refused")

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(direct, "_LEAST", 1)
    Region(TensorSpec("x", "U8", (len(data),)), file, 0, descriptor).write(aligned(data, 0))
    os.close(file)
    os.close(descriptor)
    assert path.read_bytes() == data


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """/dev/full takes nothing (man 4 full)."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        write_direct(descriptor, aligned(bytes(2 << 20), 0), 0)
    os.close(descriptor)


def test_a_file_system_without_direct_writes_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    real = os.open
    monkeypatch.setattr(os, "open", lambda *asked: (_ for _ in ()).throw(OSError(errno.EINVAL, "no")))
    assert open_direct(tmp_path / "file") is None
    monkeypatch.setattr(os, "open", real)
    with pytest.raises(FileNotFoundError):
        open_direct(tmp_path / "none")
    monkeypatch.delattr(os, "O_DIRECT")
    assert open_direct(tmp_path / "file") is None
