"""Writes an adapter as llama.cpp loads it: one GGUF file, one alpha, the names and row order of its architecture."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from loramgr.adapter import Adapter, LowRank, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.gguf import EMBEDDING, reordered
from loramgr.formats.gguf_file import GGML_TYPES, MAGIC
from loramgr.formats.gguf_names import ARCHITECTURES, Architecture, names_of
from loramgr.formats.scaled import as_dtype, commonest, times
from loramgr.tensorfile import TensorView
from loramgr.views import transposed

__all__ = ["write_gguf"]

FILE = "adapter.gguf"
_ALIGNMENT = 32
_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_STRING, _FLOAT = 8, 6


def write_gguf(adapter: Adapter, folder: Path, config: Mapping[str, Any] | None) -> list[str]:
    """Write adapter.gguf; `config` is the base's config.json, which has the architecture and the numbers of heads.

    Raises IncompatibleError without it, for an architecture whose layout is not known, and, naming the parameter, for
    what llama.cpp cannot load: whole tensors, biases, DoRA, and every update that is no LoRA of a matrix.
    """
    architecture = _architecture(config)
    names = names_of(architecture.name, adapter.updates)
    factors = {name: _checked(name, each, names, config) for name, each in adapter.updates.items()}
    if not factors:
        raise IncompatibleError("there is nothing to write: the adapter has no low-rank update")
    alpha = _alpha(factors)
    tensors: dict[str, TensorView] = {}
    baked = []
    for name, each in sorted(factors.items()):
        fitted = each if each.scaling == alpha / each.rank else times(each, each.scaling * each.rank / alpha)
        baked += [] if fitted is each else [name]
        tensors.update(_tensors(names[name], fitted, architecture))
    with (folder / FILE).open("wb") as file:
        _write(file, _metadata(adapter, architecture.name, alpha), tensors)
    if not baked:
        return []
    return [f"llama.cpp knows one alpha, {alpha:g}: lora_b of {len(baked)} modules carries the rest ({baked[0]}, …)"]


def _architecture(config: Mapping[str, Any] | None) -> Architecture:
    if config is None:
        raise IncompatibleError(
            "llama.cpp's names and row order depend on the base's architecture, and its config.json is not at hand",
            "give the base with --base",
        )
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise IncompatibleError(f"how llama.cpp lays out a model of the type {model_type!r} is not known here")
    return Architecture.of(ARCHITECTURES[str(model_type)], config)


def _checked(name: str, update: Update, names: Mapping[str, str], config: Mapping[str, Any] | None) -> LowRank:
    if not isinstance(update, LowRank) or update.kind == "conv" or update.magnitude or update.table:
        what = "DoRA" if isinstance(update, LowRank) and update.magnitude is not None else type(update).__name__
        raise IncompatibleError(f"{name}: llama.cpp cannot load it ({what}): it knows LoRA of matrices only")
    if name not in names:
        raise IncompatibleError(f"{name}: llama.cpp has no name for it in this architecture")
    if names[name] == "output.weight" and (config or {}).get("tie_word_embeddings"):
        raise IncompatibleError(f"{name}: the base ties its head, and llama.cpp then has no tensor of its own for it")
    if (update.kind == "embedding") is not (names[name] == EMBEDDING):
        raise IncompatibleError(f"{name}: llama.cpp has LoRA of token embeddings, and of no other table")
    return update


def _alpha(factors: Mapping[str, LowRank]) -> float:
    """Return the commonest alpha where float32 holds it and it is not 0, which llama.cpp takes for none; else 1."""
    alpha = commonest(each.scaling * each.rank for each in factors.values())
    try:
        exact = struct.unpack("<f", struct.pack("<f", alpha))[0] == alpha
    except OverflowError:
        exact = False
    return alpha if exact and alpha else 1.0


def _tensors(name: str, update: LowRank, architecture: Architecture) -> dict[str, TensorView]:
    heads = architecture.rotated_heads(name)
    if heads is not None:
        update = replace(update, lora_B=reordered(update.lora_B, heads, to_llama=True))
    first = transposed(update.lora_A) if name == EMBEDDING else update.lora_A
    return {f"{name}.lora_a": _fit(first), f"{name}.lora_b": _fit(update.lora_B)}


def _fit(view: TensorView) -> TensorView:
    """Return the tensor in a dtype that llama.cpp multiplies with on every backend."""
    return view if view.spec.dtype in ("F32", "F16") else as_dtype(view, "F32")


def _metadata(adapter: Adapter, architecture: str, alpha: float) -> list[tuple[str, str | float]]:
    base = [] if adapter.base_name is None else [("general.base_model.0.name", adapter.base_name)]
    return [
        ("general.architecture", architecture),
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("adapter.lora.alpha", alpha),
        *base,
    ]


def _write(file: BinaryIO, metadata: list[tuple[str, str | float]], tensors: Mapping[str, TensorView]) -> None:
    header = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata:
        kind, data = (_STRING, _text(value)) if isinstance(value, str) else (_FLOAT, struct.pack("<f", value))
        header += _text(key) + struct.pack("<I", kind) + data
    offset = 0
    for name, view in tensors.items():
        shape = view.spec.shape[::-1]
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", _NUMBERS[view.spec.dtype], offset)
        offset += view.spec.nbytes + -view.spec.nbytes % _ALIGNMENT
    file.write(header + bytes(-len(header) % _ALIGNMENT))
    for view in tensors.values():
        file.write(view.read_bytes())
        file.write(bytes(-view.spec.nbytes % _ALIGNMENT))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
