"""Writes an adapter of any format as PEFT reads it: LoRA, DoRA, lora_bias and whole tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loramgr.adapter import (
    Adapter,
    Butterfly,
    Decomposed,
    Hadamard,
    Kronecker,
    LowRank,
    Opaque,
    Orthogonal,
    Reflected,
    Replacement,
    Scale,
    Shift,
    Update,
)
from loramgr.errors import IncompatibleError
from loramgr.formats.folder import CONFIGURATION
from loramgr.formats.peft_keys import PREFIX
from loramgr.formats.peft_writer import WEIGHTS, Origins, WrittenFactors, WrittenTensor, configuration, key_of
from loramgr.formats.written_file import write_safetensors
from loramgr.tensorfile import TensorSpec, TensorView

if TYPE_CHECKING:
    import torch

__all__ = ["export_peft"]

_NOT_HELD: tuple[tuple[type[Update] | tuple[type[Update], ...], str], ...] = (
    (Hadamard, "the product of two deltas, entry by entry (LoHa), has no low rank"),
    (Kronecker, "a Kronecker product (LoKr) has no low rank"),
    (Scale, "it multiplies the outputs or inputs of the weight (IA3)"),
    ((Orthogonal, Butterfly, Reflected), "it rotates or reflects the weight (OFT, BOFT, HRA)"),
    (Decomposed, "its norms (DoRA) are not those of a linear layer or an embedding"),
)


def export_peft(adapter: Adapter, folder: Path, base_digest: str | None) -> list[str]:
    """Write adapter_config.json and adapter_model.safetensors, rank and alpha of every module as they are.

    Raises IncompatibleError, naming the parameter, for updates that PEFT's LoRA cannot hold, for DoRA on some modules
    only, and for lora_bias with DoRA.
    """
    factors = {
        name.removesuffix(".weight"): each for name, each in adapter.updates.items() if isinstance(each, LowRank)
    }
    shifts = {name: each for name, each in adapter.updates.items() if isinstance(each, Shift)}
    wholes = {name: each.tensor for name, each in adapter.updates.items() if isinstance(each, Replacement)}
    left = sorted(adapter.updates.keys() - {f"{name}.weight" for name in factors} - shifts.keys() - wholes.keys())
    if left:
        raise IncompatibleError(
            f"{left[0]}: PEFT's LoRA cannot hold it: {_why_not(adapter.updates[left[0]])}",
            "export without --format writes its own files",
        )
    is_dora = _is_dora(factors)
    written = {name: _written(each) for name, each in factors.items()}
    views = _views(factors, is_dora=is_dora)
    for name, each in shifts.items():
        views[_shift_key(name, each, factors, is_dora=is_dora)] = each.vector
    for name, view in wholes.items():
        views[key_of(name, written)] = view
    tensors = [WrittenTensor(_named(view, name), view.read_bytes) for name, view in wholes.items()]
    origins = Origins(
        adapter.base_name, base_digest or adapter.base_digest, adapter.task_type, keeps_ties=adapter.keeps_ties
    )
    config = configuration(written, tensors, origins) | {"use_dora": is_dora}
    if shifts:
        config["lora_bias"] = True
    (folder / CONFIGURATION).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    recorded = {} if origins.base_digest is None else {"base_digest": origins.base_digest}
    write_safetensors(folder / WEIGHTS, views, {"format": "pt", **recorded})
    return [] if adapter.base_name else ["base_model_name_or_path is empty: the adapter does not name its base"]


def _why_not(update: Update) -> str:
    """Return what the update is instead of a product of two factors, a whole tensor, or a moved bias."""
    if isinstance(update, Opaque):
        return update.reason
    known = next((why for kind, why in _NOT_HELD if isinstance(update, kind)), None)
    return known or f"{type(update).__name__} is no product of two factors"


def _is_dora(factors: Mapping[str, LowRank]) -> bool:
    decomposed = [name for name, each in factors.items() if each.magnitude is not None]
    plain = sorted(factors.keys() - {*decomposed})
    if decomposed and plain:
        raise IncompatibleError(
            f"{plain[0]} has no magnitude and {decomposed[0]} has one: in PEFT all have DoRA or none"
        )
    return bool(decomposed)


def _views(factors: Mapping[str, LowRank], *, is_dora: bool) -> dict[str, TensorView]:
    views: dict[str, TensorView] = {}
    for name, each in factors.items():
        if is_dora and each.kind == "conv":
            raise IncompatibleError(f"{name}: DoRA of a convolution is not written for PEFT")
        first, second = ("lora_A.weight", "lora_B.weight")
        if each.kind == "embedding":
            first, second = ("lora_embedding_A", "lora_embedding_B")
        views[f"{PREFIX}{name}.{first}"], views[f"{PREFIX}{name}.{second}"] = each.lora_A, each.lora_B
        if each.magnitude is not None:
            views[f"{PREFIX}{name}.lora_magnitude_vector"] = each.magnitude
        if each.table is not None:
            views[f"{PREFIX}{name}.base_layer.weight"] = each.table
    return views


def _shift_key(name: str, shift: Shift, factors: Mapping[str, LowRank], *, is_dora: bool) -> str:
    module = name.removesuffix(".bias")
    if is_dora or shift.table is not None or module not in factors or factors[module].scaling != shift.scaling:
        raise IncompatibleError(f"{name}: PEFT's lora_bias moves a bias with the scaling of its module, without DoRA")
    return f"{PREFIX}{module}.lora_B.bias"


def _named(view: TensorView, name: str) -> TensorSpec:
    return TensorSpec(name, view.spec.dtype, view.spec.shape)


def _written(update: LowRank) -> WrittenFactors:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return update.lora_A.load(), update.lora_B.load()

    shapes = update.lora_A.spec.shape, update.lora_B.spec.shape
    flag = update.fan_in_fan_out
    return WrittenFactors(update.kind, *shapes, update.lora_A.spec.dtype, make, update.scaling, flag)
