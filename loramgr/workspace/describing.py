"""One update as a person sees it in an inspection: its kind, rank, scaling, and what its delta measures."""

from __future__ import annotations

import math
from dataclasses import replace

from loramgr.adapter import Decomposed, Delta, Experts, LowRank, Patch, Scale, Update, rank_of
from loramgr.records import ModuleRecord
from loramgr.workspace import spectra
from loramgr.workspace.applied import Additive, delta_of
from loramgr.workspace.pairs import kind_alone, module_name

__all__ = ["described_module", "unscaled_module"]


def described_module(name: str, update: Update, kind: str | None, *, spectrum: bool) -> ModuleRecord:
    """Describe one update; `kind` is what it is on the base, None to go by the adapter alone."""
    kind = kind or kind_alone(name, update)
    if isinstance(update, Decomposed) and not isinstance(update.inner, Delta):
        return described_module(name, update.inner, kind, spectrum=spectrum)
    if isinstance(update, LowRank):
        return _low_rank(module_name(name), update, kind, spectrum=spectrum)
    if isinstance(update, Experts):
        return _experts(module_name(name), update, kind)
    if isinstance(update, Additive):
        return _additive(module_name(name), update, kind)
    spec = next(update.views()).spec
    inputs = spec.shape[1] if len(spec.shape) == 2 else None
    outputs = spec.shape[0] if spec.shape else None
    if isinstance(update, Scale):
        count = spec.elements
        inputs, outputs = (None, count) if update.side == "output" else (count, None)
    if isinstance(update, Patch):  # as many values as differ, in places of their own
        outputs = None
    return ModuleRecord(module_name(name), kind, rank_of(update), None, None, inputs, outputs, spec.dtype, None, None)


def unscaled_module(module: ModuleRecord) -> ModuleRecord:
    """Return the description without the figures that need a scaling, for an adapter of which nobody knows it."""
    return replace(
        module,
        alpha=None,
        scaling=None,
        delta_norm=None,
        spectrum=None,
        share_of_weight=None,
        norm_to_median=None,
        outlier=None,
    )


def _low_rank(name: str, update: LowRank, kind: str, *, spectrum: bool) -> ModuleRecord:
    from loramgr.algebra.spectrum import effective_rank, frobenius_norm

    delta = spectra.Delta.of(update)
    told = None if delta is None or not spectrum else delta
    return ModuleRecord(
        name=name,
        kind=kind,
        rank=update.rank,
        alpha=update.alpha,
        scaling=update.scaling,
        in_features=update.lora_A.spec.shape[1],
        out_features=update.lora_B.spec.shape[0],
        dtype=update.lora_A.spec.dtype,
        delta_norm=None if delta is None else frobenius_norm(delta.values),
        effective_rank=None if delta is None else effective_rank(delta.values),
        spectrum=None if told is None else told.values.tolist(),
        rank_used=None if told is None else told.rank_used,
        dead_ranks=None if told is None else told.dead_ranks,
    )


def _experts(name: str, update: Experts, kind: str) -> ModuleRecord:
    from loramgr.algebra.finite import all_finite
    from loramgr.algebra.spectrum import singular_values

    lora_A, lora_B = update.lora_A.load(), update.lora_B.load()
    norm = None
    if all_finite(lora_A) and all_finite(lora_B):
        pairs = zip(lora_A, lora_B, strict=True)
        norm = math.hypot(*(float(singular_values(a, b, update.scaling).norm()) for a, b in pairs))
    sizes = lora_A.shape[2], lora_B.shape[1]
    dtype = update.lora_A.spec.dtype
    return ModuleRecord(name, kind, update.rank, update.alpha, update.scaling, *sizes, dtype, norm, None)


def _additive(name: str, update: Additive, kind: str) -> ModuleRecord:
    """Describe an update whose delta is no product of two factors, by the delta itself."""
    from loramgr.algebra.effects import matrix_norm
    from loramgr.algebra.finite import all_finite

    is_sparse = isinstance(update, Delta) and update.indices is not None
    if isinstance(update, Delta) and is_sparse:
        delta = update.tensor.load().double()[None] * update.scaling
    else:
        delta = delta_of(update, None)
    norm = matrix_norm(delta.reshape(max(1, delta.shape[0]), -1)) if all_finite(delta) else None
    inputs, outputs = (None, None) if is_sparse or delta.dim() < 2 else (delta.shape[1], delta.shape[0])
    alpha = None if isinstance(update, Delta | Experts) else update.alpha
    dtype = next(update.views()).spec.dtype
    return ModuleRecord(name, kind, rank_of(update), alpha, update.scaling, inputs, outputs, dtype, norm, None)
