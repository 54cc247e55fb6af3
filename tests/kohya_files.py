"""A small network with linear layers, convolutions and norms, and LyCORIS' live adapters of it, for tests."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]


class Block(torch.nn.Module):
    """An attention-like block with names in which dots and underscores mix."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(12, 16)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(16, 16)])
        self.norm = torch.nn.LayerNorm(16)


class Network(torch.nn.Module):
    """Two blocks, a 3×3 and a 1×1 convolution and a group norm, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.conv_in = torch.nn.Conv2d(4, 8, 3)
        self.conv_out = torch.nn.Conv2d(8, 8, 1)
        self.group = torch.nn.GroupNorm(2, 8)
        self.double()


def save_base(path: Path, model: torch.nn.Module) -> Weights:
    """Save the model's weights as one file and return them."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, path)
    return weights


def live_network(model: torch.nn.Module, algo: str, rank: int = 2, **options: Any) -> Any:
    """Put LyCORIS' adapter of the algorithm into the model, with random values as if trained, in float64."""
    from lycoris import LycorisNetwork, create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    targets = ["Linear", "Conv2d", "LayerNorm", "GroupNorm"]
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": targets})
    sizes = {"linear_dim": rank, "linear_alpha": 1, "conv_dim": rank, "conv_alpha": 1}
    network = create_lycoris(model, 1.0, algo=algo, **sizes, **options)
    network.apply_to()
    network = network.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return network.eval()


def save_network(path: Path, network: Any, metadata: dict[str, str] | None = None) -> Path:
    """Save the adapter as LyCORIS does."""
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path, metadata)
    return path


def live_weights(model: torch.nn.Module) -> Weights:
    """Return weight and bias of every linear layer and convolution, as their forward pass has them: by unit inputs."""
    found: Weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            inputs = torch.eye(layer.in_features, dtype=torch.float64)
            bias = layer(torch.zeros_like(inputs[:1]))[0]
            weight = (layer(inputs) - bias).T
        elif isinstance(layer, torch.nn.Conv2d):
            shape = (layer.in_channels, *layer.kernel_size)
            size = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
            inputs = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
            bias = layer(torch.zeros_like(inputs[:1]))[0, :, 0, 0]
            weight = (layer(inputs)[:, :, 0, 0] - bias).T.reshape(-1, *shape)
        else:
            continue
        found |= {f"{name}.weight": weight.detach(), f"{name}.bias": bias.detach()}
    return found
