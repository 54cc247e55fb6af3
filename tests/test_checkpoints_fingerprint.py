import hashlib
import json
import os
import struct
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from model_files import write_safetensors, write_shards

from loramgr.checkpoints import fingerprint as module
from loramgr.checkpoints.fingerprint import FingerprintCache, fingerprint
from loramgr.checkpoints.source import open_checkpoint
from loramgr.digests import tensors_digest
from loramgr.errors import IntegrityError, UncheckedError

SHAPES = {"a.weight": (3, 2), "b": (), "c.empty": (0, 4), "d.weight": (5,)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder with a model that was written an hour ago."""
    path = write_safetensors(tmp_path / "model" / "model.safetensors", SHAPES)
    age(path)
    return path.parent


def age(path: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))


def digest(folder: Path, cache: FingerprintCache | None = None) -> str:
    return tensors_digest(fingerprint(open_checkpoint(folder), 2, False, cache).values())


def poison(path: Path) -> None:
    """Change a byte of the data behind the back of size, mtime and inode: what is not read is not seen."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_sha256_of_every_tensor(model: Path) -> None:
    found = fingerprint(open_checkpoint(model), 2, False)
    data = struct.pack("<6f", *range(6))
    assert found["a.weight"] == ("a.weight", "F32", (3, 2), hashlib.sha256(data).hexdigest())
    assert found["b"].sha256 == hashlib.sha256(struct.pack("<f", 6)).hexdigest()
    assert found["c.empty"].sha256 == hashlib.sha256(b"").hexdigest()
    assert set(found) == set(SHAPES)


def test_tensors_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    write_safetensors(tmp_path / "model.safetensors", {"x": (100,)})
    expected = hashlib.sha256(struct.pack("<100f", *range(100))).hexdigest()
    assert fingerprint(open_checkpoint(tmp_path), 1, False)["x"].sha256 == expected


def test_shards_format_and_threads_do_not_matter(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.weight": torch.randn(number, 3) for number in range(7)}
    (tmp_path / "pickled").mkdir()
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    from safetensors.torch import save_file

    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    (tmp_path / "seven").mkdir()
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / "seven" / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(tensors)}
    (tmp_path / "seven" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    digests = {
        tensors_digest(fingerprint(open_checkpoint(tmp_path / folder), jobs, False).values())
        for folder in ("pickled", "one", "seven")
        for jobs in (1, 3)
    }
    assert len(digests) == 1


def test_untouched_files_are_not_read_again(model: Path, tmp_path: Path) -> None:
    cache = FingerprintCache(tmp_path / "cache")
    before = digest(model, cache)
    poison(model / "model.safetensors")
    assert digest(model, cache) == before
    assert digest(model) != before


@pytest.mark.parametrize("change", ["mtime", "size", "inode"])
def test_touched_files_are_read_again(model: Path, tmp_path: Path, change: str) -> None:
    cache, path = FingerprintCache(tmp_path / "cache"), model / "model.safetensors"
    before = digest(model, cache)
    stamp = path.stat().st_mtime_ns
    if change == "mtime":
        poison(model / "model.safetensors")
        os.utime(path, ns=(stamp, stamp + 1))
    elif change == "size":
        write_safetensors(path, {"other": (9,)})
        os.utime(path, ns=(stamp, stamp))
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 0xFF
        (model / "copy").write_bytes(data)
        os.utime(model / "copy", ns=(stamp, stamp))
        (model / "copy").replace(path)
    assert digest(model, cache) != before


def test_a_file_written_just_now_is_not_trusted(model: Path, tmp_path: Path) -> None:
    cache = FingerprintCache(tmp_path / "cache")
    os.utime(model / "model.safetensors")
    before = digest(model, cache)
    poison(model / "model.safetensors")
    assert digest(model, cache) != before


def test_one_changed_shard_is_read_alone(tmp_path: Path) -> None:
    model = write_shards(tmp_path / "model", {"1.safetensors": {"a": (2,)}, "2.safetensors": {"b": (2,)}})
    for path in model.iterdir():
        age(path)
    cache = FingerprintCache(tmp_path / "cache")
    before = fingerprint(open_checkpoint(model), 1, False, cache)
    poison(model / "1.safetensors")
    write_safetensors(model / "2.safetensors", {"b": (3,)})
    after = fingerprint(open_checkpoint(model), 1, False, cache)
    assert after["a"] == before["a"]
    assert after["b"] != before["b"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"path": 3}', b'{"state": {"size": 1}}', b"\xff"])
def test_a_damaged_cache_is_ignored(model: Path, tmp_path: Path, damage: bytes) -> None:
    cache = FingerprintCache(tmp_path / "cache")
    before = digest(model, cache)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(damage)
    assert digest(model, cache) == before
    assert json.loads(json.loads(entry.read_bytes())["content"])["path"] == str(model / "model.safetensors")


def test_a_flipped_digit_in_the_cache_is_not_believed(model: Path, tmp_path: Path) -> None:
    cache = FingerprintCache(tmp_path / "cache")
    before = digest(model, cache)
    (entry,) = (tmp_path / "cache").iterdir()
    known = next(iter(fingerprint(open_checkpoint(model), 1, False).values())).sha256
    assert known.encode() in entry.read_bytes()
    flipped = known.replace(known[0], "0" if known[0] != "0" else "1", 1)
    entry.write_bytes(entry.read_bytes().replace(known.encode(), flipped.encode()))
    assert digest(model, cache) == before


def test_a_cache_about_other_tensors_is_ignored(model: Path, tmp_path: Path) -> None:
    cache = FingerprintCache(tmp_path / "cache")
    before = digest(model, cache)
    (entry,) = (tmp_path / "cache").iterdir()
    content = json.loads(json.loads(entry.read_bytes())["content"])
    content["tensors"][0][2] = [6, 1]
    text = json.dumps(content)
    entry.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    assert digest(model, cache) == before


def test_a_cache_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert digest(model, FingerprintCache(tmp_path / "file" / "cache")) == digest(model)
    assert (tmp_path / "file").read_text() == "in the way"


def test_nothing_but_entries_stays_in_the_cache(model: Path, tmp_path: Path) -> None:
    digest(model, FingerprintCache(tmp_path / "cache"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


def test_a_file_that_ends_early(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 4)
    with pytest.raises(IntegrityError, match=r"ends inside tensor 'd\.weight'"):
        fingerprint(checkpoint, 2, False)


def test_a_file_that_is_gone(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UncheckedError, match=r"model\.safetensors: cannot be read"):
        fingerprint(checkpoint, 2, False)


def test_a_file_that_is_written_to_meanwhile(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", {"x": (1_000_000,)})
    checkpoint = open_checkpoint(tmp_path)
    stop = threading.Event()

    def touch() -> None:
        while not stop.is_set():
            os.utime(path)
            time.sleep(0.001)

    writer = threading.Thread(target=touch)
    writer.start()
    try:
        with pytest.raises(UncheckedError, match="written to while it was read"):
            list(map(fingerprint, [checkpoint] * 100, [1] * 100, [False] * 100))
    finally:
        stop.set()
        writer.join()


def test_no_bar_without_a_terminal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fingerprint(open_checkpoint(model), 1, True)
    assert capsys.readouterr() == ("", "")
    assert not sys.stderr.isatty()


def test_real_bases(minilm_base: Path, albert_base: Path) -> None:
    assert digest(minilm_base) == "sha256:d9a11d447c16bc95f3100c6ac505c4ae5f71e5649a7e2d9fd21c5712d462013d"
    assert digest(albert_base) == "sha256:533c4b6edab0530ac84ace0b745ac5deb78f09e2a65a4666249e6b9d11b7d56c"
