"""The tensor names that PEFT writes, taken apart: module, role, and adapter name where one is left in the key.

PEFT removes the adapter's name when it saves (`lora_A.default.weight` becomes `lora_A.weight`); other writers leave it
in. Names are relative to the trained model: `base_model.model.` is stripped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loramgr.errors import IncompatibleError

__all__ = ["Key", "Role", "parse_keys"]

Role = Literal[
    "lora_A", "lora_B", "embedding_A", "embedding_B", "lora_bias", "magnitude", "rows", "base", "copy", "saved"
]

PREFIX = "base_model.model."
_NAMED = r"(?:\.(?P<adapter>[^.]+))?"
_PATTERNS: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(rf"(?P<module>.+)\.lora_A{_NAMED}\.weight"), "lora_A"),
    (re.compile(rf"(?P<module>.+)\.lora_B{_NAMED}\.weight"), "lora_B"),
    (re.compile(rf"(?P<module>.+)\.lora_B{_NAMED}\.bias"), "lora_bias"),
    (re.compile(rf"(?P<module>.+)\.lora_embedding_A{_NAMED}"), "embedding_A"),
    (re.compile(rf"(?P<module>.+)\.lora_embedding_B{_NAMED}"), "embedding_B"),
    (
        re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"),
        "magnitude",
    ),
    (re.compile(rf"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_NAMED}"), "rows"),
    (re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<parameter>weight|bias)"), "base"),
)
_FOREIGN = re.compile(r"(?:^|\.)(?:lora_|base_layer\.|token_adapter\.|trainable_tokens_)")


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor's name: the `parameter` of `module` that it is, or belongs to, in the trained model.

    `role` says what it is there: a factor, a bias or rows of an update; `base`, the wrapped layer's own parameter;
    `saved`, a parameter that replaces the model's; `copy`, a second copy of a saved parameter, which PEFT ignores.
    """

    name: str
    module: str
    role: Role
    parameter: str = "weight"

    @property
    def target(self) -> str:
        """The parameter's full name in the trained model."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def parse_keys(names: Iterable[str]) -> tuple[list[Key], list[str]]:
    """Take the names apart; the second list holds those that no rule of PEFT's explains.

    Raises IncompatibleError for nested wrappers (`nn.MultiheadAttention`, target_parameters, a saved module inside a
    saved module) and for the tensors of more than one adapter.
    """
    keys: list[Key] = []
    adapters: dict[str | None, str] = {}
    unmatched: list[str] = []
    unexplained: list[str] = []
    for name in sorted(names):
        if not name.startswith(PREFIX):
            unexplained.append(name)
        elif (parsed := _wrapped(name)) is None:
            unmatched.append(name)
        else:
            key, adapter = parsed
            keys.append(key)
            if key.role != "base":
                adapters.setdefault(adapter, name)
    adapter = _only_adapter(adapters)
    for name in unmatched:
        saved = _saved(name, adapter or "default")
        if saved is None:
            unexplained.append(name)
        else:
            keys.append(saved)
    return _without_copies(keys, unexplained), sorted(unexplained)


def _wrapped(name: str) -> tuple[Key, str | None] | None:
    """Return a key of LoRA's or of trained tokens with the adapter's name in it; None for every other key."""
    for pattern, role in _PATTERNS:
        if match := pattern.fullmatch(name, len(PREFIX)):
            found = match.groupdict()
            module = found["module"]
            parameter = "bias" if role == "lora_bias" else found.get("parameter", "weight")
            _refuse_nested(name, module)
            return Key(name, module, role, parameter), found.get("adapter")
    return None


def _refuse_nested(name: str, module: str) -> None:
    if f".{module}.".find(".base_layer.") >= 0:
        raise IncompatibleError(f"{name}: a wrapper inside a wrapper (target_parameters) is not supported")


def _only_adapter(adapters: dict[str | None, str]) -> str | None:
    if len(adapters) > 1:
        examples = ", ".join(repr(adapters[adapter]) for adapter in sorted(adapters, key=str))
        raise IncompatibleError(
            f"the tensors do not agree on one adapter's name: {examples}", "save each adapter to a folder of its own"
        )
    return next(iter(adapters), None)


def _saved(name: str, adapter: str) -> Key | None:
    """Return the key of a parameter that replaces the model's; None where it is a piece of something unknown.

    PEFT 0.21.2 writes `M.original_module.bias` and `M.modules_to_save.bias` beside `M.bias` for bias "all", and does
    not read them back.
    """
    path = name.removeprefix(PREFIX)
    if _FOREIGN.search(path):
        return None
    role: Role = "saved"
    if ".original_module." in path:
        path, role = path.replace(".original_module.", ".", 1), "copy"
    elif f".modules_to_save.{adapter}." in path:
        path = path.replace(f".modules_to_save.{adapter}.", ".", 1)
    elif ".modules_to_save." in path:
        path, role = path.replace(".modules_to_save.", ".", 1), "copy"
    module, _, parameter = path.rpartition(".")
    return Key(name, module, role, parameter)


def _without_copies(keys: list[Key], unexplained: list[str]) -> list[Key]:
    """Drop the copies of parameters that are there themselves; a copy alone explains nothing."""
    saved: dict[str, Key] = {}
    for key in keys:
        if key.role == "saved" and key.target in saved:
            raise IncompatibleError(
                f"{key.name} and {saved[key.target].name} both replace {key.target}: "
                "a saved module inside a saved module is not supported",
                "name only the outer one in modules_to_save",
            )
        if key.role == "saved":
            saved[key.target] = key
    unexplained += [key.name for key in keys if key.role == "copy" and key.target not in saved]
    return [key for key in keys if key.role != "copy"]
