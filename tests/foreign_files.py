"""Small adapters in the formats of loralib, mlx-lm, llama.cpp and torchtune, byte for byte, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from loramgr.adapter import Adapter, LowRank
from loramgr.formats.gguf_writer import write_gguf
from loramgr.pickles import MemoryTensor
from loramgr.tensorfile import TensorSpec

CONFIG = {
    "model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
BLOCK = "model.layers.{}.self_attn.{}_proj"
SHAPES = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}


def view(name: str, tensor: torch.Tensor) -> MemoryTensor:
    return MemoryTensor(TensorSpec(name, "F32", tuple(tensor.shape)), tensor)


def factors(rank: int = 2, layers: int = 1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return lora_A and lora_B by module, of a Llama with heads of four rows."""
    torch.manual_seed(11)
    return {
        BLOCK.format(layer, each): (torch.randn(rank, shape[1]), torch.randn(shape[0], rank))
        for layer in range(layers)
        for each, shape in SHAPES.items()
    }


def base(folder: Path, layers: int = 1) -> Path:
    folder.mkdir()
    torch.manual_seed(12)
    weights = {
        f"{BLOCK.format(layer, each)}.weight": torch.randn(shape)
        for layer in range(layers)
        for each, shape in SHAPES.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def in_memory(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> Adapter:
    updates = {
        f"{name}.weight": LowRank("linear", view("a", a), view("b", b), a.shape[0], alpha, alpha / a.shape[0])
        for name, (a, b) in pairs.items()
    }
    return Adapter("peft", "lora", {}, dict(updates), {}, alpha, None, ())


def write_mlx_folder(folder: Path, scale: float = 3.0) -> Path:
    folder.mkdir()
    tensors = {
        f"{name}.lora_{end}": tensor.T.contiguous()
        for name, pair in factors().items()
        for end, tensor in zip("ab", pair, strict=True)
    }
    save_file(tensors, folder / "adapters.safetensors")
    said = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": scale, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder / "adapters.safetensors"


def write_loralib_file(folder: Path) -> Path:
    folder.mkdir()
    pairs = {name: dict(zip("AB", pair, strict=True)) for name, pair in factors().items()}
    torch.save({f"{n}.lora_{end}": each for n, pair in pairs.items() for end, each in pair.items()}, folder / "lora.pt")
    return folder / "lora.pt"


def write_gguf_file(folder: Path) -> Path:
    folder.mkdir()
    write_gguf(in_memory(factors(), 6.0), folder, CONFIG)
    return folder / "adapter.gguf"


def to_torchtune(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows in halves of a head as the pairs that torchtune's rotary embedding wants."""
    rows = tensor.shape[0] // heads
    order = [
        head * rows + half * rows // 2 + pair for head in range(heads) for pair in range(rows // 2) for half in (0, 1)
    ]
    return tensor[order].contiguous()


def write_torchtune_file(folder: Path, magnitudes: Mapping[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "output_proj"}
    heads = {"q": 2, "k": 1}
    tensors = {}
    for module, (lora_A, lora_B) in factors().items():
        leaf = module.rpartition(".")[2][0]
        name = f"layers.{module.split('.')[2]}.attn.{names[leaf]}"

        def ordered(tensor: torch.Tensor, leaf: str = leaf) -> torch.Tensor:
            return to_torchtune(tensor, heads[leaf]) if leaf in heads else tensor

        tensors |= {f"{name}.lora_a.weight": lora_A, f"{name}.lora_b.weight": ordered(lora_B)}
        if magnitudes is not None:
            tensors[f"{name}.magnitude"] = ordered(magnitudes[module])
    torch.save(tensors, folder / "adapter_model.pt")
    said = {"r": 2, "lora_alpha": 6, "peft_type": "LORA", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder / "adapter_model.pt"
