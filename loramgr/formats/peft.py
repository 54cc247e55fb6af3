"""PEFT adapters (`adapter_config.json` and its weights), as PEFT 0.2 to 0.21 write them, read into `Adapter`.

Supported: LoRA with rsLoRA, patterns, DoRA, biases and saved modules, and trained tokens; everything else is refused
by name. Formulas and file layouts: PEFT 0.21.2, `tuners/lora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from loramgr.adapter import Adapter, LowRank, Replacement, Rows, Update
from loramgr.digests import is_digest
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields, load_configuration
from loramgr.formats.folder import CONFIGURATION, weights_file
from loramgr.formats.peft_config import PeftSettings, parse_settings
from loramgr.formats.peft_keys import Key, parse_keys
from loramgr.formats.peft_layers import Module, low_rank, rows, shift
from loramgr.formats.peft_notes import warnings
from loramgr.pickles import read_pickle
from loramgr.tensorfile import FLOAT_DTYPES, TensorView, read_header

__all__ = ["read_peft"]

# modules whose whole weight PEFT saves when the vocabulary was resized or the embedding is a target
_EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings",
    "predictions.decoder",
)  # fmt: skip
_MANY = 10


def read_peft(folder: Path) -> Adapter:
    """Read the PEFT adapter in the folder, headers only.

    Raises NotFoundError, IntegrityError for damaged files, and IncompatibleError for a method, variant, tensor or
    shape that is not supported.
    """
    path = folder / CONFIGURATION
    settings = parse_settings(Fields(path, load_configuration(path)))
    tensors, metadata = _read_weights(weights_file(folder))
    keys, unexplained = parse_keys(tensors)
    modules = _modules(keys, tensors)
    tables = _tables(keys, tensors, modules, settings, unexplained)
    _refuse_unexplained(unexplained)
    updates = _updates(modules, tables, settings)
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
    for name, view in tensors.items():
        if view.spec.dtype not in FLOAT_DTYPES:
            raise IncompatibleError(f"{path}: tensor {name!r} has the dtype {view.spec.dtype}, not a plain float")
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


def _tables(
    keys: Iterable[Key],
    tensors: Mapping[str, TensorView],
    modules: Mapping[str, Module],
    settings: PeftSettings,
    unexplained: list[str],
) -> dict[str, TensorView]:
    """Collect the whole tensors by the parameter they replace; what no rule explains goes to the list."""
    tables: dict[str, TensorView] = {}
    for key in keys:
        if key.role not in ("base", "saved"):
            continue
        if not (key.module in modules if key.role == "base" else _is_expected(key, modules, settings)):
            unexplained.append(key.name)
        elif key.target in tables:
            raise IncompatibleError(f"{key.target}: two tensors of the file take its place")
        else:
            tables[key.target] = tensors[key.name]
    return tables


def _is_expected(key: Key, modules: Mapping[str, Module], settings: PeftSettings) -> bool:
    """Say whether the configuration explains that the parameter was saved whole."""
    if _is_saved_module(key.module, settings.saved_modules):
        return key.module not in modules
    if key.parameter == "bias" and settings.bias != "none":
        return settings.bias == "all" or key.module in modules
    return any(f".{key.module}".endswith(f".{name}") for name in _EMBEDDINGS)


def _is_saved_module(module: str, saved_modules: Iterable[str]) -> bool:
    """Say whether the module or one it lies in ends with one of the names: PEFT's rule, without a dot before it."""
    parts = module.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(path.endswith(tuple(saved_modules)) for path in paths)


def _refuse_unexplained(unexplained: list[str]) -> None:
    if unexplained:
        more = f" and {len(unexplained) - _MANY} more" if len(unexplained) > _MANY else ""
        raise IncompatibleError(
            f"no rule explains these tensors: {', '.join(sorted(unexplained)[:_MANY])}{more}",
            "check modules_to_save and bias in adapter_config.json",
        )


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
        update = low_rank(module, settings.lora, tables.pop(weight, None))
        updates[weight] = update
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
    adapted = any(isinstance(update, LowRank) for update in updates.values())
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
    )
