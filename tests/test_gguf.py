"""GGUF adapters: the header by hand and by the package `gguf`, names and row order against PEFT's."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loramgr import AddOptions, IncompatibleError, IntegrityError, Workspace
from loramgr.formats import read_adapter
from loramgr.formats.gguf_file import GGML_TYPES, read_gguf
from loramgr.formats.gguf_names import names_of

gguf = pytest.importorskip("gguf")


def test_the_table_of_types_is_that_of_the_package() -> None:
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert GGML_TYPES.items() <= sizes.items()


def test_the_real_one_is_the_peft_adapter(tmp_path: Path, shared_data: Path, smollm2_base: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(smollm2_base, "smollm2")
    path = shared_data / "trained" / "gguf" / "smollm2-lic-r8-qv.gguf"
    ours = workspace.add(path, AddOptions(name="gguf", base="smollm2"))
    workspace.add(shared_data / "trained" / "smollm2" / "lic-r8-qv", AddOptions(name="peft", base="smollm2"))
    assert (ours.format, ours.method, ours.rank, ours.scaling) == ("gguf", "lora", 8, 2.0)
    assert workspace.inspect("gguf").mergeable
    assert workspace.diff("gguf", "peft").summary.distance == 0
    with pytest.raises(IncompatibleError, match="no module in common"):  # without a base its names are llama.cpp's
        workspace.diff(str(path), str(shared_data / "trained" / "smollm2" / "lic-r8-qv"))


def test_what_is_written_the_package_reads(tmp_path: Path, shared_data: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(shared_data / "bases" / "tinyllama-char", "tiny")
    workspace.add(shared_data / "trained" / "tinyllama-char" / "py-r16-all-rslora", AddOptions(name="a", base="tiny"))
    report = workspace.export("a", tmp_path / "out", format="gguf")
    assert report.files == ["adapter.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["adapter.lora.alpha"].contents() == 64  # 16/sqrt(16) as alpha/r
    ours = read_gguf(tmp_path / "out" / "adapter.gguf")
    for tensor in reader.tensors:
        assert bytes(tensor.data.tobytes()) == bytes(ours.tensors[tensor.name].read_bytes())


def test_quantized_factors_have_their_exact_values(tmp_path: Path) -> None:
    torch.manual_seed(3)
    factor = torch.randn(4, 64)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    packed = gguf.quants.quantize(factor.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_v.weight.lora_a", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_v.weight.lora_b", torch.ones(6, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = read_adapter(tmp_path / "q.gguf")
    assert any("Q8_0" in warning for warning in adapter.warnings)
    expected = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(adapter.tensors["blk.0.attn_v.weight.lora_a"].load(), expected)


def test_names_by_architecture() -> None:
    assert names_of("bert", ["bert.encoder.layer.0.attention.self.query.weight"]) == {
        "bert.encoder.layer.0.attention.self.query.weight": "blk.0.attn_q.weight"
    }
    assert names_of("gpt2", ["transformer.h.1.attn.c_attn.weight", "h.0.mlp.c_fc.weight"]) == {
        "transformer.h.1.attn.c_attn.weight": "blk.1.attn_qkv.weight",
        "h.0.mlp.c_fc.weight": "blk.0.ffn_up.weight",
    }
    with pytest.raises(IncompatibleError, match="does not know the architecture"):
        names_of("nothing", [])


def header(count: int, pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, pairs) + rest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(1 << 60, 0), "goes on after the end"),
        (header(0, 1 << 60), "goes on after the end"),
        (header(0, 1, struct.pack("<Q", 1 << 50)), "goes on after the end"),
        (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(9)), "not UTF-8"),
        (header(0, 1, struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 1 << 61)), "goes on after the end"),
        (header(1, 0, struct.pack("<Q1sIQQIQ", 1, b"a", 2, 1 << 40, 1 << 40, 0, 0)), "ends after the file"),
        (b"GGUF\0\0\0\3", "GGUF version 50331648"),
    ],
)
def test_what_a_header_claims_is_not_believed(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises((IncompatibleError, IntegrityError), match=message):
        read_gguf(tmp_path / "x.gguf")


def test_the_header_of_a_large_file_takes_milliseconds_and_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    size = 1 << 30
    info = struct.pack("<Q17sIQIQ", 17, b"token_embd.weight", 1, size // 4, 0, 0)
    head = header(1, 0, info)
    path.write_bytes(head + bytes(-len(head) % 32))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    code = (
        "import sys, time; from pathlib import Path; from loramgr.formats.registry import told_instead\n"
        f"start = time.perf_counter(); told = told_instead(Path({str(path)!r})); taken = time.perf_counter() - start\n"
        "print(told.kind, 'torch' in sys.modules, 'gguf' in sys.modules, taken < 0.1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["base-model", "False", "False", "True"]
