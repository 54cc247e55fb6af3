"""Adapters of diffusers: one file with dotted names, in four spellings, with or without `lora_adapter_metadata`.

Sources: diffusers 0.42 `utils/state_dict_utils.py`, `utils/peft_utils.py`, `loaders/lora_base.py`. The oldest spelling
names attention processors (`attn1.processor.to_k_lora.down.weight`), later ones the layers (`to_k.lora.down.weight`,
`q_proj.lora_linear_layer.down.weight`), today's is PEFT's without `base_model.model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loramgr.adapter import Adapter, Decomposed, LowRank, Shift, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields, parse_object
from loramgr.formats.evidence import Evidence, counted
from loramgr.formats.files import AdapterFiles
from loramgr.formats.foreign_names import component_of
from loramgr.formats.hints import ReadHints
from loramgr.formats.layers import Source, adapter_of, checked_tensors
from loramgr.formats.peft_config import PeftSettings, parse_settings
from loramgr.formats.peft_keys import PREFIX
from loramgr.formats.suffixed_keys import DIFFUSERS_ROLES, KOHYA_ROLES, Module, modules_of, split_name, unexplained
from loramgr.tensorfile import TensorView

__all__ = ["ADDED", "METADATA", "detect", "read_diffusers"]

METADATA = "lora_adapter_metadata"
ADDED = "loramgr_component"  # metadata of files that loramgr wrote: a component that the names have only there
_FACTORS = frozenset({"down", "up"})
_DIALECTS = (
    ("_lora.down.weight", "attention processors"),
    (".lora_linear_layer.down.weight", "lora_linear_layer"),
    (".lora.down.weight", "lora.down and lora.up"),
    (".lora_A.weight", "PEFT's names"),
)
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def detect(files: AdapterFiles) -> Evidence | None:
    """Return what was seen of diffusers' names; None where no factor has them, or a configuration is there."""
    if files.configuration is not None or files.gguf is not None:
        return None
    names = [name for name in files.tensors if _is_factor(name)]
    if not names:
        return None
    found = [counted(names, "named as diffusers does")]
    if METADATA in files.metadata:
        found.append(f"{METADATA} in the header")
    dialect = next((said for suffix, said in _DIALECTS if any(name.endswith(suffix) for name in names)), None)
    return Evidence("diffusers", dialect, tuple(found), read_diffusers)


def _is_factor(name: str) -> bool:
    parts = split_name(name, DIFFUSERS_ROLES)
    is_kohyas = split_name(name, KOHYA_ROLES) is not None
    return parts is not None and parts[1] in _FACTORS and not is_kohyas and not name.startswith(PREFIX)


def read_diffusers(files: AdapterFiles, hints: ReadHints) -> Adapter:
    """Read the file of diffusers, its header and the alphas; it needs no hints.

    Without alphas every module has the scaling 1, as diffusers has it. Raises IntegrityError for damaged files and
    metadata, and IncompatibleError for tensors, shapes and names that no rule explains.
    """
    tensors = checked_tensors(files)
    modules, left = modules_of(tensors, DIFFUSERS_ROLES, _layer_names(tensors))
    if left:
        raise unexplained(left)
    return _without_added(files, _read(files, modules))


def _without_added(files: AdapterFiles, adapter: Adapter) -> Adapter:
    """Return the adapter without the component that loramgr put before the names of a model that had none."""
    added = files.metadata.get(ADDED)
    if added is None:
        return adapter
    if not all(name.startswith(added) and len(name) > len(added) for name in adapter.updates) or not added:
        raise IncompatibleError(f"{files.weights}: {ADDED} in the metadata is {added!r}, not a start of all names")
    return replace(
        adapter, updates={name.removeprefix(added): update for name, update in adapter.updates.items()}, naming=None
    )


def _read(files: AdapterFiles, modules: Mapping[str, Module]) -> Adapter:
    if METADATA not in files.metadata:
        return adapter_of(Source("diffusers", files), modules)
    noted = parse_object(f"{files.weights}: {METADATA}", files.metadata[METADATA].encode())
    settings = _settings(files, modules, noted)
    read = adapter_of(Source("diffusers", files, config=noted, target_modules=_targets(settings), ranks=None), modules)
    scaled = {name: _scaled(name, update, settings) for name, update in read.updates.items()}
    updates = {name: _shifted(name, update, scaled) for name, update in scaled.items()}
    general = next(iter(settings.values()))
    assert general.lora is not None
    return replace(
        read,
        updates=updates,
        alpha=general.lora.alpha,
        scaling=general.lora.scaling(general.lora.alpha, general.lora.rank),
        base_name=general.fields.text("base_model_name_or_path"),
        warnings=(),
    )


