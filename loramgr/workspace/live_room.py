"""Whether the devices of a model have room for the way back, asked before the first weight changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from loramgr.errors import LoramgrError

if TYPE_CHECKING:
    import torch

    from loramgr.workspace.live_tensor import Content

__all__ = ["check_room"]

_WEIGHTS_A_BYTE = 4  # a residual takes two bits a weight, and a list whose length nobody knows before


def check_room(coming: Iterable[tuple[torch.Tensor, Content]]) -> None:
    """Raise LoramgrError when a GPU has surely too little memory to keep what undoes these new contents.

    Each is given with its tensor, which has no residual yet. What is checked is the least that can be needed; a merge
    that runs out of memory later is taken back.
    """
    from loramgr.workspace.live_tensor import Sum

    needed: Counter[torch.device] = Counter()
    for tensor, content in coming:
        whole = tensor.numel() * tensor.element_size()
        needed[tensor.device] += tensor.numel() // _WEIGHTS_A_BYTE if isinstance(content, Sum) else whole
    for device, size in needed.items():
        free = _free(device)
        if free is not None and size > free:
            raise LoramgrError(
                f"{device}: the way back to the base takes {size:,} bytes or more, and {free:,} are free",
                "attach to the model on the CPU, or merge on disk",
            )


def _free(device: torch.device) -> int | None:
    """Return the bytes that a GPU has left, with those that torch holds and does not use; None for other devices."""
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
