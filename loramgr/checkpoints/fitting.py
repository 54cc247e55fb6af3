"""Updates that only the base completes: square experts' matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loramgr.adapter import Experts
from loramgr.checkpoints.shapes import Pair
from loramgr.errors import IncompatibleError

__all__ = ["turned_experts"]

_TURNED_TYPES = frozenset({"gpt_oss", "llama4", "llama4_text"})  # models that store experts as (in, out)


def turned_experts(pairs: Mapping[str, Pair], config: Mapping[str, Any] | None) -> dict[str, Pair]:
    """Return the pairs with the layout of square experts known: that of others, of the model, of the PEFT that wrote.

    Raises IncompatibleError, naming the parameter, where none of these tells.
    """
    others = {
        _is_turned(pair.update, pair.spec.shape)
        for pair in pairs.values()
        if isinstance(pair.update, Experts) and not _is_square(pair.update)
    }
    found = dict(pairs)
    for name, pair in pairs.items():
        update = pair.update
        if isinstance(update, Experts) and _is_square(update):
            turned = next(iter(others)) if len(others) == 1 else update.transposed
            if not others and (config or {}).get("model_type") in _TURNED_TYPES:
                turned = True
            if turned is None:
                raise IncompatibleError(
                    f"{pair.spec.name}: ambiguous layout: the experts are square, and nothing says whether they are "
                    "stored as (out, in) or (in, out)",
                    "write the version of PEFT that saved it into adapter_config.json as peft_version",
                )
            found[name] = Pair(replace(update, transposed=turned), pair.spec)
    return found


def _is_square(update: Experts) -> bool:
    return update.lora_A.spec.shape[2] == update.lora_B.spec.shape[1]


def _is_turned(update: Experts, shape: tuple[int, ...]) -> bool:
    return shape[1:] == (update.lora_A.spec.shape[2], update.lora_B.spec.shape[1])
