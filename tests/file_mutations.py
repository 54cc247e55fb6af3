"""Files of safetensors, damaged in ways that a reader has to notice or to bear, for tests."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Content:
    """What a file holds: float32 tensors by name and shape, metadata, and the header's JSON where it is forged."""

    shapes: Shapes
    metadata: dict[str, str] = field(default_factory=dict)

    def encoded(self, seed: int = 0) -> bytes:
        """Return the file's bytes, with values that the seed decides."""
        header, data, offset = dict[str, Any](), b"", 0
        values = random.Random(seed)
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            data += struct.pack(f"<{count}f", *(values.uniform(-1, 1) for _ in range(count)))
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + 4 * count]}
            offset += 4 * count
        if self.metadata:
            header["__metadata__"] = self.metadata
        return framed(json.dumps(header, separators=(",", ":")).encode(), data)


def framed(header: bytes, data: bytes) -> bytes:
    """Return a file of the header and the data."""
    return struct.pack("<Q", len(header)) + header + data


def split(file: bytes) -> tuple[bytes, bytes]:
    """Return header and data of a file."""
    (length,) = struct.unpack("<Q", file[:8])
    return file[8 : 8 + length], file[8 + length :]


Mutation = Callable[[Content, random.Random], bytes]


def _flipped(content: Content, chance: random.Random) -> bytes:
    file = bytearray(content.encoded())
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(8 + len(split(bytes(file))[0]) if len(file) > 16 else len(file))
        file[min(place, len(file) - 1)] ^= 1 << chance.randrange(8)
    return bytes(file)


def _header_flipped(content: Content, chance: random.Random) -> bytes:
    header, data = split(content.encoded())
    forged = bytearray(header)
    for _ in range(chance.choice((1, 2, 4))):
        forged[chance.randrange(len(forged))] ^= 1 << chance.randrange(8)
    return framed(bytes(forged), data)


def _wrong_rank(content: Content, chance: random.Random) -> bytes:
    name = chance.choice([name for name, shape in content.shapes.items() if len(shape) > 1])
    shape = list(content.shapes[name])
    place = chance.randrange(2)
    shape[place] += chance.choice((1, 2, 5))
    return Content(content.shapes | {name: tuple(shape)}, content.metadata).encoded()


def _transposed(content: Content, chance: random.Random) -> bytes:
    """Exchange the tensors of two names, as if A were B."""
    names = [name for name, shape in content.shapes.items() if len(shape) > 1]
    first, second = chance.sample(names, 2)
    shapes = content.shapes | {first: content.shapes[second], second: content.shapes[first]}
    return Content(shapes, content.metadata).encoded()


def _without_one(content: Content, chance: random.Random) -> bytes:
    gone = chance.choice([*content.shapes])
    return Content({name: shape for name, shape in content.shapes.items() if name != gone}, content.metadata).encoded()


def _doubled(content: Content, chance: random.Random) -> bytes:
    header, data = split(content.encoded())
    name = chance.choice([*content.shapes])
    entry = json.dumps(json.loads(header)[name])
    return framed(header[:-1] + f',"{name}":{entry}}}'.encode(), data)


def _huge(content: Content, chance: random.Random) -> bytes:
    header, data = split(content.encoded())
    name = chance.choice([*content.shapes])
    parsed = json.loads(header)
    size = chance.choice((1 << 31, 1 << 62, 10**30))
    parsed[name]["shape"] = [size, *parsed[name]["shape"][1:]]
    if chance.random() < 0.5:
        parsed[name]["data_offsets"] = [0, size * 4]
    return framed(json.dumps(parsed).encode(), data)


def _huge_header(content: Content, chance: random.Random) -> bytes:
    header, data = split(content.encoded())
    return struct.pack("<Q", chance.choice((1 << 20, 1 << 40, (1 << 64) - 1))) + header + data


def _deep(content: Content, chance: random.Random) -> bytes:
    deep = "[" * chance.choice((10, 2000, 200_000)) + "]" * chance.choice((0, 10))
    key = chance.choice(
        ["lora_adapter_metadata", "loramgr_modules", "loramgr_component", "base_digest", "ss_tag_frequency"]
    )
    if chance.random() < 0.5:
        header, data = split(content.encoded())
        return framed(header[:-1] + f',"deep":{deep}}}'.encode(), data)
    return Content(content.shapes, content.metadata | {key: deep}).encoded()


def _not_unicode(content: Content, chance: random.Random) -> bytes:
    header, data = split(content.encoded())
    name = chance.choice([*content.shapes]).encode()
    broken = chance.choice((b"\xff\xfe", b"\\ud800", b"\x00", b"\\u0000", "é".encode(), b"\xc3"))
    return framed(header.replace(name, broken + name[1:], 1), data)


def _stray(content: Content, chance: random.Random) -> bytes:
    name = chance.choice(["stray.weight", "", ".", "model.embed_tokens.weight", ".alpha", "x.lora_down.weight"])
    return Content(content.shapes | {name: (2, 2)}, content.metadata).encoded()


def _cut(content: Content, chance: random.Random) -> bytes:
    file = content.encoded()
    return file[: chance.randrange(len(file))]


def _scrambled_metadata(content: Content, chance: random.Random) -> bytes:
    keys = [
        "lora_adapter_metadata",
        "loramgr_modules",
        "loramgr_component",
        "base_digest",
        "ss_sd_model_hash",
        "unet:0:rank",
    ]
    values = ["{}", "[]", "null", '{"r": 1e400}', "", "x", '{"unet.r": -1}', "\U0001f4a5", '{"a": 1, "a": 2}']
    return Content(content.shapes, content.metadata | {chance.choice(keys): chance.choice(values)}).encoded()


MUTATIONS: dict[str, Mutation] = {
    mutation.__name__.strip("_"): mutation
    for mutation in (
        _flipped, _header_flipped, _wrong_rank, _transposed, _without_one, _doubled, _huge, _huge_header, _deep,
        _not_unicode, _stray, _cut, _scrambled_metadata,
    )
}  # fmt: skip


def mutated(content: Content, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield so many damaged files with the names of what was done, every mutation in turn."""
    chance = random.Random(seed)
    names = [*MUTATIONS]
    for number in range(count):
        name = names[number % len(names)]
        yield name, MUTATIONS[name](content, chance)
