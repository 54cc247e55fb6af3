"""A base and fine-tunes of it on disk, for tests: every kind of tensor that an extraction meets, a few KiB each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.self_attn.q_proj.bias": (24,),
    "model.layers.0.mlp.up_proj.weight": (32, 24),
    "model.layers.0.conv.weight": (16, 12, 3),
    "model.layers.0.input_layernorm.weight": (24,),
    "lm_head.weight": (40, 24),
}
Q, UP, CONV = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "conv"))


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors of the base."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def moved(weights: Mapping[str, torch.Tensor], *names: str, rank: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return the tensors with an update of that rank on each of the named ones, in their dtype."""
    generator = torch.Generator().manual_seed(seed)
    result = dict(weights)
    for name in names:
        flat = weights[name].double().flatten(1) if weights[name].dim() > 1 else weights[name].double()[None]
        left = torch.randn(flat.shape[0], rank, generator=generator, dtype=torch.float64)
        delta = left @ torch.randn(rank, flat.shape[1], generator=generator, dtype=torch.float64) / 20
        result[name] = (flat + delta).reshape(weights[name].shape).to(weights[name].dtype)
    return result


def save(folder: Path, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """Write a model folder and return it; `config` None writes that of a Llama with a head of its own."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder
