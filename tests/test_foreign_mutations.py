"""Damaged files of loralib, mlx-lm, llama.cpp and torchtune: loramgr's own errors, no more than the file holds."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from foreign_files import write_gguf_file, write_loralib_file, write_mlx_folder, write_torchtune_file

from loramgr import LoramgrError, ReadHints
from loramgr.adapter import Adapter
from loramgr.formats import examine, read_adapter

COUNT = 200 if os.environ.get("LORAMGR_SOAK") else 40
WRITERS: dict[str, Callable[[Path], Path]] = {
    "loralib": write_loralib_file,
    "mlx": write_mlx_folder,
    "gguf": write_gguf_file,
    "torchtune": write_torchtune_file,
}
HINTS = ReadHints(alpha=6.0)


def flip(data: bytearray, chance: random.Random) -> None:
    """Flip bits, most of them where headers are."""
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(min(len(data), chance.choice((64, 1500, len(data)))))
        data[place] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def enlarge(data: bytearray, chance: random.Random) -> None:
    """Write a number far beyond the file over eight bytes of a header."""
    place = chance.randrange(0, min(len(data), 1500) - 8)
    data[place : place + 8] = struct.pack("<Q", chance.choice((1 << 63, (1 << 64) - 1, 1 << 40, 1 << 31)))


def repeat(data: bytearray, chance: random.Random) -> None:
    place, size = chance.randrange(min(len(data), 1500)), chance.randrange(1, 90)
    data[place:place] = data[place : place + size]


def garble(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(min(len(data), 1500))
    data[place : place + 3] = b"\xff\xfe\xc0"


def outcome(path: Path, size: int) -> Adapter | None:
    """Read the file and all of its tensors; None where loramgr refuses. Any other exception fails the test."""
    try:
        adapter = read_adapter(path, HINTS)
        assert sum(view.spec.nbytes for view in adapter.tensors.values()) <= size
        examine(adapter)
    except LoramgrError:
        return None
    return adapter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", WRITERS)
def test_damaged_files_are_refused_or_read_as_what_they_say(tmp_path: Path, format: str) -> None:
    path = WRITERS[format](tmp_path / "adapter")
    original, chance = path.read_bytes(), random.Random(f"{format} 7")
    whole = read_adapter(path, HINTS)
    for _ in range(COUNT):
        data = bytearray(original)
        chance.choice((flip, flip, flip, cut, enlarge, repeat, garble))(data, chance)
        path.write_bytes(data)
        found = outcome(path, len(data))
        if found is not None:
            assert found.format == format
            assert found.parameters == whole.parameters or found.tensors.keys() != whole.tensors.keys()


@pytest.mark.parametrize("format", ["mlx", "torchtune"])
def test_damaged_configurations(tmp_path: Path, format: str) -> None:
    path = WRITERS[format](tmp_path / "adapter")
    config = path.parent / "adapter_config.json"
    original, chance = config.read_bytes(), random.Random(f"{format} configuration")
    deep = b'{"a":' * 100_000
    for data in (b"", b"[]", b"null", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff", deep, original[:-2]):
        config.write_bytes(data)
        assert outcome(path.parent, path.stat().st_size) is None
    for key in json.loads(original):
        content = json.loads(original)
        content[key] = chance.choice(([], {}, True, "x", -1, 1e400))
        config.write_text(json.dumps(content))
        outcome(path.parent, path.stat().st_size)
