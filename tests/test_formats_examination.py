from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_files import PLAIN, write_adapter
from safetensors.torch import load_file, save_file

from loramgr.adapter import Adapter, Replacement
from loramgr.digests import TensorDigest, tensors_digest
from loramgr.errors import IntegrityError
from loramgr.formats import examine, read_adapter
from loramgr.formats.examination import FileExaminer
from loramgr.tensorfile import TensorSpec, TensorView

GOLDEN = "sha256:9882d0f80f9aa540faf24051631059a833b8eb386d101dad2f8e08d8e20126c9"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class BytesTensor:
    """A tensor in memory whose bytes are given."""

    def __init__(self, dtype: str, data: bytes) -> None:
        width = DTYPES[dtype].itemsize
        self.spec, self.data = TensorSpec("t", dtype, (len(data) // width,)), data

    def read_bytes(self) -> bytes:
        return self.data

    def load(self) -> torch.Tensor:
        raise NotImplementedError


def _single(view: TensorView) -> Adapter:
    return Adapter("peft", "lora", {}, {"t": Replacement(view)}, {"t": view}, None, None, ())


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_non_finite_values_are_those_that_torch_finds(dtype: str, data: st.DataObject) -> None:
    width = DTYPES[dtype].itemsize
    edges = st.sampled_from([0x7C00, 0x7BFF, 0x7F80, 0x7F7F, 0xFF80, 0xFFFF, 0x7FF0, 0x7FEF, 0xFC00, 0, 0x8000, 0x7F00])
    value = st.binary(min_size=width, max_size=width) | st.builds(
        lambda low, high: low + struct.pack("<H", high), st.binary(min_size=width - 2, max_size=width - 2), edges
    )
    raw = b"".join(data.draw(st.lists(value, min_size=1, max_size=9)))
    tensor = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype])
    found = examine(_single(BytesTensor(dtype, raw)))
    assert bool(found.non_finite) == (not bool(torch.isfinite(tensor).all()))
    assert found.weights_digest == tensors_digest(
        [TensorDigest("t", dtype, (len(tensor),), hashlib.sha256(raw).hexdigest())]
    )


def _examined(folder: Path, **values: torch.Tensor) -> tuple[list[str], list[str]]:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for role, value in values.items():
        tensors |= {name: value.expand(old.shape).contiguous() for name, old in tensors.items() if role in name}
    save_file(tensors, path)
    found = examine(read_adapter(folder))
    return found.non_finite, found.zero_updates


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_no_number_is_found_at_the_end_of_a_large_tensor(tmp_path: Path, value: float) -> None:
    folder = write_adapter(tmp_path, {"m.q.lora_A.weight": (2, 600_000), "m.q.lora_B.weight": (6, 2)})
    tensor = torch.full((2, 600_000), 1e30)
    assert _examined(folder, lora_A=tensor) == ([], [])
    tensor[-1, -1] = value
    assert _examined(folder, lora_A=tensor) == (["base_model.model.m.q.lora_A.weight"], [])


def test_updates_that_do_nothing(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    assert _examined(folder) == ([], [])
    for zero in (0.0, -0.0):
        assert _examined(folder, lora_B=torch.tensor(zero), lora_A=torch.tensor(1.0)) == ([], ["m.q"])
        assert _examined(folder, lora_B=torch.tensor(1.0), lora_A=torch.tensor(zero)) == ([], ["m.q"])
    tiny = torch.zeros(6, 2)
    tiny[5, 1] = 1e-45
    assert _examined(folder, lora_B=tiny, lora_A=torch.tensor(1.0)) == ([], [])
    assert examine(read_adapter(write_adapter(tmp_path, lora_alpha=0))).zero_updates == ["m.q"]
    dora = write_adapter(tmp_path, {**PLAIN, "m.q.lora_magnitude_vector": (6,)}, use_dora=True)
    assert _examined(dora, lora_B=torch.tensor(0.0)) == ([], [])


def test_the_weights_digest_is_the_one_defined(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    lines = [
        [f"base_model.model.{name}", "F32", list(shape), hashlib.sha256(b"\0\0\0?" * math.prod(shape)).hexdigest()]
        for name, shape in PLAIN.items()
    ]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    expected = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert examine(read_adapter(folder)).weights_digest == expected == GOLDEN


def test_the_weights_digest_does_not_depend_on_the_file_format(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "trained" / "tinyllama-char" / "lic-emb"
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    torch.save(load_file(source / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    assert examine(read_adapter(tmp_path)) == examine(read_adapter(source))


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_a_file_that_passes_in_pieces_says_what_it_says_read_at_once(tmp_path: Path, piece: int) -> None:
    folder = write_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = struct.pack("<f", float("inf"))
    weights.write_bytes(data)
    adapter = read_adapter(folder)
    assert FileExaminer.reads(adapter, weights)
    examiner = FileExaminer(adapter, weights)
    for start in range(0, len(data), piece):
        examiner.update(memoryview(data)[start : start + piece])
    assert examiner.result() == examine(adapter)
    assert examiner.result().non_finite


@pytest.mark.parametrize("change", [b"more", None])
def test_a_file_that_is_not_as_long_as_its_header_says_has_changed(tmp_path: Path, change: bytes | None) -> None:
    folder = write_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    examiner = FileExaminer(read_adapter(folder), weights)
    data = weights.read_bytes()
    examiner.update(memoryview(data + change if change else data[:-1]))
    with pytest.raises(IntegrityError, match="changed while it was read"):
        examiner.result()
