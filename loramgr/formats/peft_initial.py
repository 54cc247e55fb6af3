"""Adapters of PEFT that began by changing the base, made plain LoRA with the adapter as it was before the training.

PiSSA (arXiv 2404.02948), OLoRA (2406.01775), CorDA (2406.05223) and LoRA-GA (2407.05000) take s · B0 A0 out of the base
and train W - s · B0 A0 + s · B A, which is W + s · [B, -B0] [A; A0]: LoRA on the stock base, of twice the rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loramgr.adapter import Adapter, LowRank, rank_of
from loramgr.errors import IncompatibleError, UsageError
from loramgr.formats.configuration import Fields
from loramgr.formats.files import adapter_files
from loramgr.formats.folder import CONFIGURATION
from loramgr.formats.peft import load_parts, read_parts
from loramgr.formats.peft_variants import LORA, base_changing, peft_type, reason_of_changed_base
from loramgr.formats.peft_writer import WEIGHTS, patterned
from loramgr.formats.written_file import write_safetensors
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["read_as_plain", "read_from_initial", "read_to_look_at", "without", "write_plain"]


def read_from_initial(folder: Path, initial: Path) -> Adapter:
    """Read the adapter in the folder as plain LoRA, with what `initial` had before the training taken out again.

    Nothing is rounded: the factors are joined in the widest dtype of all four. Raises as `read_peft` of both,
    UsageError for an adapter that did not change the base, and IncompatibleError, naming the module, where the two do
    not belong together.
    """
    start = adapter_files(initial).folder
    if start.resolve() == folder.resolve():
        raise UsageError(f"{initial} is the trained adapter itself", "name the one that was saved before the training")
    trained, method = read_as_plain(folder)
    before, began = read_as_plain(start)
    if method is None:
        said = trained.config.get("init_lora_weights")
        raise UsageError(f"{folder}: init_lora_weights {said!r} leaves the base as it is", "leave --initial away")
    if began is not None and _kind(began) != _kind(method):
        raise IncompatibleError(f"{initial} began as {began}, and {folder} as {method}")
    return _subtracted(trained, _pairs(trained, before, initial))


def read_to_look_at(folder: Path) -> Adapter:
    """Read the adapter in the folder to be described: one that changed the base as its factors, and with an obstacle.

    Raises as `read_peft`, but not for an initialisation that changed the base.
    """
    fields, tensors, metadata = load_parts(folder)
    reason = reason_of_changed_base(fields) if peft_type(fields) == LORA else None
    if reason is None:
        return read_parts(fields, tensors, metadata)
    content = {key: value for key, value in fields.content.items() if key not in ("init_lora_weights", "loftq_config")}
    adapter = read_parts(Fields(fields.path, content), tensors, metadata)
    told = "the figures are those of lora_B lora_A, of which a part was in the base before the training"
    return replace(
        adapter,
        config=fields.content,
        obstacle=adapter.obstacle or reason,
        warnings=(*adapter.warnings, told),
    )


def _kind(init: str) -> str:
    return init.lower().partition("_niter_")[0]


def without(trained: Adapter, before: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Adapter:
    """Return the adapter as plain LoRA with lora_A and lora_B, by parameter, taken out: what was computed of a base.

    They are float64, (r, in) and (out, r), and are rounded to float32 or kept where the adapter has float64. A module
    that is not in `before` began with nothing. Raises IncompatibleError, naming the parameter, for factors that are
    not stored as those of a layer.
    """
    pairs: dict[str, tuple[LowRank, LowRank | None]] = {}
    for name, one in trained.updates.items():
        if rank_of(one) is None:
            continue
        if not (isinstance(one, LowRank) and {view.spec for view in one.views()} <= set(trained.specs)):
            raise _not_stored(name)
        pairs[name] = (one, _computed(one, *before[name]) if name in before else None)
    return _subtracted(trained, pairs)


def write_plain(adapter: Adapter, folder: Path) -> None:
    """Write the adapter that `read_from_initial` gave into an empty folder, as PEFT reads it."""
    (folder / CONFIGURATION).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
    recorded = {} if adapter.base_digest is None else {"base_digest": adapter.base_digest}
    write_safetensors(folder / WEIGHTS, adapter.tensors, {"format": "pt", **recorded})


def read_as_plain(folder: Path) -> tuple[Adapter, str | None]:
    """Return the adapter read as if its factors were all, and the initialisation that says otherwise, None for none.

    Raises as `read_peft`, and UsageError for a method that is not LoRA.
    """
    fields, tensors, metadata = load_parts(folder)
    if peft_type(fields) != LORA:
        raise UsageError(
            f"{folder} is {peft_type(fields)}: only LoRA begins by changing the base", "leave --initial away"
        )
    method = base_changing(fields)
    if method is None:
        return read_parts(fields, tensors, metadata), None
    plain = Fields(fields.path, {**fields.content, "init_lora_weights": True})
    return read_parts(plain, tensors, metadata), str(fields.content["init_lora_weights"])


def _computed(one: LowRank, lora_A: torch.Tensor, lora_B: torch.Tensor) -> LowRank:
    """Return computed factors in the place of an adapter's own."""
    wide = "F64" in {one.lora_A.spec.dtype, one.lora_B.spec.dtype}
    made = (
        ComputedTensor(
            TensorSpec(view.spec.name, "F64" if wide else "F32", view.spec.shape), partial(_as, tensor, wide)
        )
        for view, tensor in ((one.lora_A, lora_A), (one.lora_B, lora_B))
    )
    return replace(one, lora_A=next(made), lora_B=next(made))


