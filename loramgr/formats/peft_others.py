"""Adapters of PEFT's methods beside LoRA, read into `Adapter`: merged where the mathematics is known, else kept whole.

What is kept whole is described tensor by tensor and says why it is not merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loramgr.adapter import Adapter, Naming, Opaque, Replacement, Update
from loramgr.formats.configuration import Fields, is_number, is_rank
from loramgr.formats.peft_config import parse_settings
from loramgr.formats.peft_keys import parse_keys
from loramgr.formats.peft_methods import method_name, obstacle_of
from loramgr.formats.peft_miss import read_miss
from loramgr.formats.peft_tables import refuse_unexplained, tables_of
from loramgr.formats.peft_tuners import split_tensors, updates_of
from loramgr.formats.peft_variants import obstacle_of_variant
from loramgr.formats.peft_vera import read_vera
from loramgr.tensorfile import TensorView

__all__ = ["read_kept", "read_tuner"]


def read_tuner(fields: Fields, method: str, tensors: dict[str, TensorView]) -> Adapter:
    """Read an adapter of one of `TUNERS`; raises IncompatibleError for what does not make updates of it."""
    settings = parse_settings(fields)
    reason = obstacle_of_variant(fields, method)
    if reason is not None:
        return read_kept(fields, method, tensors, reason)
    modules, shared, rest = split_tensors(method, tensors)
    keys, unexplained = parse_keys(rest)
    unexplained += [key.name for key in keys if key.role not in ("base", "saved")]
    tables = tables_of(keys, rest, modules, settings, unexplained)
    refuse_unexplained(unexplained)
    updates: dict[str, Update]
    naming: Naming | None = None
    if method == "VERA":
        updates, naming = read_vera(fields, modules, shared)
    elif method == "MISS":
        updates, naming = read_miss(fields, modules)
    else:
        updates = updates_of(method, settings, modules)
    for target in updates.keys() & tables.keys():
        if not (target.endswith(".bias") or isinstance(updates[target], Replacement)):
            refuse_unexplained([tables[target].spec.name])
    updates |= {target: Replacement(view) for target, view in tables.items()}
    lora = settings.lora
    return Adapter(
        **_common(fields),
        method=method_name(method),
        updates=dict(sorted(updates.items())),
        tensors=tensors,
        alpha=None if lora is None else lora.alpha,
        scaling=None if lora is None else lora.scaling(lora.alpha, lora.rank),
        base_digest=settings.base_digest,
        naming=naming,
        warnings=() if modules else ("The file holds no tensors of the method.",),
    )


def read_kept(fields: Fields, method: str, tensors: Mapping[str, TensorView], reason: str | None = None) -> Adapter:
    """Read an adapter that is not merged: every tensor as it is, with the reason, None for that of the method."""
    why = reason or obstacle_of(method)
    name = method_name(method)
    known = fields.rank("r") if is_rank(fields.content.get("r")) else None
    updates: dict[str, Update] = {each: Opaque(view, name, why, known) for each, view in sorted(tensors.items())}
    alphas = [fields.number(key) for key in ("lora_alpha", "alpha") if is_number(fields.content.get(key))]
    return Adapter(
        **_common(fields),
        method=name,
        updates=updates,
        tensors=dict(tensors),
        alpha=alphas[0] if alphas else None,
        scaling=None,
        obstacle=why,
    )


def _common(fields: Fields) -> dict[str, Any]:
    targets = fields.content.get("target_modules")
    plain = isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(each, str) for each in targets))
    return {
        "format": "peft",
        "config": fields.content,
        "target_modules": fields.names("target_modules") if plain else (),
        "task_type": fields.text("task_type"),
        "base_name": fields.text("base_model_name_or_path"),
    }