def _layer_names(tensors: Mapping[str, TensorView]) -> dict[str, str]:
    """Return the layer of every name that is one of an attention processor's, or of a text encoder's old spelling."""
    names = {}
    for name in tensors:
        parts = split_name(name, DIFFUSERS_ROLES)
        if parts is None:
            continue
        path = parts[0].replace(".processor.", ".")
        is_old = f"{parts[0]}_lora.down.weight" in tensors or f"{parts[0]}_lora.up.weight" in tensors
        if is_old:
            parent, _, leaf = path.rpartition(".")
            if parent.endswith("self_attn"):
                leaf = _TEXT_PROJECTIONS.get(leaf, leaf)
            path = f"{parent}.{leaf}.0" if leaf == "to_out" else f"{parent}.{leaf}"
        names[parts[0]] = path
    return names


def _settings(
    files: AdapterFiles, modules: Mapping[str, Module], noted: Mapping[str, object]
) -> dict[str, PeftSettings]:
    """Return the configuration of every component by its prefix; raises as `parse_settings`, and for none."""
    settings: dict[str, PeftSettings] = {}
    for component in sorted({component_of(name, ".") for name in modules}):
        own = {key.removeprefix(component): value for key, value in noted.items() if key.startswith(component)}
        prefix = component if own else ""
        if not own and any("." in key for key in noted):
            named = component.rstrip(".") or "modules without a component"
            raise IncompatibleError(
                f"{files.weights}: {METADATA} says nothing of {named}, and the file holds tensors of it: their alpha "
                "is not known"
            )
        parsed = parse_settings(Fields(files.weights, own if prefix or not component else dict(noted)))
        if parsed.lora is None:
            raise IncompatibleError(f"{files.weights}: {METADATA} is not about LoRA")
        settings[component] = parsed
    with_alpha = sorted(name for name, module in modules.items() if "alpha" in module.tensors)
    if with_alpha:
        raise IncompatibleError(f"{with_alpha[0]}: the file holds its alpha, and {METADATA} another")
    return settings


def _targets(settings: Mapping[str, PeftSettings]) -> tuple[str, ...]:
    return tuple(sorted({name for each in settings.values() for name in each.target_modules}))


def _scaled(name: str, update: Update, settings: Mapping[str, PeftSettings]) -> Update:
    """Return the update with the alpha and scaling that its component's configuration gives its module."""
    component = component_of(name, ".")
    lora = settings[component].lora
    module = name.removeprefix(component).rpartition(".")[0]
    if lora is None or not isinstance(update, LowRank | Decomposed):
        return update
    inner = update.inner if isinstance(update, Decomposed) else update
    if not isinstance(inner, LowRank):
        return update
    _check(name, update, inner, settings[component], lora.ranks_of(module))
    alpha = lora.alphas_of(module)[0]
    scaled = replace(inner, alpha=alpha, scaling=lora.scaling(alpha, inner.rank))
    return replace(update, inner=scaled) if isinstance(update, Decomposed) else scaled


def _shifted(name: str, update: Update, scaled: Mapping[str, Update]) -> Update:
    """Return a bias of lora_B with the scaling of its module's factors, every other update as it is."""
    if not isinstance(update, Shift) or not update.vector.spec.name.endswith(".lora_B.bias"):
        return update
    factors = scaled[f"{name.removesuffix('.bias')}.weight"]
    inner = factors.inner if isinstance(factors, Decomposed) else factors
    return replace(update, scaling=inner.scaling) if isinstance(inner, LowRank) else update


def _check(name: str, update: Update, inner: LowRank, settings: PeftSettings, ranks: list[int]) -> None:
    if inner.rank not in ranks:
        said = " or ".join(map(str, ranks))
        raise IncompatibleError(f"{name}: lora_A has rank {inner.rank}, {METADATA} says {said}")
    has_magnitude = isinstance(update, Decomposed) or inner.magnitude is not None
    if settings.lora is not None and settings.lora.use_dora != has_magnitude:
        raise IncompatibleError(f"{name}: use_dora in {METADATA} does not fit the tensors")
