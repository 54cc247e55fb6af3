"""Writes an adapter for mlx-lm: one rank and one scale for all modules, so other ranks and scalings are made fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter, Experts, LowRank, Replacement, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.folder import CONFIGURATION, MLX_WEIGHTS
from loramgr.formats.scaled import as_dtype, commonest, padded, times
from loramgr.formats.written_file import write_safetensors
from loramgr.tensorfile import TensorView
from loramgr.views import transposed

__all__ = ["write_mlx"]


def write_mlx(adapter: Adapter, folder: Path) -> list[str]:
    """Write adapters.safetensors and adapter_config.json; return notes for a person.

    Raises IncompatibleError, naming the parameter, for what mlx-lm cannot load: convolutions, biases that move, trained
    token rows, DoRA on some modules only or on an embedding, and every update that is no LoRA or DoRA.
    """
    wholes = {name: each.tensor for name, each in adapter.updates.items() if isinstance(each, Replacement)}
    factors = {name: _checked(name, each) for name, each in adapter.updates.items() if name not in wholes}
    if not factors:
        return _write_full(adapter, folder, wholes)
    decomposed = {name for name, each in factors.items() if isinstance(each, LowRank) and each.magnitude is not None}
    if decomposed and len(decomposed) < len(factors):
        plain = min(factors.keys() - decomposed)
        raise IncompatibleError(
            f"{plain} has no magnitude and {min(decomposed)} has one: in mlx-lm all have DoRA or none"
        )
    scale = commonest(each.scaling for each in factors.values())
    rank = max(each.rank for each in factors.values())
    views = {key: view for name, each in factors.items() for key, view in _tensors(name, each, scale, rank)}
    write_safetensors(
        folder / MLX_WEIGHTS, views | {name: _fit(view) for name, view in wholes.items()}, {"format": "mlx"}
    )
    parameters = {
        "rank": rank,
        "scale": scale,
        "dropout": 0.0,
        "keys": sorted(name.removesuffix(".weight") for name in factors),
    }
    _write_config(adapter, folder, {"fine_tune_type": "dora" if decomposed else "lora", "lora_parameters": parameters})
    return [*_notes(factors, scale, rank)]


def _write_full(adapter: Adapter, folder: Path, wholes: Mapping[str, TensorView]) -> list[str]:
    if not wholes:
        raise IncompatibleError("there is nothing to write: no module and no tensor is left")
    write_safetensors(folder / MLX_WEIGHTS, {name: _fit(view) for name, view in wholes.items()}, {"format": "mlx"})
    _write_config(adapter, folder, {"fine_tune_type": "full"})
    return []


def _write_config(adapter: Adapter, folder: Path, said: dict[str, Any]) -> None:
    numbers = [int(part) for name in adapter.updates for part in name.split(".") if part.isdecimal()]
    model = {} if adapter.base_name is None else {"model": adapter.base_name}
    config = {"num_layers": max(numbers, default=-1) + 1, **model, **said}
    (folder / CONFIGURATION).write_text(json.dumps(config, indent=4, sort_keys=True) + "\n")


def _checked(name: str, update: Update) -> LowRank | Experts:
    if isinstance(update, Experts):
        return update
    if not isinstance(update, LowRank) or update.kind == "conv" or update.table is not None:
        what = "convolution" if isinstance(update, LowRank) and update.kind == "conv" else type(update).__name__
        raise IncompatibleError(f"{name}: mlx-lm cannot load it ({what}): it knows LoRA and DoRA of linear layers")
    if update.magnitude is not None and update.kind == "embedding":
        raise IncompatibleError(f"{name}: mlx-lm norms DoRA of an embedding row by row, another decomposition")
    return update


def _tensors(name: str, update: LowRank | Experts, scale: float, rank: int) -> Iterator[tuple[str, TensorView]]:
    module = name.removesuffix(".weight")
    if isinstance(update, Experts):
        if update.scaling != scale or update.rank != rank:
            raise IncompatibleError(f"{name}: experts of another rank or scaling than the other modules")
        yield from ((f"{module}.lora_a", _fit(update.lora_A)), (f"{module}.lora_b", _fit(update.lora_B)))
        return
    fitted = times(update, update.scaling / scale) if scale else update
    yield f"{module}.lora_a", padded(_fit(transposed(update.lora_A)), 1, rank)
    yield f"{module}.lora_b", padded(_fit(transposed(fitted.lora_B)), 0, rank)
    if update.magnitude is not None:
        yield f"{module}.m", _fit(update.magnitude)


def _fit(view: TensorView) -> TensorView:
    """Return the tensor in a dtype that every device of MLX's has."""
    return as_dtype(view, "F32") if view.spec.dtype == "F64" else view


def _notes(factors: Mapping[str, LowRank | Experts], scale: float, rank: int) -> Iterator[str]:
    baked = sorted(name for name, each in factors.items() if each.scaling != scale)
    if baked:
        some = f"{len(baked)} modules ({baked[0]}, …)"
        yield f"mlx-lm knows one scale, {scale:g}: lora_b carries the rest of it for {some}"
    fewer = sorted(name for name, each in factors.items() if each.rank != rank)
    if fewer:
        some = f"{len(fewer)} modules ({fewer[0]}, …)"
        yield f"mlx-lm knows one rank, {rank}: zeros fill up the factors of {some}"