def _as(tensor: torch.Tensor, wide: bool) -> torch.Tensor:
    return tensor if wide else tensor.float()


def _subtracted(trained: Adapter, pairs: Mapping[str, tuple[LowRank, LowRank | None]]) -> Adapter:
    tensors, updates = dict(trained.tensors), dict(trained.updates)
    made: dict[str, LowRank] = {}
    for name, (one, other) in pairs.items():
        joined = one if other is None else _joined(one, other)
        made[name.removesuffix(".weight")] = joined
        updates[name] = joined
        tensors |= {view.spec.name: view for view in (joined.lora_A, joined.lora_B)}
    config = {**trained.config, "init_lora_weights": True, **patterned(made)}
    alpha, rank = float(config["lora_alpha"]), int(config["r"])
    return replace(trained, config=config, updates=updates, tensors=tensors, alpha=alpha, scaling=alpha / rank)


def _pairs(trained: Adapter, before: Adapter, initial: Path) -> dict[str, tuple[LowRank, LowRank]]:
    """Return the factors of every module in both; IncompatibleError, naming the first that they do not share."""
    own, others = (
        {name: each for name, each in adapter.updates.items() if rank_of(each) is not None}
        for adapter in (trained, before)
    )
    for name in sorted(own.keys() ^ others.keys()):
        raise IncompatibleError(f"{initial}: {name} is in {'the trained adapter' if name in own else 'it'} only")
    pairs: dict[str, tuple[LowRank, LowRank]] = {}
    for name, one in own.items():
        other = others[name]
        stored = {view.spec for each in (one, other) for view in each.views()} <= {*trained.specs, *before.specs}
        if not (isinstance(one, LowRank) and isinstance(other, LowRank) and stored):
            raise _not_stored(name)
        told = [(each.kind, each.lora_A.spec.shape, each.lora_B.spec.shape, each.scaling) for each in (one, other)]
        if told[0] != told[1]:
            raise IncompatibleError(
                f"{initial}: {name} has {_described(other)} there, and {_described(one)} in the trained adapter",
                "name the adapter that this training began with",
            )
        pairs[name] = (one, other)
    return pairs


def _not_stored(name: str) -> IncompatibleError:
    return IncompatibleError(f"{name}: its factors are not stored as those of a layer, and are not joined")


def _described(update: LowRank) -> str:
    return f"lora_A {update.lora_A.spec.shape}, lora_B {update.lora_B.spec.shape} and the scaling {update.scaling:g}"


def _joined(one: LowRank, other: LowRank) -> LowRank:
    dtypes = {view.spec.dtype for each in (one, other) for view in (each.lora_A, each.lora_B)}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
    rank = one.rank + other.rank
    lora_A = _stacked(one.lora_A, other.lora_A, 0, dtype)
    lora_B = _stacked(one.lora_B, other.lora_B, 1, dtype)
    return replace(one, lora_A=lora_A, lora_B=lora_B, rank=rank, alpha=one.scaling * rank)


def _stacked(first: TensorView, second: TensorView, dimension: int, dtype: str) -> ComputedTensor:
    """Return the two beside each other, the second one of lora_B (dimension 1) negated."""
    shape = list(first.spec.shape)
    shape[dimension] += second.spec.shape[dimension]

    def make() -> torch.Tensor:
        import torch

        from loramgr.tensors import torch_dtype

        before = second.load() if dimension == 0 else -second.load()
        return torch.cat([each.to(torch_dtype(dtype)) for each in (first.load(), before)], dimension)

    return ComputedTensor(TensorSpec(first.spec.name, dtype, tuple(shape)), make)
