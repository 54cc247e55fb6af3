"""Adapters of PEFT's methods beside LoRA, read into `Adapter`: merged where the mathematics is known, else kept whole.

What is kept whole is described tensor by tensor and says why it is not merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loramgr.adapter import Adapter, LowRank, Naming, Opaque, Replacement, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields, is_number, is_rank
from loramgr.formats.peft_config import PeftSettings, parse_settings
from loramgr.formats.peft_keys import parse_keys
from loramgr.formats.peft_methods import method_name, obstacle_of
from loramgr.formats.peft_miss import read_miss
from loramgr.formats.peft_tables import refuse_unexplained, tables_of
from loramgr.formats.peft_tuners import split_tensors, updates_of
from loramgr.formats.peft_variants import obstacle_of_variant, peft_type
from loramgr.formats.peft_vera import read_vera
from loramgr.tensorfile import FLOAT_DTYPES, TensorView

__all__ = ["check_floats", "read_kept", "read_tuner"]


def read_tuner(fields: Fields, method: str, tensors: dict[str, TensorView]) -> Adapter:
    """Read an adapter of one of `TUNERS`; raises IncompatibleError for what does not make updates of it."""
    settings = parse_settings(fields)
    reason = obstacle_of_variant(fields, method)
    if reason is not None:
        return read_kept(fields, method, tensors, reason)
    check_floats(fields, tensors)
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
    alpha, scaling = _alpha_and_scaling(settings, updates)
    return Adapter(
        **_common(fields),
        method=method_name(method),
        updates=dict(sorted(updates.items())),
        tensors=tensors,
        alpha=alpha,
        scaling=scaling,
        base_digest=settings.base_digest,
        naming=naming,
        warnings=() if modules else ("The file holds no tensors of the method.",),
    )


def _alpha_and_scaling(settings: PeftSettings, updates: Mapping[str, Update]) -> tuple[float | None, float | None]:
    """Return the general alpha and scaling; AdaLoRA's are those of its modules, VeRA has none."""
    lora = settings.lora
    if lora is not None:
        return lora.alpha, lora.scaling(lora.alpha, lora.rank)
    is_ranked = peft_type(settings.fields) == "ADALORA"
    pairs = {(each.alpha, each.scaling) for each in updates.values() if is_ranked and isinstance(each, LowRank)}
    return pairs.pop() if len(pairs) == 1 else (None, None)


def check_floats(fields: Fields, tensors: Mapping[str, TensorView]) -> None:
    """Raise IncompatibleError, naming the tensor, for one that is to be computed with and is no plain float."""
    for name, view in tensors.items():
        if view.spec.dtype not in FLOAT_DTYPES:
            raise IncompatibleError(
                f"{fields.path.parent}: tensor {name!r} has the dtype {view.spec.dtype}, not a plain float"
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


def _text(fields: Fields, key: str) -> str | None:
    """Return a text, None for anything else: what is only kept is not refused for what its configuration says."""
    value = fields.content.get(key)
    return value if isinstance(value, str) and value else None


def _common(fields: Fields) -> dict[str, Any]:
    targets = fields.content.get("target_modules")
    plain = isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(each, str) for each in targets))
    return {
        "format": "peft",
        "config": fields.content,
        "target_modules": fields.names("target_modules") if plain else (),
        "task_type": _text(fields, "task_type"),
        "base_name": _text(fields, "base_model_name_or_path"),
    }
