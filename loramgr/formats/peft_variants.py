"""What PEFT can write and loramgr does not read: refused by name, never taken for plain LoRA.

Read from PEFT 0.21.2 (`tuners/lora/config.py`, `tuners/lora/layer.py`). An older reader drops keys it does not know
and so turns a new variant silently into plain LoRA; here an unknown key that is set is an error.
"""

from __future__ import annotations

from typing import Any

from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_methods import TUNERS

__all__ = [
    "LORA",
    "TRAINABLE_TOKENS",
    "base_changing",
    "kept_whole",
    "obstacle_of_variant",
    "peft_type",
    "reason_of_changed_base",
    "refuse_variants",
]

LORA = "LORA"
TRAINABLE_TOKENS = "TRAINABLE_TOKENS"

_GENERAL_KEYS = frozenset({
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "base_digest",
})  # fmt: skip
_KNOWN_KEYS = {
    LORA: _GENERAL_KEYS | {
        "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
        "exclude_modules", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "megatron_core", "trainable_token_indices", "eva_config", "corda_config", "lora_ga_config",
        "use_dora", "qalora_group_size", "runtime_config", "lora_bias", "ensure_weight_tying", "merge_weights",
        "target_parameters", "use_bdlora", "enable_lora", "velora_config", "monteclora_config",
        "alora_invocation_tokens", "layer_replication", "use_qalora", "arrow_config", "kasa_config",
    },
    TRAINABLE_TOKENS: _GENERAL_KEYS | {"token_indices", "init_weights"},
    **{name: _GENERAL_KEYS | tuner.keys for name, tuner in TUNERS.items()},
}  # fmt: skip

_OBSTACLES = {
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens, which no weight can hold",
    "layer_replication": "layer_replication gives the layers more updates than the base has weights",
    "use_qalora": "QALoRA pools the inputs of its layers, which no weight can hold",
    "arrow_config": "Arrow mixes other adapters by a router that looks at the input",
}
_REFUSED_KEYS = {
    "megatron_config": "Megatron's parallel layers",
    "loftq_config": "LoftQ, which trains on a base quantized and changed at the start",
}

_BASE_CHANGING = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
_CHANGED = (
    "changes the base at the start of training, so the trained model is not the base plus scaling * lora_B lora_A"
)
_SUBTRACT = (
    "loramgr add PATH --initial INITIAL, the adapter as PEFT saved it before the training, or of PiSSA and OLoRA "
    "--initial base, which computes it of the base; or have PEFT convert it: "
    "model.save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL)"
)
_NEXT = {"loftq": "merge it with PEFT: what quantizing changed in the base is in no adapter, the initial one neither"}
_PLAIN_INITS = frozenset({"eva", "orthogonal"})
_PLAIN_INITS_ANY_CASE = frozenset({"gaussian", "mica"})  # PEFT compares these two in lower case, the others as they are


def peft_type(fields: Fields) -> str:
    """Return the configuration's method, in capitals; IncompatibleError where it says none."""
    content = fields.content
    if "fine_tune_type" in content and "peft_type" not in content:
        raise IncompatibleError(f"{fields.path}: an adapter of MLX (mlx-lm), which loramgr does not read")
    value = content.get("peft_type")
    if not isinstance(value, str) or not value:
        raise IncompatibleError(
            f"{fields.path}: no peft_type, so this is not the configuration of a PEFT adapter",
            "save the adapter with PEFT's save_pretrained",
        )
    return value.upper()


def kept_whole(fields: Fields) -> tuple[str, str] | None:
    """Return method and reason for a variant whose tensors are not taken apart, None for every other."""
    if _is_unset(fields.content.get("kasa_config")):
        return None
    return "KASA", "KaSA truncates the base's weights first, which cannot be taken back"


def obstacle_of_variant(fields: Fields, method: str) -> str | None:
    """Return why an adapter of LoRA or of a tuner cannot be merged, None where it can."""
    if method == LORA:
        return next((why for key, why in _OBSTACLES.items() if not _is_unset(fields.content.get(key))), None)
    if method == "MISS" and fields.content.get("init_weights") == "bat":
        return "the variant bat of MiSS multiplies blocks of the weight with each other, which loramgr does not compute"
    return None


def refuse_variants(fields: Fields, method: str) -> None:
    """Raise IncompatibleError for a variant that is not read, and for a key that nobody knows, unless it is empty."""
    for key, value in fields.content.items():
        if key in _KNOWN_KEYS[method] or _is_unset(value):
            continue
        if key in _REFUSED_KEYS:
            raise IncompatibleError(f"{fields.path}: {key} is set: loramgr does not support {_REFUSED_KEYS[key]}")
        raise IncompatibleError(
            f"{fields.path}: the key {key!r} with the value {value!r} is not known, and what it changes neither",
            "upgrade loramgr, or remove the key where you know that it changes nothing",
        )
    _refuse_init(fields)


def base_changing(fields: Fields) -> str | None:
    """Return the initialisation that changed the base and that an initial adapter takes back, None for every other.

    Raises IncompatibleError for LoftQ, which quantized the base as well.
    """
    init = fields.content.get("init_lora_weights")
    said = init.lower() if isinstance(init, str) else ""
    found = next((prefix for prefix in _BASE_CHANGING if said.startswith(prefix)), None)
    if found in _NEXT:
        _refuse_init(fields)
    return found


def reason_of_changed_base(fields: Fields) -> str | None:
    """Return why only the base that the training changed fits the adapter, and what to do; None for every other."""
    init = fields.content.get("init_lora_weights")
    said = init.lower() if isinstance(init, str) else ""
    if not _is_unset(fields.content.get("loftq_config")):
        said = "loftq"
    found = next((prefix for prefix in _BASE_CHANGING if said.startswith(prefix)), None)
    return None if found is None else f"{_BASE_CHANGING[found]} {_CHANGED}; {_NEXT.get(found, _SUBTRACT)}"


def _is_unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _refuse_init(fields: Fields) -> None:
    init = fields.content.get("init_lora_weights")
    if init is None or isinstance(init, bool):
        return
    if not isinstance(init, str):
        raise fields.refused("init_lora_weights", "true, false or the name of an initialisation")
    for prefix, name in _BASE_CHANGING.items():
        if init.lower().startswith(prefix):
            raise IncompatibleError(
                f"{fields.path}: init_lora_weights {init!r}: {name} {_CHANGED}",
                _NEXT.get(prefix, _SUBTRACT),
            )
    if init not in _PLAIN_INITS and init.lower() not in _PLAIN_INITS_ANY_CASE:
        raise IncompatibleError(
            f"{fields.path}: init_lora_weights {init!r} is not known, nor whether it changes the base"
        )
