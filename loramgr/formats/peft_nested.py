"""LoRA on parameters that are no layer's weight, which PEFT saves under wrappers inside wrappers.

Of `nn.MultiheadAttention` the factors of the module are those of `in_proj_weight`. Of `target_parameters` (experts of
a mixture) every `.base_layer` leads to the parameter that was wrapped before, and no name says which that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loramgr.adapter import Experts, LowRank, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_config import LoraSettings
from loramgr.formats.peft_keys import PREFIX
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

__all__ = ["Nested", "take_nested"]

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$)[^.]+)?\.weight")
# experts' parameters in the order in which models register them, which is that of wrapping
_REGISTERED = ("gate_up_proj", "gate_proj", "w1", "w13", "up_proj", "w3", "down_proj", "w2")
_STANDARD = (0, 19)  # the PEFT since which experts that say nothing are read as (experts, out, in)


@dataclass(frozen=True, slots=True)
class Nested:
    """The updates of such parameters, and the names of the tensors that they are made of."""

    updates: dict[str, Update]
    used: frozenset[str]


def take_nested(fields: Fields, lora: LoraSettings, tensors: Mapping[str, TensorView]) -> Nested:
    """Read the factors of `nn.MultiheadAttention` and of target_parameters; raises IncompatibleError naming one."""
    pairs: dict[str, dict[str, TensorView]] = {}
    for name, view in tensors.items():
        if match := _FACTOR.fullmatch(name):
            pairs.setdefault(match["path"], {})[match["side"]] = view
    targets = _targets(fields, pairs)
    updates: dict[str, Update] = {}
    used: set[str] = set()
    for path, (parameter, is_expert) in targets.items():
        a, b = (pairs[path].get(side) for side in "AB")
        if a is None or b is None:
            raise IncompatibleError(f"{parameter}: the file holds no lora_{'A' if a is None else 'B'}")
        _check(parameter, a, b)
        updates[parameter] = _experts(fields, lora, parameter, (a, b)) if is_expert else _linear(lora, parameter, a, b)
        used |= {a.spec.name, b.spec.name}
    return Nested(updates, frozenset(used))


def _targets(fields: Fields, pairs: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return which parameter every nested path is of, and whether it is one of experts."""
    found: dict[str, tuple[str, bool]] = {}
    for path in pairs:
        attention, _, rest = path.partition(".base_layer.")
        if rest == "out_proj":
            found[path] = (f"{attention}.out_proj.weight", False)
            found[attention] = (f"{attention}.in_proj_weight", False)
    named = [name for name in fields.names("target_parameters") if not name.endswith(".weight")]
    modules: dict[str, list[str]] = {}
    for path in pairs:
        if path not in found:
            modules.setdefault(re.sub(r"(\.base_layer)+$", "", path), []).append(path)
    for module, paths in modules.items():
        here = [name.rpartition(".")[2] for name in named if _is_of(name.rpartition(".")[0], module)]
        if here:
            found |= _levels(module, sorted(paths, key=len, reverse=True), sorted(set(here)))
    return {path: target for path, target in found.items() if path in set(pairs)}


def _is_of(named: str, module: str) -> bool:
    return not named or f".{module}".endswith(f".{named}")


def _levels(module: str, paths: list[str], names: list[str]) -> dict[str, tuple[str, bool]]:
    """Match the wrappers, the innermost first, with the parameters in the order in which the model registers them."""
    if len(paths) != len(names):
        raise IncompatibleError(
            f"module {module}: target_parameters names {', '.join(names)}, and the file holds {len(paths)} of them"
        )
    if len(names) > 1 and not set(names) <= set(_REGISTERED):
        raise IncompatibleError(
            f"module {module}: which factors are those of {' and of '.join(names)} is ambiguous: the names do not say"
        )
    ordered = sorted(names, key=_REGISTERED.index) if len(names) > 1 else names
    return {path: (f"{module}.{name}", True) for path, name in zip(paths, ordered, strict=True)}


def _check(parameter: str, a: TensorView, b: TensorView) -> None:
    first, second = a.spec.shape, b.spec.shape
    if len(first) != 2 or len(second) != 2 or first[0] != second[1] or 0 in (*first, *second):
        raise IncompatibleError(f"{parameter}: lora_A is {first} and lora_B is {second}: they do not multiply")


def _linear(lora: LoraSettings, parameter: str, a: TensorView, b: TensorView) -> LowRank:
    module = parameter.removesuffix(".weight").removesuffix(".in_proj_weight")
    rank = a.spec.shape[0]
    if rank not in lora.ranks_of(module):
        raise IncompatibleError(f"{parameter}: lora_A has rank {rank}, the configuration says {lora.ranks_of(module)}")
    alpha = lora.alphas_of(module)[0]
    return LowRank("linear", a, b, rank, alpha, lora.scaling(alpha, rank))


def _experts(fields: Fields, lora: LoraSettings, parameter: str, pair: tuple[TensorView, TensorView]) -> Experts:
    """Take the flat factors apart: lora_A holds expert after expert, lora_B has the expert as its fastest index."""
    a, b = pair
    rank = lora.rank_of(parameter)
    total, inputs = a.spec.shape
    outputs = b.spec.shape[0]
    if total % rank:
        raise IncompatibleError(f"{parameter}: lora_A has {total} rows, no multiple of the rank {rank}")
    count = total // rank
    lora_A = ComputedTensor(
        TensorSpec(a.spec.name, a.spec.dtype, (count, rank, inputs)), lambda: a.load().reshape(count, rank, inputs)
    )
    lora_B = ComputedTensor(
        TensorSpec(b.spec.name, b.spec.dtype, (count, outputs, rank)),
        lambda: b.load().reshape(outputs, rank, count).permute(2, 0, 1),
    )
    alpha = lora.alphas_of(parameter)[0]
    transposed = _transposed_by_version(fields) if inputs == outputs else None
    return Experts(lora_A, lora_B, rank, alpha, lora.scaling(alpha, rank), transposed)


def _transposed_by_version(fields: Fields) -> bool | None:
    """Say how the PEFT that wrote the file takes square experts, None where it does not say which that is."""
    match = re.match(r"(\d+)\.(\d+)", fields.text("peft_version") or "")
    return None if match is None else (int(match[1]), int(match[2])) < _STANDARD
