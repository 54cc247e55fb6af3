"""A small model of every kind of layer, and adapters of it as PEFT writes them, for tests of merging in memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Toy(torch.nn.Module):
    """Two matrices, an embedding, a convolution and a head, with a buffer; float32, the same weights every time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.emb = torch.nn.Embedding(11, 12)
        self.q = torch.nn.Linear(12, 20)
        self.k = torch.nn.Linear(20, 18)
        self.conv = torch.nn.Conv2d(2, 3, 2)
        self.head = torch.nn.Linear(24, 5)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take tokens (batch, 1) to outputs (batch, 5)."""
        hidden = self.k(torch.relu(self.q(self.emb(tokens)[:, 0])))
        pixels = torch.relu(self.conv(hidden.reshape(-1, 2, 3, 3)))
        output: torch.Tensor = self.head(pixels.flatten(1).repeat(1, 2)) * self.scale
        return output


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q", "k"]},
    "other": {"target_modules": ["k", "conv"], "r": 3},
    "head": {"target_modules": ["q", "emb"], "modules_to_save": ["head"]},
    "dora": {"target_modules": ["q", "k"], "use_dora": True},
    "bias": {"target_modules": ["k"], "bias": "lora_only"},
}
TOKENS = torch.arange(8)[:, None]


def adapted(model: torch.nn.Module, folder: Path, seed: int = 0, size: float = 0.1, **config: Any) -> Any:
    """Wrap a copy of the model with PEFT, move what it trains by random values, save it and return it."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        live.save_pretrained(folder)
    return live.eval()


def toy_adapters(folder: Path) -> dict[str, Path]:
    """Write one adapter of the toy for each of the configurations."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        adapted(Toy(), folder / name, seed, **config)
    return {name: folder / name for name in CONFIGS}


def bits(tensors: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Return the bytes of every tensor of a model, row-major."""
    named = tensors.state_dict() if isinstance(tensors, torch.nn.Module) else tensors
    return {name: bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) for name, t in named.items()}
