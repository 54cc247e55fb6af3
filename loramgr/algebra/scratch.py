"""Memory that is used again for every tile: fresh pages cost more than the arithmetic on them."""

from __future__ import annotations

from threading import local

import torch

__all__ = ["Scratch", "scratch_for"]

_of_thread = local()


class Scratch:
    """Hands out contiguous tensors by slot; the next one of a slot and dtype overwrites the one before."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._last: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, slot: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of any content, of the shape and on the device of `like`."""
        key = slot, dtype
        last = self._last.get(key)
        if last is None or last.shape != like.shape:  # most tiles are of one shape, and to make a view takes its time
            with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
                last = self._last[key] = self._room(key, like).view(like.shape)
        return last

    def _room(self, key: tuple[str, torch.dtype], like: torch.Tensor) -> torch.Tensor:
        held = self._held.get(key)
        if held is None or held.numel() < like.numel():
            held = self._held[key] = torch.empty(like.numel(), dtype=key[1], device=like.device)
        return held[: like.numel()]


def scratch_for(weight: torch.Tensor) -> Scratch:
    """Return what this thread uses for all weights in the CPU's memory, for others new scratch memory."""
    if weight.device.type != "cpu":
        return Scratch()
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = Scratch()
    scratch: Scratch = _of_thread.scratch
    return scratch
