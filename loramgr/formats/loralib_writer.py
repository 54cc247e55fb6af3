"""Writes an adapter as loralib saves it: a flat dictionary of `X.lora_A` and `X.lora_B`, heads and biases beside."""

from __future__ import annotations

from pathlib import Path

from loramgr.adapter import Adapter, LowRank, Replacement, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.peft_writer import alpha_of
from loramgr.formats.scaled import commonest, times
from loramgr.tensorfile import TensorView

__all__ = ["write_loralib"]

FILE = "lora.pt"


def write_loralib(adapter: Adapter, folder: Path) -> list[str]:
    """Write lora.pt; the notes say the alpha, which the format does not keep.

    Raises IncompatibleError, naming the parameter, for what loralib's layers cannot hold: DoRA, kernels larger than 1,
    biases that move, trained token rows, and every update that is no LoRA.
    """
    factors = {
        name: _checked(name, each) for name, each in adapter.updates.items() if not isinstance(each, Replacement)
    }
    if not factors:
        raise IncompatibleError("there is nothing to write: the adapter has no low-rank update")
    alpha = commonest(alpha_of(each.scaling, each.rank) for each in factors.values())
    tensors: dict[str, TensorView] = {}
    baked = []
    for name, each in factors.items():
        fitted = _with_alpha(each, alpha)
        module = name.removesuffix(".weight")
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = fitted.lora_A, fitted.lora_B
        if fitted is not each:
            baked.append(name)
    tensors |= {name: each.tensor for name, each in adapter.updates.items() if isinstance(each, Replacement)}
    _save(folder / FILE, tensors)
    notes = [f"loralib keeps no alpha: give its layers lora_alpha={alpha:g}, and loramgr --alpha {alpha!r}"]
    if baked:
        notes.append(f"lora_B of {len(baked)} modules carries what their own alpha was of it ({baked[0]}, …)")
    return notes


def _checked(name: str, update: Update) -> LowRank:
    if not isinstance(update, LowRank) or update.magnitude is not None or update.table is not None:
        what = "DoRA" if isinstance(update, LowRank) and update.magnitude is not None else type(update).__name__
        raise IncompatibleError(f"{name}: loralib cannot hold it ({what}): it knows LoRA and whole parameters")
    if update.kind == "conv":
        raise IncompatibleError(f"{name}: loralib factors a kernel in another way than this convolution's")
    return update


def _with_alpha(update: LowRank, alpha: float) -> LowRank:
    """Return the update with that alpha, the rest of its scaling in lora_B; itself where it has it already."""
    if alpha / update.rank == update.scaling or not alpha:
        return update
    return times(update, update.scaling * update.rank / alpha)


def _save(path: Path, tensors: dict[str, TensorView]) -> None:
    import torch

    torch.save({name: tensors[name].load() for name in sorted(tensors)}, path)
