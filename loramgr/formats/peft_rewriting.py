"""Writes a PEFT adapter anew with other low-rank factors; every other tensor and setting stays as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loramgr.adapter import Adapter, LowRank
from loramgr.errors import IncompatibleError
from loramgr.formats.folder import CONFIGURATION
from loramgr.formats.peft_writer import WEIGHTS, WrittenFactors, factor_bytes, patterned
from loramgr.tensorfile import Data, TensorSpec, TensorView, encode_header

__all__ = ["rewrite_peft"]


@dataclass(frozen=True, slots=True)
class _Pair:
    """The factors of one update and what they are called in the file."""

    factors: WrittenFactors
    specs: tuple[TensorSpec, TensorSpec]


def rewrite_peft(
    folder: Path, adapter: Adapter, factors: Mapping[str, WrittenFactors | None], base_digest: str | None
) -> None:
    """Write the adapter into an empty folder; `factors` has those of every low-rank update by its name, None drops it.

    Raises IncompatibleError where nothing is left to write.
    """
    replaced: dict[str, _Pair | None] = {}
    for name, update in adapter.updates.items():
        if isinstance(update, LowRank):
            made = factors[name]
            first, second = update.lora_A.spec.name, update.lora_B.spec.name
            replaced[first] = None if made is None else _Pair(made, _specs(first, second, made))
            replaced[second] = None
    kept = [view for name, view in sorted(adapter.tensors.items()) if name not in replaced]
    pairs = [pair for _, pair in sorted(replaced.items()) if pair is not None]
    if not kept and not pairs:
        raise IncompatibleError("there is nothing to write: no module and no tensor is left")
    modules = {name.removesuffix(".weight"): made for name, made in factors.items() if made is not None}
    config = {**adapter.config, **patterned(modules)}
    if modules and None in factors.values():  # a target without tensors would begin anew where somebody loads it
        config["target_modules"] = sorted(modules)
    (folder / CONFIGURATION).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _write_weights(folder / WEIGHTS, pairs, kept, base_digest)


def _specs(first: str, second: str, made: WrittenFactors) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec(first, made.dtype, made.shape_A), TensorSpec(second, made.dtype, made.shape_B)


def _write_weights(path: Path, pairs: list[_Pair], kept: list[TensorView], base_digest: str | None) -> None:
    specs = [spec for pair in pairs for spec in pair.specs] + [view.spec for view in kept]
    metadata = {"format": "pt"} | ({} if base_digest is None else {"base_digest": base_digest})
    with path.open("wb") as file:
        file.write(encode_header(specs, metadata))
        for data in _contents(pairs, kept):
            file.write(data)


def _contents(pairs: list[_Pair], kept: list[TensorView]) -> Iterator[Data]:
    for pair in pairs:
        yield from factor_bytes(pair.factors, pair.specs)
    for view in kept:
        yield view.read_bytes()
