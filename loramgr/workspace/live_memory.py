"""Which tensors in memory lie on the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["extent", "is_plain", "overlaps"]


def is_plain(tensor: torch.Tensor) -> bool:
    """Say whether the tensor is its bytes: subclasses, as of quantized or sharded weights, keep them otherwise."""
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided


def extent(tensor: torch.Tensor) -> int:
    """Return how many elements lie from the tensor's first to its last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@dataclass(frozen=True, slots=True)
class _Region:
    """The bytes from a tensor's first to its last one; not all of them need be its own.

    Addresses of one device say nothing about those of another.
    """

    device: str
    start: int
    end: int
    name: str
    tensor: torch.Tensor


def overlaps(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return for the tensors that have a byte in common with another one the name of such another."""
    found: dict[str, str] = {}
    active: list[_Region] = []
    for region in sorted(_regions(tensors), key=lambda region: (region.device, region.start)):
        active = [other for other in active if other.device == region.device and other.end > region.start]
        for other in active:
            if _overlap(other, region):
                found.setdefault(region.name, other.name)
                found.setdefault(other.name, region.name)
        active.append(region)
    return found


def _regions(tensors: Mapping[str, torch.Tensor]) -> list[_Region]:
    return [
        _Region(str(tensor.device), start, start + extent(tensor) * tensor.element_size(), name, tensor)
        for name, tensor in tensors.items()
        if is_plain(tensor) and tensor.device.type != "meta" and tensor.numel()
        for start in [tensor.data_ptr()]
    ]


def _overlap(one: _Region, other: _Region) -> bool:
    """Say whether two tensors whose regions overlap, the first one's starting first, have a byte in common."""
    import torch

    width = one.tensor.element_size()
    if width != other.tensor.element_size() or (other.start - one.start) % width:
        return True
    marks = torch.zeros((max(one.end, other.end) - one.start) // width, dtype=torch.bool)
    marks.as_strided(one.tensor.shape, one.tensor.stride(), 0).fill_(True)
    view = marks.as_strided(other.tensor.shape, other.tensor.stride(), (other.start - one.start) // width)
    return bool(view.any())
