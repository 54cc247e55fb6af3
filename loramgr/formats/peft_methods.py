"""PEFT's methods beside LoRA: what each is called, which tensors and keys it has, and why others are not merged.

Read from PEFT 0.21.2 (`tuners/*/config.py`, `utils/peft_types.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TUNERS", "Tuner", "method_name", "obstacle_of"]

_LAYERS = frozenset({"layers_to_transform", "layers_pattern", "modules_to_save", "exclude_modules"})


@dataclass(frozen=True, slots=True)
class Tuner:
    """A method whose effect on the weights is known: the roles of its tensors and the keys of its configuration."""

    roles: tuple[str, ...]
    keys: frozenset[str]


TUNERS = {
    "IA3": Tuner(
        ("ia3_l",),
        _LAYERS | {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"},
    ),
    "LOHA": Tuner(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        _LAYERS | {
            "rank_pattern", "alpha_pattern", "r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d",
            "init_weights",
        },
    ),
    "LOKR": Tuner(
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        _LAYERS | {
            "rank_pattern", "alpha_pattern", "r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d",
            "init_weights", "decompose_both", "decompose_factor", "rank_dropout_scale",
        },
    ),
    "VERA": Tuner(
        ("vera_lambda_b", "vera_lambda_d"),
        _LAYERS | {
            "r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out", "bias",
            "init_weights",
        },
    ),
    "ADALORA": Tuner(
        ("lora_A", "lora_B", "lora_E"),
        _LAYERS | {
            "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights", "rank_pattern",
            "alpha_pattern", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
            "total_step", "megatron_core", "qalora_group_size", "runtime_config",
        },
    ),
    "OFT": Tuner(
        ("oft_R", "oft_embedding_R"),
        _LAYERS | {
            "r", "oft_block_size", "module_dropout", "fan_in_fan_out", "bias", "init_weights", "coft", "eps",
            "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
        },
    ),
    "BOFT": Tuner(
        ("boft_R", "boft_s"),
        _LAYERS | {
            "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "fan_in_fan_out", "bias",
            "init_weights",
        },
    ),
    "MISS": Tuner(
        ("miss_block",),
        _LAYERS | {"r", "miss_dropout", "mini_r", "bias", "init_weights"},
    ),
    "HRA": Tuner(
        ("hra_u",),
        _LAYERS | {"r", "apply_GS", "bias", "init_weights"},
    ),
    "C3A": Tuner(
        ("c3a_kernel",),
        _LAYERS | {"block_size", "block_size_pattern", "bias", "init_weights"},
    ),
    "LN_TUNING": Tuner(("ln_tuning_layers",), _LAYERS),
}  # fmt: skip

_NAMES = {
    "PROMPT_TUNING": "prompt_tuning", "MULTITASK_PROMPT_TUNING": "prompt_tuning", "CPT": "prompt_tuning",
    "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix_tuning", "CARTRIDGE": "prefix_tuning",
}  # fmt: skip
_OBSTACLES = {
    "PROMPT_TUNING": "prompt tuning puts trained vectors before the input and changes no weight",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning puts trained vectors before the input and changes no weight",
    "CPT": "context-aware prompt tuning puts trained vectors before the input and changes no weight",
    "P_TUNING": "p-tuning puts trained vectors before the input and changes no weight",
    "PREFIX_TUNING": "prefix tuning puts trained keys and values before those of every layer and changes no weight",
    "CARTRIDGE": "a cartridge is trained keys and values before those of every layer and changes no weight",
    "ADAPTION_PROMPT": "an adaption prompt adds gated attention to trained vectors, which no weight can hold",
    "XLORA": "X-LoRA mixes other adapters by a router that looks at the input",
    "POLY": "Poly mixes several low-rank updates by a router that looks at the task",
}


def method_name(peft_type: str) -> str:
    """Return what a version's record calls the method."""
    return _NAMES.get(peft_type, peft_type.lower())


def obstacle_of(peft_type: str) -> str:
    """Return why an adapter of a method that is not in TUNERS cannot be merged."""
    known = _OBSTACLES.get(peft_type)
    return known or f"{peft_type} is a method whose effect on the weights loramgr does not compute"
