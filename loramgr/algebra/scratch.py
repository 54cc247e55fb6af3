"""Memory that is used again for every tile: fresh pages cost more than the arithmetic on them."""

from __future__ import annotations

from threading import local

import torch

__all__ = ["Scratch", "scratch_for"]

_VIEWS = 64  # of one slot: more are let go together
_of_thread = local()


class Scratch:
    """Hands out contiguous tensors by slot; the next one of a slot and dtype overwrites the one before."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._views: dict[tuple[str, torch.dtype], dict[torch.Size, torch.Tensor]] = {}

    def take(self, slot: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of any content, of the shape and on the device of `like`."""
        views = self._views.setdefault((slot, dtype), {})
        view = views.get(like.shape)
        if view is None:  # a model has few shapes, and to make a view takes its time
            with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
                held = self._held.get((slot, dtype))
                if held is None or held.numel() < like.numel() or len(views) >= _VIEWS:
                    views.clear()
                    held = torch.empty(like.numel(), dtype=dtype, device=like.device)
                    self._held[slot, dtype] = held
                view = views[like.shape] = held[: like.numel()].view(like.shape)
        return view


def scratch_for(weight: torch.Tensor) -> Scratch:
    """Return what this thread uses for all weights in the CPU's memory, for others new scratch memory."""
    if weight.device.type != "cpu":
        return Scratch()
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = Scratch()
    scratch: Scratch = _of_thread.scratch
    return scratch
