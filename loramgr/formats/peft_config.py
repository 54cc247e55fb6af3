"""The configuration of a PEFT adapter (`adapter_config.json`, PEFT 0.2 to 0.21) as settings for its reader."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loramgr.digests import is_digest
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields, is_number, is_rank
from loramgr.formats.peft_variants import LORA, TRAINABLE_TOKENS, peft_type, refuse_variants

__all__ = ["LoraSettings", "PeftSettings", "matching", "parse_settings"]

# PeftModelForSequenceClassification and its siblings add these names at load, whatever the configuration says
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
BIASES = ("none", "all", "lora_only")


def matching(patterns: Iterable[str], module: str) -> list[str]:
    """Return the patterns that the module's name ends with; PEFT (`get_pattern_key`) goes by the first one.

    A pattern is a regular expression that starts at the beginning of the name or after a dot.
    """
    return [key for key in patterns if re.match(rf"(.*\.)?({key})$", module)]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which factor of a module is block-diagonal (BD-LoRA), by parts of its name, and of how many blocks."""

    count: int
    first: tuple[str, ...]
    second: tuple[str, ...]

    def side(self, module: str) -> Literal["lora_A", "lora_B"] | None:
        """Return the block-diagonal factor of the module, None where both are whole."""
        if any(part in module for part in self.first):
            return "lora_A"
        return "lora_B" if any(part in module for part in self.second) else None


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """How the low-rank factors are to be read; rank and alpha are the general ones, before the patterns.

    `enabled` are the slices of a fused weight that have factors (`enable_lora` of PEFT before 0.3), `blocks` those of
    block-diagonal factors; None where there are none.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    enabled: tuple[bool, ...] | None = None
    blocks: Blocks | None = None

    def ranks_of(self, module: str) -> list[int]:
        """Return the ranks that the configuration leaves open for the module.

        PEFT takes the first pattern that fits, but sorts the patterns when it saves: which one was the first at
        training is not known any more, and the tensors say it.
        """
        return sorted({self.rank, *(self.rank_pattern[key] for key in matching(self.rank_pattern, module))})

    def rank_of(self, module: str) -> int:
        """Return the rank that PEFT gives the module when it reads the file, whatever the tensors say."""
        return next((self.rank_pattern[key] for key in matching(self.rank_pattern, module)), self.rank)

    def alphas_of(self, module: str) -> list[float]:
        """Return the module's alpha, which is what PEFT reads back, and the others that patterns give it after it."""
        return [self.alpha_pattern[key] for key in matching(self.alpha_pattern, module)] or [self.alpha]

    def scaling(self, alpha: float, rank: int) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, slots=True)
class PeftSettings:
    """A checked configuration.

    `lora` is None for methods without a rank and an alpha; `saved_modules` are the modules_to_save with those that the
    task implies; `token_indices` is one list for every embedding, or a list per module name, None without trained
    tokens; `target_pattern` is the regular expression that stood in place of a list of modules, else None.
    """

    fields: Fields
    lora: LoraSettings | None
    target_modules: tuple[str, ...]
    target_pattern: str | None
    saved_modules: tuple[str, ...]
    bias: str
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
    ensure_weight_tying: bool
    base_digest: str | None


def parse_settings(fields: Fields) -> PeftSettings:
    """Check a configuration and return what its reader needs.

    Raises IncompatibleError for a method or variant that is not supported and for values that mean nothing.
    """
    method = peft_type(fields)
    refuse_variants(fields, method)
    fields.text("base_model_name_or_path")
    return PeftSettings(
        fields=fields,
        lora=_lora_settings(fields) if method == LORA else _rank_settings(fields) if method in _RANKED else None,
        target_modules=fields.names("target_modules"),
        target_pattern=_target_pattern(fields),
        saved_modules=_saved_modules(fields),
        bias=_bias(fields),
        token_indices=_token_indices(
            fields, "token_indices" if method == TRAINABLE_TOKENS else "trainable_token_indices"
        ),
        ensure_weight_tying=fields.flag("ensure_weight_tying"),
        base_digest=_base_digest(fields),
    )


