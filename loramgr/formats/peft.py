"""PEFT adapters (`adapter_config.json` and its weights), as PEFT 0.2 to 0.21 write them, read into `Adapter`.

LoRA with its variants and trained tokens here, other methods in `peft_others`; what loramgr cannot merge is kept with
the reason. Formulas and file layouts: PEFT 0.21.2, `tuners/lora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from loramgr.adapter import Adapter, Decomposed, LowRank, Opaque, Replacement, Rows, Update
from loramgr.digests import is_digest
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields, load_configuration
from loramgr.formats.folder import CONFIGURATION, weights_file
from loramgr.formats.peft_config import PeftSettings, parse_settings
from loramgr.formats.peft_keys import Key, parse_keys
from loramgr.formats.peft_layers import Module, decomposed, grouped, low_rank, rows, shift
from loramgr.formats.peft_methods import TUNERS
from loramgr.formats.peft_nested import Nested, take_nested
from loramgr.formats.peft_notes import warnings
from loramgr.formats.peft_others import check_floats, read_kept, read_tuner
from loramgr.formats.peft_tables import refuse_unexplained, tables_of
from loramgr.formats.peft_variants import LORA, TRAINABLE_TOKENS, kept_whole, obstacle_of_variant, peft_type
from loramgr.pickles import read_pickle
from loramgr.tensorfile import TensorView, read_header

__all__ = ["load_parts", "read_parts", "read_peft"]


def read_peft(folder: Path) -> Adapter:
    """Read the PEFT adapter in the folder, headers only.

    Raises NotFoundError, IntegrityError for damaged files, and IncompatibleError for a method, variant, tensor or
    shape that is not supported.
    """
    return read_parts(*load_parts(folder))


def load_parts(folder: Path) -> tuple[Fields, dict[str, TensorView], dict[str, str]]:
    """Return the configuration, the tensors and their metadata; raises as `read_peft`, for damage alone."""
    path = folder / CONFIGURATION
    fields = Fields(path, load_configuration(path))
    return fields, *_read_weights(weights_file(folder))


def read_parts(fields: Fields, tensors: dict[str, TensorView], metadata: Mapping[str, str]) -> Adapter:
    """Read an adapter from its configuration, its tensors and their metadata; raises IncompatibleError."""
    method = peft_type(fields)
    if method in TUNERS:
        return read_tuner(fields, method, tensors)
    if method not in (LORA, TRAINABLE_TOKENS):
        return read_kept(fields, method, tensors)
    settings = parse_settings(fields)
    if (reason := kept_whole(fields)) is not None:
        return read_kept(fields, reason[0], tensors, reason[1])
    check_floats(fields, tensors)
    nested = take_nested(fields, settings.lora, tensors) if settings.lora is not None else Nested({}, frozenset())
    plain = {name: view for name, view in tensors.items() if name not in nested.used}
    keys, unexplained = parse_keys(plain)
    modules = _modules(keys, plain)
    tables = tables_of(keys, plain, modules, settings, unexplained)
    refuse_unexplained(unexplained)
    updates = dict(sorted((_updates(modules, tables, settings) | nested.updates).items()))
    return _adapter(settings, updates, tensors, _recorded_base(settings, metadata))


def _read_weights(path: Path) -> tuple[dict[str, TensorView], dict[str, str]]:
    tensors: dict[str, TensorView]
    if path.suffix == ".safetensors":
        header = read_header(path)
        tensors, metadata = dict(header.tensors), header.metadata or {}
    else:
        tensors, metadata = dict(read_pickle(path)), {}
    if not tensors:
        raise IncompatibleError(f"{path}: holds no tensors")
    return tensors, metadata


def _modules(keys: Iterable[Key], tensors: Mapping[str, TensorView]) -> dict[str, Module]:
    """Collect the tensors of every module with factors or token rows, by its name."""
    modules: dict[str, Module] = {}
    for key in keys:
        if key.role in ("base", "saved"):
            continue
        module = modules.setdefault(key.module, Module(key.module))
        if key.role in module.tensors:
            raise module.refused(f"{key.role} stands in the file twice")
        module.tensors[key.role] = tensors[key.name]
    return modules


def _updates(modules: Mapping[str, Module], tables: dict[str, TensorView], settings: PeftSettings) -> dict[str, Update]:
    """Turn modules and whole tensors into one update per parameter."""
    updates: dict[str, Update] = {}
    for name, module in modules.items():
        weight, bias = f"{name}.weight", f"{name}.bias"
        if module.has_rows:
            updates[weight] = rows(module, _indices(module, settings), tables.pop(weight, None))
        if not module.has_factors:
            continue
        if settings.lora is None or module.has_rows:
            raise module.refused("factors of LoRA, where the configuration has only trained tokens")
        if (parts := grouped(module)) is not None:
            updates |= parts
            continue
        update = low_rank(module, settings.lora, tables.pop(weight, None))
        updates[weight] = decomposed(module, update)
        if "lora_bias" in module.tensors and (moved := shift(module, update.scaling, tables.pop(bias, None))):
            updates[bias] = moved
    updates.update((target, Replacement(tensor)) for target, tensor in tables.items())
    return dict(sorted(updates.items()))


def _indices(module: Module, settings: PeftSettings) -> tuple[int, ...]:
    """Return the indices of the module's trained rows.

    A module that the configuration does not name is one tied to those it names, and has their rows.
    """
    indices = settings.token_indices
    if indices is None:
        raise module.refused("trained token rows, and no indices in the configuration")
    if isinstance(indices, tuple):
        return indices
    found = {listed for name, listed in indices.items() if module.name.endswith(name)} or set(indices.values())
    if len(found) != 1:
        raise module.refused("the configuration does not say which indices its trained rows have")
    return found.pop()


def _keeps_ties(settings: PeftSettings, updates: Mapping[str, Update]) -> bool:
    """Say whether tied parameters stay one: as the configuration asks, and for trained tokens with one list.

    PEFT ties the adapters of trained tokens wherever the model ties the weights, unless their indices differ.
    """
    indices = {update.indices for update in updates.values() if isinstance(update, Rows)}
    return settings.ensure_weight_tying or len(indices) == 1


def _recorded_base(settings: PeftSettings, metadata: Mapping[str, str]) -> str | None:
    """Return the digest of the base that the weights' metadata or the configuration records, else None."""
    recorded = metadata.get("base_digest")
    if recorded is None:
        return settings.base_digest
    if not is_digest(recorded):
        raise IncompatibleError(f"the metadata's base_digest {recorded!r} is not a digest, sha256: and 64 hex digits")
    if settings.base_digest not in (None, recorded):
        raise IncompatibleError(
            f"the weights record the base {recorded}, the configuration the base {settings.base_digest}"
        )
    return recorded


def _adapter(
    settings: PeftSettings,
    updates: dict[str, Update],
    tensors: dict[str, TensorView],
    base_digest: str | None,
) -> Adapter:
    lora, fields = settings.lora, settings.fields
    adapted = any(isinstance(update, LowRank | Decomposed) for update in updates.values())
    kept = next((update.reason for update in updates.values() if isinstance(update, Opaque)), None)
    method = "trainable_tokens" if lora is None else "dora" if lora.use_dora and adapted else "lora"
    return Adapter(
        format="peft",
        method=method,
        config=fields.content,
        updates=updates,
        tensors=tensors,
        alpha=None if lora is None else lora.alpha,
        scaling=None if lora is None else lora.scaling(lora.alpha, lora.rank),
        target_modules=settings.target_modules,
        task_type=fields.text("task_type"),
        base_name=fields.text("base_model_name_or_path"),
        base_digest=base_digest,
        keeps_ties=_keeps_ties(settings, updates),
        warnings=warnings(settings, updates),
        obstacle=obstacle_of_variant(fields, LORA) or kept,
    )