def _lora_settings(fields: Fields) -> LoraSettings:
    settings = LoraSettings(
        rank=fields.rank("r"),
        alpha=fields.number("lora_alpha"),
        rank_pattern=_rank_pattern(fields),
        alpha_pattern=_alpha_pattern(fields),
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        lora_bias=fields.flag("lora_bias"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        enabled=_enabled(fields),
        blocks=_blocks(fields),
    )
    if settings.lora_bias and settings.use_dora:
        raise IncompatibleError(f"{fields.path}: lora_bias and use_dora together are not supported")
    return settings


def _enabled(fields: Fields) -> tuple[bool, ...] | None:
    value = fields.content.get("enable_lora")
    if not value:
        return None
    if not (isinstance(value, list) and all(isinstance(each, bool) for each in value) and any(value)):
        raise fields.refused("enable_lora", "a list of true and false with one true at least")
    return tuple(value)


def _blocks(fields: Fields) -> Blocks | None:
    value = fields.mapping("use_bdlora")
    if not value:
        return None
    inner = Fields(fields.path, value)
    unknown = sorted(value.keys() - {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"})
    if unknown:
        raise fields.refused("use_bdlora", f"without the unknown key {unknown[0]!r}")
    count = inner.rank("nblocks")
    return Blocks(count, inner.names("target_modules_bd_a"), inner.names("target_modules_bd_b"))


_RANKED = ("LOHA", "LOKR")


def _rank_settings(fields: Fields) -> LoraSettings:
    return LoraSettings(fields.rank("r"), fields.number("alpha"), _rank_pattern(fields), _alpha_pattern(fields))


def _rank_pattern(fields: Fields) -> dict[str, int]:
    pattern = fields.mapping("rank_pattern")
    _check_patterns(fields, "rank_pattern", pattern)
    if not all(map(is_rank, pattern.values())):
        raise fields.refused("rank_pattern", "an object of whole numbers above 0")
    return pattern


def _alpha_pattern(fields: Fields) -> dict[str, float]:
    pattern = fields.mapping("alpha_pattern")
    _check_patterns(fields, "alpha_pattern", pattern)
    if not all(map(is_number, pattern.values())):
        raise fields.refused("alpha_pattern", "an object of numbers")
    return {key: float(value) for key, value in pattern.items()}


def _check_patterns(fields: Fields, key: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise IncompatibleError(f"{fields.path}: {key}: {pattern!r} is no regular expression: {error}") from error


def _target_pattern(fields: Fields) -> str | None:
    value, excluded = fields.content.get("target_modules"), fields.content.get("exclude_modules")
    if isinstance(excluded, str):
        _check_patterns(fields, "exclude_modules", [excluded])
    if not isinstance(value, str) or value == "all-linear":
        return None
    _check_patterns(fields, "target_modules", [value])
    return value


def _saved_modules(fields: Fields) -> tuple[str, ...]:
    implied = TASK_HEADS.get(fields.text("task_type") or "", ())
    return tuple(dict.fromkeys((*fields.names("modules_to_save"), *implied)))


def _bias(fields: Fields) -> str:
    bias = fields.text("bias") or "none"
    if bias not in BIASES:
        raise fields.refused("bias", f"one of {', '.join(BIASES)}")
    return bias


def _token_indices(fields: Fields, key: str) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    value = fields.content.get(key)
    if value is None:
        return None
    if isinstance(value, dict):
        return {module: _indices(fields, key, indices) for module, indices in value.items()}
    return _indices(fields, key, value)


def _indices(fields: Fields, key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(index) is int and index >= 0 for index in value):
        raise fields.refused(key, "a list of token indices, or such a list for each module")
    if len(set(value)) != len(value):
        raise fields.refused(key, "without an index that stands twice")
    return tuple(value)


def _base_digest(fields: Fields) -> str | None:
    digest = fields.text("base_digest")
    if digest is not None and not is_digest(digest):
        raise fields.refused("base_digest", "a digest, sha256: and 64 hex digits")
    return digest
